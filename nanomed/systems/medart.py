"""Med-Art (Guo et al. 2025): PixArt-alpha fine-tuned on medical images with adapters on the transformer and on T5, and
with HLDF, a loss on the colours of finished images.

    loss = |noise - predicted noise|^2                                    in every step (eq. 3, pixart.py)
         + 1/M [colours of an image drawn in M steps - colours of data]^2   in every N-th step (eq. 4 and 5, hldf.py)

Stage "adapters" is the paper. `medart-tiny` has two stages before it that make what the paper finds published, an
autoencoder and a base model, from scratch and from the same images, in minutes on a CPU.
"""

import string
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomed.adapters import lora
from nanomed.data import grammar
from nanomed.diffusion import hldf
from nanomed.diffusion.process import Cond
from nanomed.run.flags import UsageError
from nanomed.systems import pixart
from nanomed.systems.pixart import PixArt
from nanomed.text.unigram import T5Tokenizer, train_unigram

TINY = dict(
    transformer=dict(num_attention_heads=4, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=4,
                     sample_size=8, patch_size=1, caption_channels=128, interpolation_scale=1.0),
    text_encoder=dict(vocab_size=512, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
    vae=dict(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8),
    scheduler=dict(prediction_type="sample"),  # text takes hold sooner than with the noise: see msdm.py
    length=64, steps=16, guidance=3.0, hldf_every=10, hldf_steps=8,
)  # fmt: skip
# What the constructor takes, and what train.py does with it. The released commands' numbers.
PRESETS = {
    "medart": dict(hldf_every=500),  # Kvasir
    "medart-skin": dict(hldf_every=1500),  # eight kinds of skin lesions
    "medart-tiny": TINY,
}
_RELEASED = {
    "": dict(batch=1, precision="bf16", rank=8, augment=True, views=4, valid=0.02, score_images=0),
    "adapters": dict(lr=1e-4, weight_decay=1e-2, clip=1.0, ema=0.0, save_every=2000),
}
RECIPES = {
    "medart": {**_RELEASED, "adapters": dict(**_RELEASED["adapters"], epochs=15)},
    "medart-skin": {**_RELEASED, "adapters": dict(**_RELEASED["adapters"], epochs=10)},
    "medart-tiny": {
        "": dict(data="toy:2000", augment=False, views=1, allocator=True),
        "vae": dict(steps=900, batch=32, lr=3e-3, schedule="cosine", warmup=20, ema=0.0, clip=1.0, save_every=450),
        "base": dict(steps=1500, batch=32, lr=2e-3, schedule="cosine", warmup=50, ema=0.99, clip=1.0, dropout=0.1,
                     places=0.3, places_first=300, save_every=500),
        "adapters": dict(steps=200, batch=8, lr=3e-4, weight_decay=1e-2, ema=0.0, clip=1.0, rank=8, save_every=100),
    },
}  # fmt: skip
FLAGS = ("size", "snr_gamma", "text_adapter", "shard", "offload", "hldf_every", "hldf_keep", "hldf_last")


class MedArt(PixArt):
    """PixArt whose adapters learn from images' colours, too.

    hldf_every     N: the colour loss is added in every N-th step, the first included; 0 = never
    hldf_steps     M: solver steps of an image that is drawn for it
    hldf_last      back-propagate through the last so many of them alone; None: all
    hldf_keep      hold the activations of so many of them, for speed (hldf.py)
    hldf_channels  "sum" (the paper) or "mean" (the released code, a third of it)
    text_adapter   kind of T5's adapter where it is not the transformer's, as "dora"; "none" leaves T5 as it is
    """

    # The released script also names proj_in and T5's wi, which nothing is called: what is listed is what takes effect.
    adapters = PixArt.adapters | {"text_encoder": ("q", "k", "v", "o", "wo")}
    jitter = False

    def __init__(
        self,
        *parts,
        hldf_every: int = 500,
        hldf_steps: int = 20,
        hldf_last: int | None = None,
        hldf_keep: int = 0,
        hldf_channels: str = "sum",
        text_adapter: str = "",
        **options,
    ):
        super().__init__(*parts, **options)
        if text_adapter not in ("", "none", *lora.KINDS):
            raise UsageError(f"--text_adapter {text_adapter}: choose none, {', '.join(lora.KINDS)}")
        self._settings = dict(hldf_every=hldf_every, hldf_steps=hldf_steps, hldf_last=hldf_last, hldf_keep=hldf_keep,
                              hldf_channels=hldf_channels, text_adapter=text_adapter)  # fmt: skip
        self.text_adapter = text_adapter
        self.stages = {"adapters": ("transformer",) if text_adapter == "none" else ("transformer", "text_encoder")}
        if not self.base:
            self.stages = {"vae": ("vae",), "base": ("transformer", "text_encoder")} | self.stages
        self.colour: Tensor | None = None  # the last colour loss, for the log
        self.pieces: list = []  # of T5, where `shard` has cut it

    # ------------------------------------------------------------------------------------------------ training

    def forward(self, batch: dict, stage: str, step: int) -> dict[str, Tensor]:
        """The loss of a stage. Under no_grad, as in validation, it is without the colours.

        `batch` is PixArt's. With cached "moments" comes "colours", and "prompt" is always there.
        """
        if stage == "vae":
            return self.reconstruction_loss(batch["image"])
        losses = super().forward(batch, stage, step)
        every = self._settings["hldf_every"] if stage == "adapters" and torch.is_grad_enabled() else 0
        if every and step % every == 0:
            colour = self.colour_loss(batch)
            losses["loss"] = losses["loss"] + colour / self._settings["hldf_steps"]
            self.colour = colour.detach()
        return losses if self.colour is None else losses | {"colour": self.colour}

    def colour_loss(self, batch: dict) -> Tensor:
        """Draw an image for every prompt of the batch, as `sample` would, and compare its colours with the data's.

        Differentiable into all that trains, of both branches of guidance, through every step and the decoder.
        """
        prompts, s = batch["prompt"], self._settings
        cond, null = self.conditions(prompts, None, self.size, self.size)
        params = [param for param in self.transformer.parameters() if param.requires_grad]
        denoise = hldf.recomputed(
            self.transformer, cond, null, self.guidance, params, s["hldf_steps"], s["hldf_keep"], s["hldf_last"]
        )
        noise = torch.randn(len(prompts), *self.latent_shape, device=next(self.transformer.parameters()).device)
        images = self.decode(self.draw(denoise, noise, s["hldf_steps"]))
        targets = batch["colours"] if "colours" in batch else hldf.colours(batch["image"])
        return hldf.colour_loss(images, targets, s["hldf_channels"])

    def image_moments(self, images: Tensor) -> dict[str, Tensor]:
        return super().image_moments(images) | {"colours": hldf.colours(images)}

    def frozen(self, stage: str) -> dict[str, tuple[str, Callable]]:
        return {} if stage == "vae" else super().frozen(stage)

    def example(self, stage: str, batch: int, device: torch.device) -> dict:
        if stage == "vae":
            return {"image": torch.rand(batch, 3, self.size, self.size, device=device) * 2 - 1}
        example = {"prompt": ["An endoscopic image of a polyp."] * batch} | super().example(stage, batch, device)
        return example | {"colours": torch.rand(batch, 6, device=device)}

    def adapt(self, stage: str, rank: int, alpha: float | None = None, kind: str = "lora") -> None:
        for part in self.stages[stage]:
            mine = self.text_adapter or kind if part == "text_encoder" else kind
            lora.inject(self.get_submodule(part), rank, alpha, self.adapters[part], mine)

    def states(self, prompts: list[str]) -> Cond:
        if not self.base:  # what learns to read here learns it as it is asked in `encode_text`
            prompts = [prompt.lower() for prompt in prompts]
        device = next(self.transformer.parameters()).device
        return {name: tensor.to(device) for name, tensor in super().states(prompts).items()}  # T5 may be elsewhere

    # --------------------------------------------------------------------------------------- T5-XXL on small cards

    def offload(self, part: str) -> None:
        """A frozen part whose results for all the data are on disk works on the CPU from now on, for the few that are
        still asked for: prompts of images that are drawn."""
        self.get_submodule(part).cpu()

    def shard(self, device: torch.device) -> None:
        """Leave each process a share of T5's frozen weights (FSDP2): a block is put together when it is used, forward
        and backward. Its adapters stay whole, and with them gradients, optimizer and files are as they always are."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        whole = set(lora.parameters(self.text_encoder)) if lora.adapted(self.text_encoder) else set()
        for module in (*self.text_encoder.encoder.block, self.text_encoder):
            self.pieces.append(fully_shard(module, mesh=mesh, ignored_params=whole))

    def eval(self) -> "MedArt":
        """Evaluation mode. T5 is whole in every process then: those that share out images need not draw equally many,
        and none waits for another."""
        for piece in self.pieces:
            piece.set_reshard_after_forward(False, recurse=False)
            piece.unshard()
        return super().eval()

    def trainable(self, stage: str) -> dict[str, torch.nn.Parameter]:
        params = super().trainable(stage)
        for piece in self.pieces:
            piece.set_reshard_after_forward(True, recurse=False)
            piece.reshard()
        return params

    def fold(self) -> None:
        if not self.pieces:  # a weight that is in pieces takes no adapter in
            super().fold()

    def memory(self, stage: str, batch: int) -> dict[str, float]:
        """What training needs on each device, in GB, by arithmetic on shapes: nothing is computed.

        In a step with HLDF the graph of the noise loss is there, those of the texts of both branches, and one of the
        decoder's and of one branch of one solver step, whichever is larger (hldf.py).
        """
        if stage != "adapters":
            return {}
        texts, net, decoder = self._activations(batch)
        tuned, keep = "text_encoder" in self.stages[stage], self._settings["hldf_keep"]
        frozen = {part: sum(p.nbytes for p in module.parameters()) for part, module in self.named_children()}
        trained = sum(p.numel() for p in self.trainable(stage).values())
        step = net + (texts if tuned else 0)
        event = step + (2 * texts if tuned else 0) + max(decoder, net) + 2 * keep * net
        parts = {
            "weights": sum(frozen.values()), "adapters and their moments": 16 * trained, "a step": step,
            "a step with HLDF": event if self._settings["hldf_every"] else step,
        }  # fmt: skip
        gb = {name: count / 1e9 for name, count in parts.items()}
        whole = sum(gb.values()) - gb["a step"] + 1.0  # what CUDA itself and its libraries take
        text = frozen["text_encoder"] / 1e9
        gb["in all"] = whole
        if tuned:
            gb["in all, --shard over 2"] = whole - text / 2
            gb["in all, --shard over 4"] = whole - text * 3 / 4
        else:
            gb["in all, --offload"] = whole - text
        return gb

    def _activations(self, batch: int) -> tuple[float, float, float]:
        """Bytes that autograd holds for T5 (full texts), for one branch of the transformer, and for the decoder."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        weight = self.transformer.proj_out.weight
        c, own = self.transformer.config, {p.untyped_storage()._cdata for p in self.parameters()}

        def held(run: Callable[[], Tensor]) -> int:
            found = {}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                found[storage._cdata] = storage  # held, so that no other storage takes its place
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                run()
            return sum(storage.nbytes() for place, storage in found.items() if place not in own)

        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device(weight.device):
            params = [mode.from_tensor(p) for p in self.parameters()]  # weights appear as they are and as shapes
            own |= {p.untyped_storage()._cdata for p in params}
            ids, mask = torch.zeros(batch, self.length, dtype=torch.int64), torch.ones(batch, self.length) > 0
            z = torch.empty(batch, *self.latent_shape, dtype=weight.dtype).requires_grad_()
            kv = torch.empty(batch, c.num_layers, 2, self.length, c.dim, dtype=weight.dtype).requires_grad_()
            texts = held(lambda: self.text_encoder(ids, mask))
            net = held(lambda: self.transformer(z, ids[:, 0], kv=kv, attention_mask=mask))
            return texts, net, held(lambda: self.vae.decode(z))

    # --------------------------------------------------------------------------------- a base model from nothing

    def reconstruction_loss(self, images: Tensor) -> dict[str, Tensor]:
        """MSE and L1 of an autoencoder's images, and 1e-6 of the KL divergence of its latents (Rombach et al. 2022)."""
        mean, logvar = self.vae.moments(images).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        out = self.vae.decode(z * self.vae.scale)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
        l1 = F.l1_loss(out, images)
        return {"loss": F.mse_loss(out, images) + l1 + 1e-6 * kl, "l1": l1.detach(), "kl": kl.detach()}

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] through the autoencoder and back, by the mean of their latents."""
        return self.decode(self.vae.encode(images))

    def finish(self, stage: str, image_batches: Iterable[Tensor]) -> dict[str, float]:
        """After the autoencoder: measure the standard deviation of its latents and scale them to 1 from now on."""
        if stage != "vae":
            return {}
        means = torch.cat([self.vae.moments(images).chunk(2, dim=1)[0] for images in image_batches])
        deviation = means.double().std().item()
        self._scale_latents(1 / deviation)
        return {"latent_std": deviation}

    def _scale_latents(self, factor: float) -> None:
        self.vae.scale = factor
        self.vae.config = replace(self.vae.config, scaling_factor=factor)

    def resume(self, stage: str, folder: str | Path) -> None:
        super().resume(stage, folder)
        if stage == "vae":
            self._scale_latents(pixart.read_config(folder)["vae"]["scaling_factor"])

    # ------------------------------------------------------------------------------------------------- folders

    def config(self) -> dict:
        return super().config() | {"system": "medart"} | self._settings


def tiny_tokenizer(pieces: int) -> T5Tokenizer:
    """The words of the toy world's prompts in small letters, and every letter for other words."""
    return train_unigram([*(prompt.lower() for prompt in grammar.all_prompts()), *string.printable], pieces - 100)


def build(
    preset: str, weights_folder: str | None = None, random: bool = False, dtype: torch.dtype | None = None, **options
) -> MedArt:
    """Med-Art before its training: on PixArt's published weights, or, tiny, fresh. `random` leaves the published parts
    untrained (dry runs, benchmarks)."""
    settings = PRESETS[preset] | options
    if "transformer" in settings:
        return MedArt.fresh(tiny_tokenizer(settings["text_encoder"]["vocab_size"]), **settings).to(dtype)
    if random:
        system = pixart.untrained(MedArt, dtype, base=pixart.REPOSITORY, **settings)
        system.tokenizer = tiny_tokenizer(512)
        return system
    folder = pixart.published_folder(pixart.REPOSITORY, weights_folder)
    return MedArt.published(folder, dtype, base=pixart.base_of(folder), **settings)


def load(folder: str | Path, weights_folder: str | None = None, dtype: torch.dtype | None = None) -> MedArt:
    """Read what `MedArt.save` wrote: the adapters, folded into the base model's weights."""
    return MedArt.saved(folder, weights_folder, dtype)
