"""Kandinsky 3 from prompt to pixels against diffusers' pipeline, on a miniature that `save_pretrained` wrote in the
published layout: the same draws, mistakes that must show; and one step of LoRA against peft.

In float64, because a random U-Net of this kind makes a few 1e-5 of rounding alone. The noise has a tenth of the usual
betas: under the published schedule, whose clamp is tested on its own, a random network's x_0 is all clamp.
"""

import json
import shutil
from pathlib import Path

import diffusers
import peft
import pytest
import torch
import transformers
from conftest import close
from test_kandinsky3 import SMALL
from torch import Tensor, nn

import nanomed
from nanomed import systems, weights
from nanomed.adapters import lora
from nanomed.run import files
from nanomed.systems.kandinsky3 import Kandinsky3
from nanomed.text.unigram import train_unigram

PROMPTS = ["An endoscopic image of a polyp in the left part, shiny and wet.", "A polyp.", "No finding"]
NEGATIVE = ["blurred", "", "A very long text about all that should not be seen in any picture of a polyp, ever."]
MILD = dict(_class_name="DDPMScheduler", beta_start=1e-5, beta_end=0.002, clip_sample=False, steps_offset=1)
PUBLISHED = dict(_class_name="DDPMScheduler", beta_schedule="squaredcos_cap_v2", clip_sample=True,
                 clip_sample_range=1.0, steps_offset=1, timestep_spacing="leading")  # fmt: skip
STEPS = 3


@torch.no_grad()
def miniature(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = train_unigram(PROMPTS + NEGATIVE, 80)
    tokenizer.save(folder / "tokenizer")
    config = transformers.T5Config(vocab_size=len(tokenizer) + 3, d_model=20, d_kv=8, d_ff=48, num_layers=2,
                                   num_heads=3, feed_forward_proj="gated-silu")  # fmt: skip
    unet = diffusers.Kandinsky3UNet(**SMALL)
    for name, parameter in unet.named_parameters():  # norms that time does nothing to, at the start
        if "context_mlp" in name:
            nn.init.normal_(parameter, std=0.1)
    unet.conv_out.weight.mul_(0.3)  # else tenfold rounding at every step
    movq = diffusers.VQModel(
        block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=4, num_vq_embeddings=20,
        vq_embed_dim=4, norm_num_groups=16, norm_type="spatial",
        down_block_types=(*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3),
    )  # fmt: skip
    for name, part in dict(unet=unet, movq=movq, text_encoder=transformers.T5EncoderModel(config)).items():
        part.save_pretrained(folder / name)
    files.write_json(folder / "scheduler" / "scheduler_config.json", MILD)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return miniature(tmp_path_factory.mktemp("published"))


def scheduled(folder: Path, to: Path, scheduler: dict) -> Path:
    """The same with another scheduler."""
    shutil.copytree(folder, to)
    files.write_json(to / "scheduler" / "scheduler_config.json", scheduler)
    return to


def pipeline(folder: Path, dtype: torch.dtype = torch.float64) -> diffusers.Kandinsky3Pipeline:
    pipe = diffusers.Kandinsky3Pipeline(
        tokenizer=transformers.T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=transformers.T5EncoderModel.from_pretrained(folder / "text_encoder"),
        unet=diffusers.Kandinsky3UNet.from_pretrained(folder / "unet"),
        movq=diffusers.VQModel.from_pretrained(folder / "movq"),
        scheduler=diffusers.DDPMScheduler.from_pretrained(folder / "scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype)
    if dtype == torch.float64:  # transformers rounds T5's norms to float32 in any dtype; PyTorch's own do not
        for layer in [m for m in pipe.text_encoder.modules() if hasattr(m, "layer_norm")]:
            layer.layer_norm = exact(layer.layer_norm)
        pipe.text_encoder.encoder.final_layer_norm = exact(pipe.text_encoder.encoder.final_layer_norm)
    return pipe


def exact(norm: nn.Module) -> nn.Module:
    made = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
    made.weight = norm.weight
    return made


class Replay:
    """diffusers' draws: one generator, all rows of a batch at once."""

    def __init__(self, rows: int, dtype: torch.dtype = torch.float64):
        self.rows, self.dtype, self.generator, self.asked = rows, dtype, torch.Generator().manual_seed(5), 0

    def randn(self, *shape: int) -> Tensor:
        self.asked += 1
        return torch.randn(self.rows, *shape, generator=self.generator, dtype=self.dtype)


def watch(movq: nn.Module) -> list[Tensor]:
    """What goes into a decoder and what comes out of it, not clamped."""
    seen: list[Tensor] = []
    movq.post_quant_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    movq.decoder.register_forward_hook(lambda module, inputs, out: seen.append(out))
    return seen


SETTINGS = dict(height=64, width=64, steps=STEPS, guidance=4.0, negative=None)


@torch.no_grad()
def reference(folder: Path, height, width, steps, guidance, negative) -> tuple[Tensor, Tensor]:
    """diffusers' latents and images before the clamp. Its scale counts from 0, but at 1 and below there is none."""
    pipe = pipeline(folder)
    seen = watch(pipe.movq)
    pipe(PROMPTS, height=height, width=width, num_inference_steps=steps, negative_prompt=negative,
         guidance_scale=guidance - 1, generator=torch.Generator().manual_seed(5), output_type="pt")  # fmt: skip
    return seen[0], seen[1]


@torch.no_grad()
def ours(system: Kandinsky3, height, width, steps, guidance, negative) -> tuple[Tensor, Tensor]:
    seen, noise = watch(system.movq), Replay(len(PROMPTS), system.dtype)
    images = system.sample(PROMPTS, noise, steps, guidance, negative, height, width)
    assert noise.asked == 1 + steps
    close(images, (seen[1] / 2 + 0.5).clamp(0, 1).float(), 1e-6)
    return seen[0], seen[1]


def load(folder: Path) -> Kandinsky3:
    return nanomed.load("kandinsky3", weights=folder, dtype=torch.float64)


def excess(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The larger error, of latents (1e-5 of the largest value) and images (1e-4), in units of its tolerance."""
    return max(
        (out.double() - ref.double()).abs().max().item() / (tolerance * max(1.0, ref.abs().max().item()))
        for out, ref, tolerance in zip(found, expected, (1e-5, 1e-4), strict=True)
    )


# ------------------------------------------------------------------------------------------------- prompt to pixels

CASES = {
    "64 x 64": {},
    "128 x 64": dict(height=128),
    "negative prompts, one longer than all prompts": dict(negative=NEGATIVE),
    "64 x 100, rounded up to 64 x 128": dict(height=64, width=100, guidance=2.5),
    "no guidance": dict(guidance=1.0),
}


@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_prompts_to_pixels_equal_diffusers(change, folder):
    """Prompts of unequal length, cut behind the longest; without negative prompts the null is zeros and no mask."""
    settings = SETTINGS | change
    expected = reference(folder, **settings)
    found = ours(load(folder), **settings)
    assert 0.3 < expected[0].std() < 3 and expected[1].std() > 0.1
    assert found[1].shape[2:] == tuple(-(-settings[side] // 64) * 64 for side in ("height", "width"))
    assert excess(found, expected) <= 1


def test_the_published_schedule_and_its_clamp(folder, tmp_path):
    """A squared cosine, x_0 within 1; the clamp matters, and not all is clamp."""
    published = scheduled(folder, tmp_path / "a", PUBLISHED)
    expected, found = reference(published, **SETTINGS), ours(load(published), **SETTINGS)
    assert excess(found, expected) <= 1
    assert 0.02 < (expected[0].abs() < 0.99).double().mean()
    free = ours(load(scheduled(folder, tmp_path / "b", PUBLISHED | dict(clip_sample=False))), **SETTINGS)
    assert excess(free, expected) > 10


def wrong_pad(system: Kandinsky3) -> None:
    """Padding that is read."""
    tokenize = system.tokenizer.__call__
    system.tokenizer = lambda prompts, length: (tokenize(prompts, length)[0], torch.ones(len(prompts), length) > 0)


def wrong_null(system: Kandinsky3) -> None:
    """The null of every other system."""
    sample = system.sample
    system.sample = lambda prompts, noise, steps, guidance, negative, *size: sample(
        prompts, noise, steps, guidance, [""] * len(prompts), *size)  # fmt: skip


PLANTED = {
    "SD's factor before MoVQ": (
        lambda s: s.movq.post_quant_conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 0.18215,)), {}),
    "one step fewer": (lambda s: None, dict(steps=STEPS - 1)),
    "guidance 2% more": (lambda s: None, dict(guidance=4.08)),
    "padding that is read": (wrong_pad, {}),
    "a null of the empty text": (wrong_null, {}),
    "one place of padding too many": (lambda s: setattr(s, "places", lambda text: Kandinsky3.places(s, text) + 1), {}),
}  # fmt: skip


def test_planted_mistakes_show_tenfold(folder):
    """Each likely mistake exceeds one of the tolerances ten times or more, on this very miniature."""
    expected = ours(load(folder), **SETTINGS)
    for mistake, (plant, change) in PLANTED.items():
        system = load(folder)
        plant(system)
        assert excess(ours(system, **SETTINGS | change), expected) > 10, mistake


@torch.no_grad()
def test_other_samplers_on_the_same_files(folder, tmp_path):
    """Equal to diffusers' loop with a scheduler `from_config` of the folder's; what cannot follow is refused."""
    system, pipe = load(folder), pipeline(folder)
    for name, cls in (("ddim", diffusers.DDIMScheduler), ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler)):
        pipe.scheduler = cls.from_config(MILD)
        expected = pipe(PROMPTS, height=64, width=64, num_inference_steps=STEPS, output_type="latent",
                        generator=torch.Generator().manual_seed(5)).images  # fmt: skip
        seen = watch(system.movq)
        system.sample(PROMPTS, Replay(3), STEPS, height=64, width=64, sampler=name)
        close(seen[0], expected, 1e-5)
    with pytest.raises(weights.WeightsError, match="skip_prk_steps = False"):
        system.sample(PROMPTS, Replay(3), STEPS, sampler="pndm")


# ---------------------------------------------------------------------------------------------------------- the text


@torch.no_grad()
def test_text_is_encoded_as_the_pipeline_does(folder):
    """Word for word, 128 tokens; zero at padding, and cut one place behind the longest."""
    system, pipe, prompts = load(folder), pipeline(folder), [*PROMPTS, "long " * 200, ""]
    for some in (prompts[:3], prompts):
        states, _, mask, _ = pipe.encode_prompt(some, do_classifier_free_guidance=False, _cut_context=True)
        text = system.encode_text(some)
        read = system.read(system.cut(text, system.places(text)), system.size, system.size)
        assert text["prompt_embeds"].shape == (len(some), 128, 20)
        assert torch.equal(read["attention_mask"], mask.bool())
        assert mask.shape[1] == (min(len(system.tokenizer.encode(some[0])) + 2, 128) if len(some) == 3 else 128)
        close(text["prompt_embeds"][:, : mask.shape[1]], states, 1e-10)
        close(read["kv"], system.unet.read_text(states, mask.bool())["kv"], 1e-10)


def test_a_dropped_prompt_is_the_null_in_training(folder):
    """Zeros and no mask, though the pipeline's negative prompt "" is T5's </s>."""
    system = load(folder)
    text, asked = system.states(["", PROMPTS[1]]), system.encode_text(["", PROMPTS[1]])
    assert not text["attention_mask"][0].any() and not text["prompt_embeds"][0].any()
    assert asked["attention_mask"][0].sum() == 1
    assert all(torch.equal(text[name][1], asked[name][1]) for name in text)


# ---------------------------------------------------------------------------------------------------------- training


def example(rows: int = 2) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {"image": torch.rand(rows, 3, 64, 64, generator=generator) * 2 - 1, "prompt": PROMPTS[:rows]}


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_step_of_lora_equals_pefts_on_the_published_network(folder, gamma):
    """Loss to 1e-5, gradients of all factors to 1e-4 of the largest, with the same draws: epsilon of MoVQ's latents
    before its codes, MSE, min-SNR where it is asked for."""
    system, pipe = Kandinsky3.published(folder, torch.float64, snr_gamma=gamma), pipeline(folder)
    system.adapt("unet", 4)
    params = system.trainable("unet")
    torch.manual_seed(7)
    for parameter in params.values():  # B starts at zero, and would leave A without a gradient
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = peft.get_peft_model(pipe.unet, peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(lora.ATTENTION)))
    peft.set_peft_model_state_dict(model, {f"base_model.model.{k}": v for k, v in lora.state(system.unet).items()})
    batch = example()
    torch.manual_seed(4)
    loss = system(batch, "unet", 0)["loss"]

    torch.manual_seed(4)
    x0 = pipe.movq.encode(batch["image"].double()).latents.float()
    t, noise = torch.randint(1000, (2,)), torch.randn(x0.shape)
    states, _, mask, _ = pipe.encode_prompt(batch["prompt"], do_classifier_free_guidance=False, _cut_context=True)
    noised = pipe.scheduler.add_noise(x0, noise, t)
    out = model(noised.double(), t, encoder_hidden_states=states, encoder_attention_mask=mask).sample.float()
    snr = pipe.scheduler.alphas_cumprod[t] / (1 - pipe.scheduler.alphas_cumprod[t])
    weight = snr.clamp(max=gamma) / snr if gamma else torch.ones(2)
    expected = ((out - noise).square().mean((1, 2, 3)) * weight).mean()

    close(loss, expected, 1e-5)
    loss.backward()
    expected.backward()
    theirs = {name.removeprefix("base_model.model.").replace(".default.", "."): p.grad
              for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    largest = max(gradient.abs().max() for gradient in theirs.values())
    assert {f"unet.{name}" for name in theirs} == params.keys()
    for name, gradient in theirs.items():
        assert (params[f"unet.{name}"].grad - gradient).abs().max() <= 1e-4 * largest, name


def test_cached_fields_give_the_same_loss(folder):
    """Also where the loader has cut the texts behind the longest."""
    system, batch = load(folder), example()
    frozen = system.frozen("unet")
    assert frozen["image"][0] == "movq" and frozen["text"][0] == "text_encoder"
    fields = frozen["image"][1](batch["image"]) | frozen["text"][1](batch["prompt"])
    longest = int(fields["attention_mask"].sum(1).max())
    cut = fields | {name: fields[name][:, :longest] for name in system.trimmed}
    losses = []
    for given in (batch, fields, cut):
        torch.manual_seed(6)
        losses.append(system(given, "unet", 0)["loss"])
    close(losses[1], losses[0], 1e-6)
    close(losses[2], losses[0], 1e-6)
    assert system(system.example("unet", 1, torch.device("cpu")), "unet", 0)["loss"].isfinite()


def test_a_trained_adapter_is_saved_and_read_again(folder, tmp_path):
    system = systems.build("kandinsky3", str(folder), dtype=torch.float64)
    system.adapt("unet", 2)
    for parameter in system.trainable("unet").values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    system.eval().save(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").glob("*/")} == {"unet_lora"}
    again = nanomed.load(tmp_path / "model", dtype=torch.float64)
    assert not lora.adapted(again) and again.config() == system.config()
    found, expected, bare = (ours(s, **SETTINGS) for s in (again, system, load(folder)))
    assert excess(found, expected) <= 1 < excess(bare, expected)


def test_half_precision_shards_are_read(folder, tmp_path):
    """As the published repository is: fp16 files alone, in shards. T5's wo is float32 in any case."""
    pipeline(folder, torch.float32).to(torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    assert not list(tmp_path.glob("*/model.safetensors")) and len(list(tmp_path.glob("*/*fp16*-of-*.safetensors"))) > 6
    system = nanomed.load("kandinsky3", weights=tmp_path)
    assert system.dtype == torch.float16
    kinds = {name.endswith("wo.weight"): p.dtype for name, p in system.text_encoder.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.float16}
    expected = ours(load(folder), **SETTINGS)[0]
    found = ours(nanomed.load("kandinsky3", weights=tmp_path, dtype=torch.float64), **SETTINGS)[0]
    assert (found - expected).norm() < 0.05 * expected.norm()


# ---------------------------------------------------------------------------------------------------- files and shapes


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download kandinsky-community/kandinsky-3"):
        nanomed.load("kandinsky3", weights=tmp_path)
    odd = scheduled(folder, tmp_path / "odd", MILD | dict(_class_name="LMSDiscreteScheduler"))
    with pytest.raises(weights.WeightsError, match="'LMSDiscreteScheduler' is not one of"):
        nanomed.load("kandinsky3", weights=odd)
    path = folder / "text_encoder" / "config.json"
    wider = scheduled(folder, tmp_path / "wider", MILD)
    said = json.loads(path.read_text()) | dict(d_model=24)
    transformers.T5EncoderModel(transformers.T5Config(**said)).save_pretrained(wider / "text_encoder")
    with pytest.raises(weights.WeightsError, match=r"text and latents of \(20, 4\) channels beside .* \(24, 4\)"):
        nanomed.load("kandinsky3", weights=wider)
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts"):
        load(folder).sample(["a", "b"], Replay(2), negative_prompts=["c"])


@pytest.mark.parametrize("rank", [4, 128])
def test_the_published_shapes_without_a_file(rank):
    """12 billion weights that take no memory; 417,792 parameters a rank, and the paper's settings."""
    system = systems.build("kandinsky3", random=True, dtype=torch.bfloat16)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in system.named_children()}
    assert counts == dict(unet=3_055_348_228, movq=270_669_103, text_encoder=8_721_797_632)
    system.adapt("unet", rank)
    assert sum(p.numel() for p in system.trainable("unet").values()) == 417_792 * rank
    assert (system.size, system.steps, system.guidance, system.snr_gamma) == (256, 150, 4.0, 5.0)
