"""The Hunyuan-DiT system from prompts to pixels against diffusers' HunyuanDiTPipeline, on miniature checkpoints.

As in test_pixart_pipeline.py, the last layer of the miniatures is fitted, in closed form, to predict v in latents of
unit variance: a network of random weights sends the sampler to latents so large that any decoder sees noise. The draws
of our sampler, one a step, are replayed by diffusers' scheduler.
"""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from conftest import close
from diffusers.pipelines.hunyuandit import pipeline_hunyuandit as published
from diffusers.schedulers import scheduling_ddpm
from manifests import names_and_shapes
from PIL import Image
from torch import Tensor, nn

import nanomed
import train
from nanomed import systems, weights
from nanomed.adapters import lora
from nanomed.data import Row, Table
from nanomed.run import runs
from nanomed.run.ranks import ALONE
from nanomed.systems.hunyuan import Hunyuan
from nanomed.systems.sizes import STANDARD, standard
from nanomed.text.unigram import train_unigram
from nanomed.text.wordpiece import train_wordpiece
from nanomed.training import caches

PROMPTS = ["An endoscopic image of a POLYP in the left part, shiny and wet.", "皮肤镜图像：a melanoma."]
LATENTS, IMAGES = 1e-5, 1e-4  # tolerances: final latents, relative in norm; images before they are clamped
STEPS = 8
VERSIONS = {"v1.1": (True, 0.03), "v1.2": (False, 0.018)}  # sizes and style among the conditions; where the betas end

# name -> version, height, width, resolution binning, negative prompts
CASES = {
    "v1.1 square": ("v1.1", 96, 96, False, None),
    "v1.1 wide": ("v1.1", 64, 160, False, ["blurred", ""]),
    "v1.2 tall": ("v1.2", 160, 96, False, ["blurred", ""]),
    "v1.2 square": ("v1.2", 128, 128, False, None),
}


@torch.no_grad()
def fitted(transformer: nn.Module, beta_end: float) -> None:
    """Least squares for the last layer: from what it sees at noised normal latents to their v."""
    transformer.pos_embed.proj.weight *= 10
    transformer.pos_embed.proj.bias.copy_(torch.tensor([30.0, -30.0]).repeat(24))
    torch.manual_seed(1)
    abars = torch.cumprod(1 - torch.linspace(0.00085**0.5, beta_end**0.5, 1000) ** 2, 0)
    c, seen, asked = transformer.config, [], []
    hook = transformer.proj_out.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].flatten(0, 1)))
    for rows, height, width in [(32, 12, 12), (32, 8, 20), (32, 20, 12), (16, 16, 16)]:
        t = torch.randint(0, 1000, (rows,))
        abar = abars[t].view(-1, 1, 1, 1)
        noise, x0 = torch.randn(rows, 4, height, width), 0.6 * torch.randn(rows, 4, height, width)
        grid = height // 2, width // 2
        turns = published.get_2d_rotary_pos_embed(24, published.get_resize_crop_region_for_grid(grid, 32), grid,
                                                  output_type="pt")  # fmt: skip
        sizes = torch.tensor([[1024.0, 1024, 8 * height, 8 * width, 0, 0]] * rows)
        transformer(
            abar.sqrt() * x0 + (1 - abar).sqrt() * noise, t.float(), torch.randn(rows, 77, c.cross_attention_dim),
            torch.ones(rows, 77), torch.randn(rows, 256, c.cross_attention_dim_t5), torch.ones(rows, 256), sizes,
            torch.zeros(rows, dtype=torch.int64), turns,
        )  # fmt: skip
        v = abar.sqrt() * noise - (1 - abar).sqrt() * x0
        patches = v.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1)  # (rows, h, w, p, p, 4)
        asked.append(patches.reshape(-1, 16))
    hook.remove()
    features = torch.cat(seen).double()
    features = torch.cat([features[:, 1:], torch.ones(len(features), 1)], 1)
    found = torch.linalg.lstsq(features, torch.cat(asked).double()).solution
    weight = transformer.proj_out.weight.view(2, 2, 8, -1)
    weight[:, :, :4] = torch.cat([torch.zeros(1, 16), found[:-1]]).T.view(2, 2, 4, -1)
    transformer.proj_out.bias.view(2, 2, 8)[:, :, :4] = found[-1].view(2, 2, 4)


def miniature(folder: Path, version: str) -> Path:
    """A checkpoint in the published layout with the published names: vocab.txt and spiece.model alone."""
    sized, beta_end = VERSIONS[version]
    pieces = train_wordpiece([*PROMPTS, "blurred"], 180)
    pieces.save(folder / "tokenizer")
    tokens = train_unigram([*PROMPTS, "blurred"], 80)
    tokens.save(folder / "tokenizer_2")
    torch.manual_seed(0)
    bert = transformers.BertModel(
        transformers.BertConfig(vocab_size=len(pieces), hidden_size=20, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=32, max_position_embeddings=80)
    )  # fmt: skip
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=len(tokens) + 3, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                              feed_forward_proj="gated-gelu", is_gated_act=True)
    )  # fmt: skip
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=24, hidden_size=48, in_channels=4, patch_size=2, num_layers=4,
        mlp_ratio=4.3637, cross_attention_dim=20, cross_attention_dim_t5=16, pooled_projection_dim=12, sample_size=128,
        use_style_cond_and_image_meta_size=sized,
    ).eval()  # fmt: skip
    fitted(transformer, beta_end)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.13025,
    )  # fmt: skip
    for name, part in dict(transformer=transformer, vae=vae, text_encoder=bert, text_encoder_2=t5).items():
        part.save_pretrained(folder / name)
    diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=beta_end, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="leading", steps_offset=1, clip_sample=False,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {version: miniature(tmp_path_factory.mktemp(version), version) for version in VERSIONS}


class Draws:
    """The same draws for both: the i-th of any shape."""

    def __init__(self, rows: int):
        self.rows, self.drawn = rows, []

    def randn(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(len(self.drawn))
        self.drawn.append(torch.randn(self.rows, *shape, generator=generator))
        return self.drawn[-1]


def watch(vae: nn.Module) -> list[Tensor]:
    """What goes into a decoder and what comes out of it: latents without their factor, images before the clamp."""
    seen = []
    vae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vae.decoder.register_forward_hook(lambda module, inputs, out: seen.append(out))
    return seen


def pipeline(folder: Path) -> published.HunyuanDiTPipeline:
    pipe = published.HunyuanDiTPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=transformers.BertModel.from_pretrained(folder / "text_encoder"),
        tokenizer=transformers.BertTokenizer.from_pretrained(folder / "tokenizer"),
        transformer=diffusers.HunyuanDiT2DModel.from_pretrained(folder / "transformer"),
        scheduler=diffusers.DDPMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        text_encoder_2=transformers.T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=transformers.T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def theirs(folder: Path, monkeypatch, negative=None, size=(96, 96), **options) -> tuple[Tensor, Tensor]:
    """Final latents and images before the clamp of diffusers' pipeline, drawing what `Draws` draws."""
    pipe, noise = pipeline(folder), Draws(2)
    seen = watch(pipe.vae)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: noise.randn(*shape[1:]))
    latents = noise.randn(4, size[0] // 8, size[1] // 8)
    options = dict(num_inference_steps=STEPS, use_resolution_binning=False, output_type="pt") | options
    pipe(PROMPTS, negative_prompt=negative, latents=latents, height=size[0], width=size[1], **options)
    monkeypatch.undo()
    exact = pipe.vae.double().decode(seen[0].double()).sample  # of its own latents: its decoder rounds to 1e-4
    return seen[0] * 0.13025, exact


@torch.no_grad()
def ours(system: Hunyuan, case: str, **changes) -> tuple[Tensor, Tensor, Tensor]:
    _, height, width, binning, negative = CASES[case]
    seen, noise = watch(system.vae), Draws(2)
    options = dict(height=height, width=width, negative_prompts=negative, binning=binning, steps=STEPS) | changes
    images = system.sample(PROMPTS, noise, **options)
    return seen[0] * 0.13025, seen[1], images


def errors(out: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[float, float]:
    """Of the latents, relative in norm, and of the images before the clamp, as `close` has it."""
    latents, images = ((a.double(), b.double()) for a, b in zip(out[:2], expected[:2]))
    of_images = (images[0] - images[1]).abs().max() / max(1.0, images[1].abs().max())
    return ((latents[0] - latents[1]).norm() / latents[1].norm()).item(), of_images.item()


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.fixture(scope="module")
def expected(folders) -> dict[str, tuple[Tensor, Tensor]]:
    """What diffusers makes of every case."""
    with pytest.MonkeyPatch.context() as patch:
        return {name: theirs(folders[case[0]], patch, case[4], case[1:3]) for name, case in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_prompts_to_pixels_equal_diffusers(case, folders, expected):
    """Three shapes, both versions, with negative prompts and without: latents to 1e-5, pixels to 1e-4."""
    out = ours(nanomed.load("hunyuan", weights=folders[CASES[case][0]]), case)
    latents, images = errors(out, expected[case])
    assert 0.5 < expected[case][0].std() < 2 and expected[case][1].std() > 0.1
    assert latents <= LATENTS and images <= IMAGES, (latents, images)
    close(out[2], (expected[case][1] / 2 + 0.5).clamp(0, 1), IMAGES)


ERRORS = ["vae", "null text", "steps", "guidance", "padding", "zeros at padding", "sizes", "prediction", "schedule"]


@pytest.mark.parametrize("error", ERRORS)
def test_the_comparison_sees_planted_errors(error, folders, expected):
    """Another VAE's factor, a null text that is not "", a step less, 2% more guidance, T5's mask left out or its states
    zeroed at padding, another size said to v1.1, epsilon in the place of v, the betas of the other version: each
    exceeds one of the two tolerances tenfold."""
    case = "v1.1 square"
    system = nanomed.load("hunyuan", weights=folders["v1.1"])
    read = system.encode_text
    if error == "vae":
        system.vae.scale = 0.18215
    if error == "padding":
        system.encode_text = lambda prompts: read(prompts) | {"t5_mask": torch.ones(len(prompts), 256) > 0}
    if error == "zeros at padding":
        system.encode_text = lambda prompts: (text := read(prompts)) | {"t5": text["t5"] * text["t5_mask"][..., None]}
    if error == "sizes":
        sizes_of = system.transformer.sizes_of
        system.transformer.sizes_of = lambda height, width, rows: sizes_of(height, width + 16, rows)
    if error == "prediction":
        system.diffusion.prediction = "epsilon"
    if error == "schedule":
        system.diffusion = nanomed.load("hunyuan", weights=folders["v1.2"]).diffusion
    changes = {"null text": dict(negative_prompts=["a", "a"]), "steps": dict(steps=7), "guidance": dict(guidance=5.1)}
    latents, images = errors(ours(system, case, **changes.get(error, {})), expected[case])
    assert latents > 10 * LATENTS or images > 10 * IMAGES


def test_a_guidance_of_1_leaves_the_null_text_out(folders, monkeypatch):
    rows, system = [], nanomed.load("hunyuan", weights=folders["v1.2"])
    system.transformer.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
    out = ours(system, "v1.2 square", guidance=1.0)
    expected = theirs(folders["v1.2"], monkeypatch, size=(128, 128), guidance_scale=1.0)
    assert rows == [2] * STEPS and errors(out, expected)[0] <= LATENTS


def test_other_sizes_go_through_those_of_the_training(folders, monkeypatch):
    """The table is diffusers' at every size; an image is drawn at its entry, as diffusers does, and then cropped."""
    sizes = [size for several in STANDARD.values() for size in several]
    assert {(width, height) for height, width in sizes} == set(published.SUPPORTED_SHAPE)
    for height in range(64, 2400, 97):
        for width in range(64, 2300, 89):
            rounded = width // 16 * 16, height // 16 * 16
            assert standard(height, width)[::-1] == tuple(published.map_to_standard_shapes(*rounded)), (height, width)
    system, noise = nanomed.load("hunyuan", weights=folders["v1.2"]), Draws(1)
    seen = []
    system.transformer.forward = lambda x, t, **_: seen.append(x.shape) or torch.cat([x, x], 1)
    system.decode = lambda latents: latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        assert system.sample(["a"], noise, steps=1, height=300, width=530).shape == (1, 3, 300, 530)
        assert system.sample(["a"], noise, steps=1, height=96, width=64, binning=False).shape == (1, 3, 96, 64)
    assert [tuple(shape[2:]) for shape in seen] == [(96, 160), (12, 8)] and system.size == 1024
    with pytest.raises(ValueError, match="72 x 64: sides must be multiples of 16"):
        system.sample(["a"], noise, height=72, width=64, binning=False)
    with pytest.raises(ValueError, match="1 negative prompts for 2 prompts"):
        system.sample(["a", "b"], noise, negative_prompts=["c"])


def test_text_is_read_as_the_pipeline_does(folders):
    """Word for word; 77 and 256 tokens with their masks, rows of padding included; each distinct text once."""
    system, pipe, calls = nanomed.load("hunyuan", weights=folders["v1.2"]), pipeline(folders["v1.2"]), []
    for part in (system.text_encoder, system.text_encoder_2):
        part.register_forward_hook(lambda module, inputs, out: calls.append(tuple(out.shape[:2])))
    prompts = [*PROMPTS, "", "long " * 200, PROMPTS[0]]
    with torch.no_grad():
        text = system.encode_text(prompts)
        for index, name, length in ((0, "bert", 77), (1, "t5", 256)):
            states, _, mask, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False,
                                                    text_encoder_index=index)  # fmt: skip
            assert torch.equal(text[f"{name}_mask"], mask.bool()) and mask.shape == (5, length)
            close(text[name], states, 1e-5)
    assert calls == [(4, 77), (4, 256)]


# ------------------------------------------------------------------------------------------------------------- training


def example(rows: int = 2) -> dict:
    draw = torch.Generator().manual_seed(2)
    return {"image": torch.rand(rows, 3, 64, 96, generator=draw) * 2 - 1, "prompt": PROMPTS[:rows]}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_lora_step_equals_the_reference(version, folders):
    """The loss, the gradient of every adapter, and the adapters after a step, against peft on diffusers'
    network with the scheduler's own v."""
    import peft

    system, pipe, batch = nanomed.load("hunyuan", weights=folders[version]), pipeline(folders[version]), example()
    system.adapt("transformer", rank=2)
    with torch.no_grad():
        for param in lora.parameters(system.transformer):
            param += 0.1 * torch.randn_like(param)
    params = system.trainable("transformer")
    assert all(".lora_" in name for name in params)
    settings = peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(lora.ATTENTION))
    adapted = peft.get_peft_model(pipe.transformer, settings).eval()
    keys = {f"base_model.model.{name}": tensor.clone() for name, tensor in lora.state(system.transformer).items()}
    assert not peft.set_peft_model_state_dict(adapted, keys).unexpected_keys

    torch.manual_seed(4)
    loss = system(batch, "transformer", 0)["loss"]
    torch.manual_seed(4)
    with torch.no_grad():
        posterior = pipe.vae.encode(batch["image"]).latent_dist
        x0 = (posterior.mean + posterior.std * torch.randn(posterior.mean.shape)) * 0.13025
        t = torch.randint(1000, (2,))
        noise = torch.randn(x0.shape)
        text = [pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, text_encoder_index=i) for i in (0, 1)]
    turns = published.get_2d_rotary_pos_embed(24, published.get_resize_crop_region_for_grid((4, 6), 32), (4, 6),
                                              output_type="pt")  # fmt: skip
    out = adapted(
        pipe.scheduler.add_noise(x0, noise, t), t.float(), text[0][0], text[0][2], text[1][0], text[1][2],
        torch.tensor([[1024.0, 1024, 64, 96, 0, 0]] * 2), torch.zeros(2, dtype=torch.int64), turns,
    ).sample  # fmt: skip
    expected = nn.functional.mse_loss(out.chunk(2, 1)[0], pipe.scheduler.get_velocity(x0, noise, t))
    close(loss, expected, 1e-5)

    loss.backward()
    expected.backward()
    reference = {name.replace(".default", "").removeprefix("base_model.model."): p
                 for name, p in adapted.named_parameters() if ".lora_" in name}  # fmt: skip
    mine = {name.removeprefix("transformer."): p for name, p in params.items()}
    assert mine.keys() == reference.keys()
    largest = max(p.grad.abs().max() for p in reference.values())
    for name, param in mine.items():
        assert (param.grad - reference[name].grad).abs().max() <= 1e-4 * largest, name
    for several in (mine, reference):
        torch.optim.SGD(several.values(), lr=0.1).step()
    for name, param in mine.items():
        close(param, reference[name], 1e-5)


def test_the_published_adapter_has_the_known_size():
    """870,400 parameters a rank, on the tensors of the manifest."""
    published_names = names_and_shapes("lora/hunyuan_v1_1_attn_r4")
    with torch.device("meta"):
        transformer = weights.build(Hunyuan.parts["transformer"].make)
        lora.inject(transformer, 4, None, Hunyuan.adapters["transformer"])
    found = {name: tuple(tensor.shape) for name, tensor in lora.state(transformer).items()}
    prefix = next(iter(published_names)).split("blocks.")[0]
    assert {f"{prefix}{name}": shape for name, shape in found.items()} == published_names
    assert sum(p.numel() for p in lora.parameters(transformer)) == 4 * 870_400


def test_cached_fields_give_the_same_loss(folders):
    """Both readers are named, so that a cache knows the weights of both."""
    system, batch = nanomed.load("hunyuan", weights=folders["v1.1"]), example()
    frozen = system.frozen("transformer")
    fields = frozen["image"][1](batch["image"]) | frozen["text"][1](batch["prompt"])
    assert frozen["image"][0] == "vae" and frozen["text"][0] == "text_encoder text_encoder_2"
    losses = []
    for given in (batch, fields):
        torch.manual_seed(6)
        losses.append(system(given, "transformer", 0)["loss"])
    close(*losses, 1e-6)
    small = Hunyuan.published(folders["v1.1"], size=64)
    assert small(small.example("transformer", 2, torch.device("cpu")), "transformer", 0)["loss"].isfinite()


def test_a_cache_of_texts_knows_the_weights_of_both_readers(folders, tmp_path):
    """With another mT5, what is kept of a prompt is made anew; with the same two it is not."""
    system, made = nanomed.load("hunyuan", weights=folders["v1.2"]), []
    system.text_encoder_2.register_forward_hook(lambda module, inputs, out: made.append(1))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    table = Table("one", (Row(tmp_path / "a.png", ("a polyp",)),))
    config = SimpleNamespace(views=0, cache=tmp_path / "cache", seed=0, dropout=None, augment=False, strategy="add",
                             paraphrases="", accumulate=1, batch=1)  # fmt: skip
    kept = []
    for factor in (1.0, 1.0, 2.0):
        system.text_encoder_2.shared.weight.data *= factor
        batches = caches.batches(config, system, "transformer", table, ALONE)
        kept.append(batches[0])
        batches.close()
    assert made == [1, 1] and kept[0].keys() == {"prompt", "image", *Hunyuan.text_fields}
    assert torch.equal(kept[0]["t5"], kept[1]["t5"]) and not torch.equal(kept[1]["t5"], kept[2]["t5"])
    assert kept[0]["t5"].shape == (1, 256, 16) and kept[0]["bert"].shape == (1, 77, 20)


# -------------------------------------------------------------------------------------------------------------- folders


def test_half_precision(folders, expected):
    """All parts in bfloat16, the sampler and the images in float32."""
    system = nanomed.load("hunyuan", weights=folders["v1.1"], dtype=torch.bfloat16)
    assert {p.dtype for p in system.parameters()} == {torch.bfloat16}
    out = ours(system, "v1.1 square")
    assert errors(out, expected["v1.1 square"])[0] < 0.5 and out[2].dtype == torch.float32


def test_other_forms_of_the_same_folder(folders, tmp_path):
    """As `pipe.save_pretrained` writes it: shards, and tokenizer.json in the place of vocab.txt and spiece.model."""
    pipeline(folders["v1.1"]).save_pretrained(tmp_path, max_shard_size="60KB")
    assert list(tmp_path.glob("*/*-of-*.safetensors")) and (tmp_path / "tokenizer/tokenizer.json").is_file()
    for name in ("tokenizer/vocab.txt", "tokenizer_2/spiece.model"):
        (tmp_path / name).unlink(missing_ok=True)
    both = (nanomed.load("hunyuan", weights=folder) for folder in (tmp_path, folders["v1.1"]))
    out, expected = (ours(system, "v1.1 square", steps=2) for system in both)
    assert all(torch.equal(a, b) for a, b in zip(out, expected))


def test_what_does_not_belong_together_is_refused(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["v1.2"], tmp_path / "mixed")
    path = tmp_path / "mixed" / "scheduler" / "scheduler_config.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps(stated | dict(_class_name="DPMSolverMultistepScheduler")))
    with pytest.raises(weights.WeightsError, match="sampled by DDPMScheduler, not by DPMSolverMultistepScheduler"):
        nanomed.load("hunyuan", weights=tmp_path / "mixed")
    path.write_text(json.dumps(stated))
    shutil.rmtree(tmp_path / "mixed" / "text_encoder")
    other = transformers.BertModel(transformers.BertConfig(vocab_size=180, hidden_size=24, num_hidden_layers=1,
                                                           num_attention_heads=2, intermediate_size=32))  # fmt: skip
    other.save_pretrained(tmp_path / "mixed" / "text_encoder")
    with pytest.raises(weights.WeightsError, match=r"of \(20, 16, 4\) channels, not of \(24, 16, 4\)"):
        nanomed.load("hunyuan", weights=tmp_path / "mixed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match="hf download Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers"):
        nanomed.load("hunyuan")


def test_a_run_on_a_published_folder(folders, tmp_path, monkeypatch):
    """train.py in bfloat16 with the recipe's rank, both readers' states cached; what it leaves is an adapter that draws
    on the same folder."""
    words = ["train.py", "--model", "hunyuan", "--weights", str(folders["v1.1"]), "--data", "toy:6", "--size", "64",
             "--steps", "1", "--save_every", "1", "--score_images", "0", "--valid", "0.2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")])
    sample, shape = Hunyuan.sample, (3, 64, 64)
    monkeypatch.setattr(Hunyuan, "sample", lambda self, prompts, noise, **_: torch.zeros(len(prompts), *shape))
    assert train.main() == 0
    monkeypatch.setattr(Hunyuan, "sample", sample)
    run = runs.newest(tmp_path / "runs")
    about = json.loads((run / "model" / "transformer_lora" / "adapter_config.json").read_text())
    assert about["r"] == about["lora_alpha"] == 64 and set(about["target_modules"]) == {*lora.ATTENTION}
    system = nanomed.load(run, weights=folders["v1.1"])
    assert system.size == 64 and system.base == str(folders["v1.1"].absolute())
    with torch.no_grad():
        assert system.sample(["a polyp"], Draws(1), steps=2).shape == (1, *shape)


SMALL = dict(
    transformer=dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=4, patch_size=1,
                     cross_attention_dim=16, cross_attention_dim_t5=16, text_len=12, text_len_t5=10),
    text_encoder=dict(vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=32),
    text_encoder_2=dict(vocab_size=200, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
    vae=dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4), steps=2,
)  # fmt: skip


@pytest.mark.parametrize("form", ["adapter", "from nothing"])
def test_a_trained_system_is_saved_and_read_again(form, folders, tmp_path):
    """On a published base the adapter alone; without one, everything, with the scale of its latents."""
    torch.manual_seed(0)
    if form == "adapter":
        system = systems.build("hunyuan", str(folders["v1.1"]), size=64)
        system.adapt("transformer", rank=2)
        for param in lora.parameters(system.transformer):
            param.data += 0.1 * torch.randn_like(param)
    else:
        system = systems.build("hunyuan-tiny", **SMALL)
        assert list(system.stages) == ["vae", "base", "transformer"] and system.size == 8
        batch = {"image": torch.rand(2, 3, 8, 8) * 2 - 1, "prompt": PROMPTS}
        for stage in ("vae", "base"):
            params = system.trainable(stage)
            before = system(batch, stage, 0)["loss"]
            before.backward()
            assert all(param.grad is not None for param in params.values())
        with torch.no_grad():
            std = system.finish("vae", [batch["image"]])["latent_std"]
        assert system.vae.scale == 1 / std == system.config()["vae"]["scaling_factor"]
    system.eval()
    system.save(tmp_path)
    written = {"adapter": {"transformer_lora"}, "from nothing": {"transformer", "text_encoder", "text_encoder_2", "vae",
                                                                  "tokenizer", "tokenizer_2"}}  # fmt: skip
    assert {path.name for path in tmp_path.glob("*/")} == written[form]
    again = nanomed.load(tmp_path)
    assert again.config() == system.config() and not any(lora.adapted(part) for part in again.children())
    side = dict(height=32, width=32) if form == "adapter" else {}
    with torch.no_grad():
        images = [s.sample(PROMPTS, Draws(2), steps=2, binning=False, **side) for s in (system, again)]
    close(images[1], images[0], 1e-4)
    if form == "from nothing":
        other = systems.build("hunyuan-tiny", **SMALL)
        other.resume("vae", tmp_path)
        assert other.vae.scale == system.vae.scale
