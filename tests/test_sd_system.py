"""Stable Diffusion 1.x and SDXL from prompt to pixels against diffusers' pipelines, on miniatures that
`save_pretrained` wrote in the published layout: the same draws, every sampler, mistakes that must show; and one step of
LoRA against peft.

The noise schedules have a tenth of the published betas: under the published ones a random network's latents reach 200
and hide mistakes.
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
from torch import Tensor, nn

import nanomed
from nanomed import systems, weights
from nanomed.adapters import lora
from nanomed.drawing import Drawing, draw
from nanomed.run.flags import UsageError
from nanomed.systems.sd import StableDiffusion
from nanomed.text.tokenizers import ClipTokenizer, train_bpe

PROMPTS = ["a polyp in the colon!", "no finding", "An endoscopic image of a large, green/black box and a POLYP, wet"]
NEGATIVE = ["a blurred image", "", "box!"]
LATENTS, IMAGES = 1e-5, 1e-4  # of the largest value: final latents; images before they are clamped
PUBLISHED = dict(  # what stands in the files, but for the betas
    beta_start=0.000085, beta_end=0.0012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
    clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading", skip_prk_steps=True, trained_betas=None,
    prediction_type="epsilon",
)  # fmt: skip
CLASSES = {"sd15": "PNDMScheduler", "sdxl": "EulerDiscreteScheduler"}
UNETS = {
    "sd15": dict(
        block_out_channels=(32, 48, 64, 64), cross_attention_dim=24, attention_head_dim=8, sample_size=8,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    ),
    "sdxl": dict(
        block_out_channels=(32, 48, 64), cross_attention_dim=40, attention_head_dim=(2, 3, 4), sample_size=8,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2), transformer_layers_per_block=(1, 1, 2),
        up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    ),
}  # fmt: skip
FACTORS = {"sd15": 0.18215, "sdxl": 0.13025}
STEPS = 4


def tower(vocabulary: int, width: int, projection: bool) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=77, hidden_act="gelu" if projection else "quick_gelu", projection_dim=16,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return moved((transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config), 0.3)


@torch.no_grad()
def moved(network: nn.Module, amount: float) -> nn.Module:
    """Away from a start at which norms do nothing and all texts look alike."""
    for parameter in network.parameters():
        parameter.add_(amount * torch.randn_like(parameter))
    return network.eval()


def miniature(kind: str, folder: Path) -> Path:
    """A checkpoint in the published layout with the published names; SDXL's second tokenizer pads with "!"."""
    torch.manual_seed(0)
    first, tokenizers = train_bpe(PROMPTS + NEGATIVE, merges=20), []
    for i, pad in enumerate(("<|endoftext|>", "!")):
        ClipTokenizer(first.vocab, first.merges, pad).save(folder / f"t{i}")
        tokenizers.append(transformers.CLIPTokenizer.from_pretrained(folder / f"t{i}", model_max_length=77))
        shutil.rmtree(folder / f"t{i}")
    unet = diffusers.UNet2DConditionModel(layers_per_block=1, norm_num_groups=8, **UNETS[kind])
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        scaling_factor=FACTORS[kind],
    )  # fmt: skip
    parts = dict(unet=moved(unet, 0.05), vae=vae, text_encoder=tower(len(first), 24 if kind == "sd15" else 16, False))
    if kind == "sd15":
        more = dict(tokenizer=tokenizers[0], safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        pipeline = diffusers.StableDiffusionPipeline(**parts, scheduler=diffusers.PNDMScheduler(), **more)
    else:
        more = dict(tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], text_encoder_2=tower(len(first), 24, True))
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, scheduler=diffusers.EulerDiscreteScheduler(), **more)
    pipeline.save_pretrained(folder)
    said = {"_class_name": CLASSES[kind]} | PUBLISHED
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: miniature(kind, tmp_path_factory.mktemp(kind)) for kind in UNETS}


def pipeline(kind: str, folder: Path, sampler: str = ""):
    cls = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[kind]
    pipe = cls.from_pretrained(folder, **(dict(add_watermarker=False) if kind == "sdxl" else {}))
    if sampler:
        pipe.scheduler = getattr(diffusers, sampler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Replay:
    """diffusers' draws: one generator, all rows of a batch at once."""

    def __init__(self, rows: int):
        self.rows, self.generator, self.asked = rows, torch.Generator().manual_seed(5), []

    def randn(self, *shape: int) -> Tensor:
        self.asked.append(shape)
        return torch.randn(self.rows, *shape, generator=self.generator)


def watch(vae: nn.Module) -> list[Tensor]:
    """What goes into a decoder and what comes out of it: latents without their factor, images before the clamp."""
    seen: list[Tensor] = []
    vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vae.decoder.register_forward_hook(lambda module, inputs, out: seen.append(out))
    return seen


SETTINGS = dict(height=64, width=64, steps=STEPS, guidance=7.5, negative=None, sampler="")


@torch.no_grad()
def reference(kind: str, folder: Path, height, width, steps, guidance, negative, sampler) -> tuple[Tensor, ...]:
    """Final latents, images before the clamp, and images of diffusers' pipeline."""
    pipe = pipeline(kind, folder, sampler)
    seen = watch(pipe.vae)
    given = dict(num_inference_steps=steps, guidance_scale=guidance, generator=torch.Generator().manual_seed(5))
    images = pipe(PROMPTS, negative_prompt=negative, height=height, width=width, output_type="pt", **given).images
    return seen[0] * FACTORS[kind], seen[1], images


@torch.no_grad()
def ours(kind: str, system: StableDiffusion, height, width, steps, guidance, negative, sampler) -> tuple[Tensor, ...]:
    seen, noise = watch(system.vae), Replay(len(PROMPTS))
    images = system.sample(PROMPTS, noise, steps, guidance, negative, height, width, sampler)
    assert len(noise.asked) == (1 + steps if sampler == "ddpm" else 1)
    return seen[0] * FACTORS[kind], seen[1], images


def excess(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest error of latents, images before the clamp and images, in units of its tolerance."""
    return max(
        (out - ref).abs().max().item() / (tolerance * max(1.0, ref.abs().max().item()))
        for out, ref, tolerance in zip(found, expected, (LATENTS, IMAGES, IMAGES), strict=True)
    )


# ------------------------------------------------------------------------------------------------- prompt to pixels

CASES = {
    "64 x 64": {},
    "128 x 64, negative prompts": dict(height=128, negative=NEGATIVE),
    "72 x 136, odd latents": dict(height=72, width=136, guidance=3.0),
    "no guidance": dict(guidance=1.0),
    "one step": dict(steps=1),
}


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_prompts_to_pixels_equal_diffusers(kind, change, folders):
    """Three prompts of unequal length; without negative prompts SDXL's null is zeros, as its folder says."""
    settings = SETTINGS | change
    expected = reference(kind, folders[kind], **settings)
    found = ours(kind, nanomed.load(kind, weights=folders[kind]), **settings)
    assert 0.3 < expected[0].std() < 3 and expected[1].std() > 0.1
    assert found[2].shape[2:] == (settings["height"], settings["width"])
    assert excess(found, expected) <= 1


SAMPLERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
            "euler": "EulerDiscreteScheduler", "pndm": "PNDMScheduler"}  # fmt: skip


@pytest.mark.parametrize("kind, sampler", [*(("sd15", name) for name in SAMPLERS), ("sdxl", "dpmpp_2m"),
                                           ("sdxl", "euler")])  # fmt: skip
def test_other_samplers_on_the_same_files_equal_diffusers(kind, sampler, folders):
    """As `from_config` of another class on the folder's settings. DPM-Solver has a leading grid of its own."""
    expected = reference(kind, folders[kind], **SETTINGS | dict(sampler=SAMPLERS[sampler]))
    system = nanomed.load(kind, weights=folders[kind])
    found = ours(kind, system, **SETTINGS | dict(sampler=sampler))
    assert excess(found, expected) <= 1
    if SAMPLERS[sampler] == CLASSES[kind]:  # asked for by name or not
        assert torch.equal(found[0], ours(kind, nanomed.load(kind, weights=folders[kind]), **SETTINGS)[0])


def wrong_pad(system: StableDiffusion) -> None:
    name = [*system.tokenizers][-1]
    getattr(system, name).pad_id = 7


PLANTED = {
    "the other family's VAE factor": (lambda s: setattr(s.vae, "scale", 0.18215 + 0.13025 - s.vae.scale), {}),
    "one step fewer": (lambda s: None, dict(steps=STEPS - 1)),
    "guidance 2% more": (lambda s: None, dict(guidance=7.65)),
    "padding with another token": (wrong_pad, {}),
}


@pytest.mark.parametrize("kind", UNETS)
def test_planted_mistakes_show_tenfold(kind, folders):
    """Each likely mistake exceeds one of the tolerances ten times or more, on these very miniatures."""
    expected = ours(kind, nanomed.load(kind, weights=folders[kind]), **SETTINGS)
    for mistake, (plant, change) in PLANTED.items():
        system = nanomed.load(kind, weights=folders[kind])
        plant(system)
        assert excess(ours(kind, system, **SETTINGS | change), expected) > 10, mistake


def test_the_folder_says_what_sdxls_null_is(folders, tmp_path):
    """Zeros, or the states of "" where model_index.json says so."""
    folder = shutil.copytree(folders["sdxl"], tmp_path / "other")
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_zeros_for_empty_prompt": False}))
    found = ours("sdxl", nanomed.load("sdxl", weights=folder), **SETTINGS)
    assert excess(found, reference("sdxl", folder, **SETTINGS)) <= 1
    assert excess(found, ours("sdxl", nanomed.load("sdxl", weights=folders["sdxl"]), **SETTINGS)) > 10


# ----------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("kind", UNETS)
def test_half_precision_shards_are_read(kind, folders, tmp_path):
    """The fp16 variant in shards, as float32, as bfloat16 and as it is; SDXL's VAE is never float16."""
    pipeline(kind, folders[kind]).to(torch.float16).save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    assert not list(tmp_path.glob("*/model.safetensors")) and len(list(tmp_path.glob("*/*fp16*-of-*.safetensors"))) > 6
    expected = ours(kind, nanomed.load(kind, weights=folders[kind]), **SETTINGS | dict(guidance=1.0))[0]
    for dtype, tolerance in ((torch.float32, 0.01), (torch.bfloat16, 0.1)):
        system = nanomed.load(kind, weights=tmp_path, dtype=dtype)
        assert {p.dtype for p in system.parameters()} == {dtype}
        found = ours(kind, system, **SETTINGS | dict(guidance=1.0))
        assert (found[0] - expected).norm() < tolerance * expected.norm() and found[2].dtype == torch.float32
    for dtype in (None, torch.float16):
        system = nanomed.load(kind, weights=tmp_path, dtype=dtype)
        assert system.dtype == torch.float16
        assert system.weight("vae").dtype == (torch.float32 if kind == "sdxl" else torch.float16)


def test_sdxls_vae_leaves_float16_autocast(folders):
    """There its encoder and decoder run as if there were none."""
    system, latents = nanomed.load("sdxl", weights=folders["sdxl"]), torch.randn(1, 4, 8, 8)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        plain = system.decode(latents), system.image_moments(images)["moments"]
        with torch.autocast("cpu", torch.float16):
            narrow = system.decode(latents), system.image_moments(images)["moments"]
        with torch.autocast("cpu", torch.bfloat16):
            wide = system.decode(latents)
    assert all(torch.equal(a, b) for a, b in zip(plain, narrow)) and not torch.equal(wide, plain[0])


def test_schedulers_that_are_not_known_are_refused_by_name(folders, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "other")
    path = folder / "scheduler" / "scheduler_config.json"
    said = json.loads(path.read_text())
    for odd, says in (
        (dict(_class_name="HeunDiscreteScheduler"), "'HeunDiscreteScheduler' is not one of DDIMScheduler, "),
        (dict(_class_name="EulerDiscreteScheduler", use_karras_sigmas=True), "use_karras_sigmas = True"),
        (dict(prediction_type="v_prediction"), "prediction_type = 'v_prediction'"),  # PNDM
    ):
        path.write_text(json.dumps(said | odd))
        with pytest.raises(weights.WeightsError, match=f"scheduler_config.json: .*{says}"):
            nanomed.load("sd15", weights=folder)
    path.write_text(json.dumps(said | dict(_class_name="DDIMScheduler", prediction_type="v_prediction")))
    system = nanomed.load("sd15", weights=folder)
    assert system.sample(["a"], Replay(1), 2, sampler="euler").isfinite().all()
    with pytest.raises(weights.WeightsError, match="prediction_type = 'v_prediction'"):
        system.sample(["a"], Replay(1), 2, sampler="pndm")


def test_parts_that_do_not_belong_together_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["sd15"], tmp_path / "other")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folders["sdxl"] / "text_encoder", folder / "text_encoder")
    with pytest.raises(weights.WeightsError, match=r"text and latents of \(24, 4\) channels beside .* \(16, 4\)"):
        nanomed.load("sd15", weights=folder)
    with pytest.raises(FileNotFoundError, match="hf download CompVis/stable-diffusion-v1-4"):
        nanomed.load("sd14", weights=tmp_path)
    assert nanomed.load("sd14", weights=folders["sd15"]).size == 64


def test_sizes_and_negative_prompts_that_do_not_fit_are_refused(folders):
    system = nanomed.load("sd15", weights=folders["sd15"])
    with pytest.raises(ValueError, match="68 x 64: sides must be multiples of 8"):
        system.sample(["a"], Replay(1), height=68)
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts"):
        system.sample(["a", "b"], Replay(2), negative_prompts=["c"])


def test_samplers_are_chosen_from_the_command_line(folders, tmp_path):
    """`sample.py --sampler`; the manifest says it. A system with a sampler of its own takes none."""
    system = nanomed.load("sd15", weights=folders["sd15"])
    draw(system, ["a"], Drawing(str(tmp_path / "a"), steps=2, batch=1, sampler="dpmpp_2m"))
    draw(system, ["a"], Drawing(str(tmp_path / "b"), steps=2, batch=1))
    first, second = ((tmp_path / name / "manifest.jsonl").read_text() for name in "ab")
    assert json.loads(first)["sampler"] == "dpmpp_2m" and "sampler" not in json.loads(second)
    assert (tmp_path / "a/00000.png").read_bytes() != (tmp_path / "b/00000.png").read_bytes()
    with pytest.raises(UsageError, match="other settings .sampler"):
        draw(system, ["a"], Drawing(str(tmp_path / "a"), steps=2, batch=1))
    msdm = nanomed.load("msdm-tiny")
    with pytest.raises(UsageError, match="--sampler ddim: msdm draws with a sampler of its own"):
        draw(msdm, ["a"], Drawing(str(tmp_path / "c"), steps=2, batch=1, sampler="ddim"))


# ---------------------------------------------------------------------------------------------------------- training


def example(rows: int = 2) -> dict:
    generator = torch.Generator().manual_seed(2)
    return {"image": torch.rand(rows, 3, 64, 64, generator=generator) * 2 - 1, "prompt": PROMPTS[:rows]}


def in_peft(system: StableDiffusion, pipe, kind: str) -> dict[str, nn.Module]:
    """The same adapters by peft on diffusers' and transformers' networks, with our tensors in them."""
    models = {}
    for part in system.stages["unet"]:
        config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(system.adapters[part]))
        models[part] = peft.get_peft_model(getattr(pipe, part), config)
        tensors = lora.state(system.get_submodule(part))
        names = set(dict(models[part].base_model.model.named_modules()))
        if part == "text_encoder" and "text_model" not in names:  # transformers 5 leaves the published prefix out
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        found = peft.set_peft_model_state_dict(models[part], {f"base_model.model.{k}": v for k, v in tensors.items()})
        assert not found.unexpected_keys
    return models


def published_loss(kind: str, pipe, models: dict[str, nn.Module], batch: dict) -> Tensor:
    """The loss of diffusers' text-to-image scripts, with our draws."""
    posterior = pipe.vae.encode(batch["image"]).latent_dist
    x0 = (posterior.mean + posterior.std * torch.randn(posterior.mean.shape)) * FACTORS[kind]
    t, noise = torch.randint(1000, (len(x0),)), torch.randn(x0.shape)
    noised = diffusers.DDPMScheduler.from_config(pipe.scheduler.config).add_noise(x0, noise, t)

    def tokens(tokenizer) -> Tensor:
        given = dict(max_length=77, padding="max_length", truncation=True, return_tensors="pt")
        return tokenizer(batch["prompt"], **given).input_ids

    first = models.get("text_encoder", pipe.text_encoder)
    unet = models["unet"]
    if kind == "sd15":
        out = unet(noised, t, first(tokens(pipe.tokenizer)).last_hidden_state).sample
    else:
        one = first(tokens(pipe.tokenizer), output_hidden_states=True)
        second = models.get("text_encoder_2", pipe.text_encoder_2)
        two = second(tokens(pipe.tokenizer_2), output_hidden_states=True)
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        more = dict(text_embeds=two.text_embeds, time_ids=torch.tensor([[64, 64, 0, 0, 64, 64]] * len(x0)))
        out = unet(noised, t, states, added_cond_kwargs=more).sample
    return nn.functional.mse_loss(out, noise)


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("text", ["none", "lora"])
def test_a_step_of_lora_equals_pefts_on_the_published_networks(kind, text, folders):
    """With the same draws, loss to 1e-5 and gradients of all factors to 1e-4 of the largest."""
    system, pipe, batch = nanomed.load(kind, weights=folders[kind]), pipeline(kind, folders[kind]), example()
    system = type(system).published(folders[kind], text_adapter=text)
    system.adapt("unet", 4)
    params = system.trainable("unet")
    torch.manual_seed(7)
    for parameter in params.values():  # B starts at zero, and would leave A without a gradient
        parameter.data += 0.1 * torch.randn_like(parameter)
    models = in_peft(system, pipe, kind)
    torch.manual_seed(4)
    loss = system(batch, "unet", 0)["loss"]
    torch.manual_seed(4)
    expected = published_loss(kind, pipe, models, batch)
    close(loss, expected, 1e-5)
    loss.backward()
    expected.backward()
    theirs = {}
    for part, model in models.items():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                name = name.removeprefix("base_model.model.").replace(".default.", ".")
                prefix = "text_model." if part == "text_encoder" and not name.startswith("text_model.") else ""
                theirs[f"{part}.{prefix}{name}"] = parameter.grad
    used = {name for name, gradient in theirs.items() if gradient is not None}  # SDXL does not read the last layers
    largest = max(theirs[name].abs().max() for name in used)
    assert params.keys() == theirs.keys() and len(used) > 0.8 * len(theirs)
    for name, parameter in params.items():
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        other = theirs[name] if name in used else torch.zeros_like(mine)
        assert (mine - other).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("kind", UNETS)
def test_cached_fields_give_the_same_loss(kind, folders):
    system, batch = nanomed.load(kind, weights=folders[kind]), example()
    frozen = system.frozen("unet")
    assert frozen["image"][0] == "vae" and frozen["text"][0] == " ".join(system.texts)
    fields = frozen["image"][1](batch["image"]) | frozen["text"][1](batch["prompt"])
    losses = []
    for given in (batch, fields):
        torch.manual_seed(6)
        losses.append(system(given, "unet", 0)["loss"])
    close(*losses, 1e-6)
    assert system(system.example("unet", 1, torch.device("cpu")), "unet", 0)["loss"].isfinite()


def test_sdxl_is_told_the_true_sizes(folders):
    """The loss of a batch with "sizes" is that of the network called with them as `time_ids`; without, that of images
    that are whole. Both differ."""
    system = nanomed.load("sdxl", weights=folders["sdxl"])
    generator = torch.Generator().manual_seed(2)
    batch = {"image": torch.rand(2, 3, 48, 80, generator=generator) * 2 - 1, "prompt": ["a polyp", "box"]}
    told = torch.tensor([[576, 720, 0, 6, 48, 80], [1080, 1920, 3, 0, 48, 80]])
    whole = torch.tensor([[48, 80, 0, 0, 48, 80]] * 2)
    losses = {}
    with torch.no_grad():
        text = system.encode_text(batch["prompt"])
        for name, given in (("true", batch | {"sizes": told}), ("whole", batch)):
            torch.manual_seed(6)
            losses[name] = system(given, "unet", 0)["loss"]
            ids = given.get("sizes", whole)
            torch.manual_seed(6)
            x0 = system.latents(batch)

            def predict(x, t, ids=ids):
                return system.unet(x, t, text["prompt_embeds"], text["text_embeds"], ids)

            close(losses[name], system.denoising_loss(predict, x0), 1e-6)
    assert abs(losses["true"] - losses["whole"]) > 1e-4 * losses["whole"]


def test_min_snr_weights_the_loss(folders):
    losses = []
    for gamma in (0.0, 0.5):
        system = StableDiffusion.published(folders["sd15"], snr_gamma=gamma)
        torch.manual_seed(8)
        losses.append(system(example(1), "unet", 0)["loss"])
    torch.manual_seed(8)
    torch.randn(1, 4, 8, 8)
    t = torch.randint(1000, (1,))
    weight = system.diffusion.min_snr_weight(t, 0.5)[0]
    assert weight < 0.99
    close(losses[1], losses[0] * weight, 1e-6)


@pytest.mark.parametrize("text", ["none", "dora"])
def test_a_trained_system_is_saved_and_read_again(text, folders, tmp_path):
    """The adapters alone, as PEFT folders, on the published folder; what is read draws the same images."""
    system = systems.build("sd15", str(folders["sd15"]), text_adapter=text)
    system.adapt("unet", 2)
    for parameter in system.trainable("unet").values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    system.eval()
    system.save(tmp_path / "model")
    written = {path.name for path in (tmp_path / "model").glob("*/")}
    assert written == {"unet_lora"} | ({"text_encoder_lora"} if text == "dora" else set())
    if text == "dora":
        said = [json.loads((tmp_path / f"model/{part}_lora/adapter_config.json").read_text())["use_dora"]
                for part in ("text_encoder", "unet")]  # fmt: skip
        assert said == [True, False]
    again = nanomed.load(tmp_path / "model")
    assert not any(lora.adapted(part) for part in again.children()) and again.config() == system.config()
    found, expected = (ours("sd15", s, **SETTINGS) for s in (again, system))
    assert excess(found, expected) <= 1


@pytest.mark.parametrize("kind, counts", {"sd14": (199_296, 73_728), "sdxl": (1_451_520, 73_728 + 327_680)}.items())
def test_the_published_shapes_and_adapters_without_a_file(kind, counts):
    """What trains per rank: the U-Net's attention, and that of the text encoders."""
    system = systems.build(kind, random=True, text_adapter="lora", dtype=torch.bfloat16)
    system.adapt("unet", 8)
    params = system.trainable("unet")
    sizes = [sum(p.numel() for name, p in params.items() if name.startswith(part)) for part in ("unet", "text")]
    assert sizes == [8 * count for count in counts]
    assert system.size == {"sd14": 512, "sdxl": 1024}[kind]
