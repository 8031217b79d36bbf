"""Stable Diffusion's U-Net against diffusers on random weights that `save_pretrained` wrote, the published names,
shapes and adapter sizes, and what a config may ask for."""

import json
from functools import cache

import diffusers
import pytest
import torch
import transformers
from conftest import close, load_kohya
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from manifests import about, config, names_and_shapes
from safetensors.torch import load_file, save_file

from nanomed import weights
from nanomed.adapters import formats, lora
from nanomed.denoisers.stable_diffusion import StableDiffusionConfig, StableDiffusionUNet, load_stable_diffusion
from nanomed.diffusion import samplers
from nanomed.diffusion.guidance import guided
from nanomed.diffusion.process import Diffusion
from nanomed.text.clip import ClipText, ClipTextConfig
from nanomed.text.tokenizers import ClipTokenizer, train_bpe

COMMON = dict(in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=8)
SD1 = COMMON | dict(
    block_out_channels=(32, 48, 64, 64), cross_attention_dim=24, attention_head_dim=8, sample_size=16,
    down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
)  # fmt: skip
SDXL = COMMON | dict(
    block_out_channels=(32, 48, 64), cross_attention_dim=40, attention_head_dim=(2, 3, 4), sample_size=16,
    down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2), transformer_layers_per_block=(1, 2, 3),
    up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
)  # fmt: skip
MINIATURES = {"sd1": SD1, "sdxl": SDXL}


@cache
def folder(name: str, tmp: str) -> str:
    """A U-Net of diffusers' with nothing at its trivial start, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    reference = UNet2DConditionModel(**MINIATURES[name])
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    reference.save_pretrained(tmp)
    return tmp


@pytest.fixture(params=MINIATURES)
def pair(request, tmp_path_factory):
    """Both read the same folder: diffusers' network and ours."""
    path = folder(request.param, str(tmp_path_factory.getbasetemp() / request.param))
    return UNet2DConditionModel.from_pretrained(path).eval(), load_stable_diffusion(path)


def inputs(unet: StableDiffusionUNet, height: int = 16, width: int = 8, dtype: torch.dtype = torch.float32) -> dict:
    torch.manual_seed(1)
    c = unet.config
    given = dict(x=torch.randn(2, 4, height, width), prompt_embeds=torch.randn(2, 11, c.cross_attention_dim))
    if c.addition_embed_type:
        sizes = [[512, 700, 0, 16, 1024, 1024], [128, 64, 3, 0, 128, 64]]
        given |= dict(text_embeds=torch.randn(2, 16), time_ids=torch.tensor(sizes, dtype=torch.float32))
    return {name: value.to(dtype) for name, value in given.items()} | {"t": torch.tensor([981, 21])}


def run_reference(reference, x, t, prompt_embeds, text_embeds=None, time_ids=None):
    added = {"text_embeds": text_embeds, "time_ids": time_ids}
    return reference(x, t, prompt_embeds, added_cond_kwargs=added if time_ids is not None else None).sample


def gradients(network, out, given: dict) -> dict[str, torch.Tensor]:
    """Of parameters and floating-point inputs, by name, for one fixed probe of the output."""
    torch.manual_seed(2)
    (out * torch.randn(out.shape).to(out.dtype)).sum().backward()
    found = {name: p.grad for name, p in network.named_parameters()}
    return found | {f"input {name}": v.grad for name, v in given.items() if v.requires_grad}


@pytest.mark.parametrize(
    "dtype, of_outputs, of_gradients", [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-10, 1e-10)]
)
@pytest.mark.parametrize("height, width", [(16, 8), (10, 9)])  # sides that halve, and some that are rounded up
def test_unet_equals_diffusers(pair, height, width, dtype, of_outputs, of_gradients):
    reference, ours = (network.to(dtype) for network in pair)
    outs, grads = [], []
    for network, run in ((reference, run_reference), (ours, StableDiffusionUNet.__call__)):
        given = inputs(ours, height, width, dtype)
        for name in given.keys() - {"t", "time_ids"}:
            given[name].requires_grad_()
        outs.append(run(network, **given))
        grads.append(gradients(network, outs[-1], given))
    close(outs[1], outs[0], of_outputs)
    assert grads[0].keys() == grads[1].keys()
    largest = max(g.abs().max().item() for g in grads[0].values())
    for name, gradient in grads[0].items():
        assert (grads[1][name] - gradient).abs().max().item() <= of_gradients * largest, name


def test_text_that_was_read_once_gives_the_same(pair):
    """To rounding: keys and values, and of SDXL the sum of pooled text and sizes."""
    _, ours = pair
    given = inputs(ours)
    conditions = {name: given[name] for name in given.keys() - {"x", "t"}}
    with torch.no_grad():
        read = ours.read_text(**conditions)
        assert all(len(value) == 2 for value in read.values())
        close(ours(given["x"], given["t"], **read), ours(**given), 1e-6)


def test_each_input_matters(pair):
    """Every one moves the output by far more than the tolerance, each of the six sizes too."""
    _, ours = pair
    given = inputs(ours)
    with torch.no_grad():
        base = ours(**given)
        for name in given:
            changed = given | {name: given[name] + (1 if name == "t" else 0.1)}
            if name != "time_ids":
                assert (ours(**changed) - base).abs().max() > 2e-4, name
        for i in range(6 if "time_ids" in given else 0):
            sizes = given["time_ids"].clone()
            sizes[:, i] += 8
            assert (ours(**given | {"time_ids": sizes}) - base).abs().max() > 2e-4, i


def test_checkpointing_changes_no_gradient(pair):
    _, ours = pair
    found = []
    for ours.checkpointing in (False, True):
        ours.zero_grad()
        found.append(gradients(ours, ours(**inputs(ours)), {}))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_bfloat16_is_close_and_stays_bfloat16(pair):
    _, ours = pair
    with torch.no_grad():
        expected, half = ours(**inputs(ours)), ours.bfloat16()(**inputs(ours, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.1)


# --------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("component", ["sd14_unet", "sd15_unet", "sdxl_unet"])
def test_published_names_and_shapes_load_strictly(component, tmp_path):
    """Built from the published config and from nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(config(component)))
    module = weights.build(StableDiffusionUNet, StableDiffusionConfig.from_json(tmp_path))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in names_and_shapes(component).items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    assert sum(p.numel() for p in module.parameters()) == about(component)["params"]


def published(component: str) -> torch.nn.Module:
    stated = config(component)
    if component.endswith("unet"):
        names = StableDiffusionConfig.__annotations__
        return weights.build(StableDiffusionUNet, StableDiffusionConfig(**{k: stated[k] for k in stated if k in names}))
    stated = {k: v for k, v in stated.items() if k in ClipTextConfig.__annotations__}
    return weights.build(ClipText, ClipTextConfig(**stated), projection=component.endswith("_2"))


@pytest.mark.parametrize("rank", [1, 4, 128])
@pytest.mark.parametrize(
    "component, each", [("sd14_unet", 199_296), ("sd15_unet", 199_296), ("sdxl_unet", 1_451_520),
                        ("sd15_text_encoder", 73_728), ("sdxl_text_encoder", 73_728), ("sdxl_text_encoder_2", 327_680)]
)  # fmt: skip
def test_adapters_have_the_published_sizes(component, each, rank):
    targets = lora.ATTENTION if component.endswith("unet") else ("q_proj", "k_proj", "v_proj", "out_proj")
    assert sum(p.numel() for p in lora.inject(published(component), rank, targets=targets)) == each * rank


@pytest.mark.parametrize("component", ["sd14_unet", "sd15_unet", "sdxl_unet", "sd15_text_encoder"])
def test_adapters_have_the_published_names(component):
    targets = lora.ATTENTION if component.endswith("unet") else ("q_proj", "k_proj", "v_proj", "out_proj")
    module = published(component)
    lora.inject(module, 4, targets=targets)
    ours = {f"base_model.model.{name}": tuple(tensor.shape) for name, tensor in lora.state(module).items()}
    assert ours == names_and_shapes(f"lora/{component}_r4")


def test_every_setting_at_its_default_is_known(tmp_path):
    """A file of today's diffusers states 50 settings, those of 2022 only a few."""
    UNet2DConditionModel(**SD1).save_config(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    assert len(stated) >= 50
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in SD1.items()}
    assert StableDiffusionConfig.from_json(tmp_path) == StableDiffusionConfig(**given)


@pytest.mark.parametrize(
    "name, value",
    [
        ("flip_sin_to_cos", False), ("freq_shift", 1), ("act_fn", "gelu"), ("class_embed_type", "timestep"),
        ("time_cond_proj_dim", 256), ("num_attention_heads", 8), ("upcast_attention", True),
        ("dual_cross_attention", True),
        ("resnet_time_scale_shift", "scale_shift"), ("addition_embed_type", "image"), ("encoder_hid_dim", 64),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"), ("mid_block_type", None), ("only_cross_attention", True),
        ("down_block_types", ["KDownBlock2D"] * 4), ("layers_per_block", [2, 2, 2, 2]), ("center_input_sample", True),
        ("block_out_channels", [32, 64]), ("attention_head_dim", 7), ("addition_embed_type", "text_time"),
        ("a_setting_of_tomorrow", 3), ("reverse_transformer_layers_per_block", [1, 1, 1, 1]),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(tmp_path, name, value):
    stated = {k: v for k, v in SD1.items()} | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    said = {"block_out_channels": "2 levels", "attention_head_dim": "7 heads", "down_block_types": "KDownBlock2D"}
    says = "text_time" if value == "text_time" else said.get(name, name)
    with pytest.raises(weights.WeightsError, match=says):
        StableDiffusionConfig.from_json(tmp_path)


# ------------------------------------------------------------------------------------------------------------ adapters

EVERYWHERE = (*lora.ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut",
              "time_emb_proj", "conv_in", "conv_out", "linear_1", "linear_2", "downsamplers.0.conv",
              "upsamplers.0.conv")  # fmt: skip


def adapted(ours, targets=EVERYWHERE) -> dict[str, torch.Tensor]:
    """Adapters that do something on all these layers, alpha = rank; a copy of their tensors by their names."""
    torch.manual_seed(3)
    for parameter in lora.inject(ours, 2, targets=targets):
        parameter.data = 0.05 * torch.randn_like(parameter)
    return {name: tensor.clone() for name, tensor in lora.state(ours).items()}


def adapters_equal(ours, tensors: dict[str, torch.Tensor]) -> None:
    state = lora.state(ours)
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


def test_a_diffusers_file_for_all_layers_is_read_by_both(pair, tmp_path):
    """Convolutions, conv_in, conv_out and time_embedding among them, in PEFT's and in the older spelling."""
    reference, ours = pair
    tensors = adapted(ours)
    formats.save_diffusers(tmp_path, {"unet": ours})
    pipeline = StableDiffusionXLPipeline if ours.config.addition_embed_type else StableDiffusionPipeline
    found = pipeline.lora_state_dict(tmp_path, return_lora_metadata=True, unet_config=reference.config)
    pipeline.load_lora_into_unet(found[0], found[1], reference, metadata=found[2])
    with torch.no_grad():
        expected = run_reference(reference, **inputs(ours))
        close(ours(**inputs(ours)), expected, 1e-5)
        lora.remove(ours)
        assert (ours(**inputs(ours)) - expected).abs().max() > 0.05
    older = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for k, t in tensors.items()}
    for written in (tensors, older):
        save_file({f"unet.{key}": tensor for key, tensor in written.items()}, tmp_path / "again.safetensors")
        formats.load_diffusers(tmp_path / "again.safetensors", {"unet": ours})
        adapters_equal(ours, tensors)
        lora.remove(ours)


def test_a_kohya_file_for_all_layers_comes_back(pair, tmp_path):
    """LoCon: adapters on convolutions, the ends and the embeddings too."""
    _, ours = pair
    tensors = adapted(ours)
    formats.save_kohya(tmp_path / "a.safetensors", {"unet": ours})
    written = load_file(tmp_path / "a.safetensors")
    assert written["lora_unet_conv_in.lora_down.weight"].shape == (2, 4, 3, 3)
    assert written["lora_unet_time_embedding_linear_1.alpha"].item() == 2
    lora.remove(ours)
    load_kohya(tmp_path / "a.safetensors", {"unet": ours})
    adapters_equal(ours, tensors)


# The first of SDXL's layers of each kind in Stability's names, by hand; its second level is input_blocks 4 to 6.
BY_HAND = {
    "conv_in": "input_blocks_0_0",
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.resnets.1.time_emb_proj": "input_blocks_2_0_emb_layers_1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.transformer_blocks.2.ff.net.2": "input_blocks_8_1_transformer_blocks_2_ff_net_2",
    "mid_block.resnets.0.conv2": "middle_block_0_out_layers_3",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
    "up_blocks.0.attentions.2.transformer_blocks.1.attn2.to_k": "output_blocks_2_1_transformer_blocks_1_attn2_to_k",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.resnets.0.conv_shortcut": "output_blocks_3_0_skip_connection",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.2.resnets.2.conv2": "output_blocks_8_0_out_layers_3",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
    "conv_out": "out_2",
}


def kohya_file(path, tensors: dict[str, torch.Tensor], spell) -> None:
    """Kohya's keys for adapter tensors, each layer's name as `spell` has it."""
    written = {}
    for name, tensor in tensors.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        key = f"lora_unet_{spell(layer)}"
        written[f"{key}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[factor] }.weight"] = tensor
        written[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(written, path)


@pytest.fixture
def sdxl(tmp_path_factory):
    path = folder("sdxl", str(tmp_path_factory.getbasetemp() / "sdxl"))
    return UNet2DConditionModel.from_pretrained(path).eval(), load_stable_diffusion(path)


def test_stabilitys_block_names_are_read(sdxl, tmp_path):
    """As the file is written by hand, to the bit; and diffusers' converter reads the same of it."""
    reference, ours = sdxl
    tensors = adapted(ours, targets=tuple(BY_HAND))
    assert {name.split(".lora_")[0] for name in tensors} == BY_HAND.keys()
    kohya_file(tmp_path / "a.safetensors", tensors, BY_HAND.__getitem__)
    lora.remove(ours)
    load_kohya(tmp_path / "a.safetensors", {"unet": ours})
    adapters_equal(ours, tensors)
    found = StableDiffusionXLPipeline.lora_state_dict(tmp_path / "a.safetensors", unet_config=reference.config)
    StableDiffusionXLPipeline.load_lora_into_unet(*found[:2], reference)
    with torch.no_grad():
        close(ours(**inputs(ours)), run_reference(reference, **inputs(ours)), 1e-5)


@pytest.mark.parametrize("component", ["sd15_unet", "sdxl_unet"])
def test_stabilitys_names_of_the_published_networks_are_as_many_as_layers(component):
    """No two layers share a name, and the levels end where the authors' networks end."""
    layers = lora.adaptable(published(component))
    names = formats._stability_names(layers)
    assert names.keys() == set(layers) and len(set(names.values())) == len(layers)
    said = {".".join(name.split(".")[:2]) for name in names.values() if name.startswith(("input", "output"))}
    blocks = {"sd15_unet": 12, "sdxl_unet": 9}[component]
    assert said == {f"{side}_blocks.{i}" for side in ("input", "output") for i in range(blocks)}
    if component == "sd15_unet":  # the innermost level reads no text, so its upsampler stands second, not third
        assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
        assert names["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"


def test_a_block_that_the_network_has_not_is_refused(sdxl, tmp_path):
    _, ours = sdxl
    tensors = adapted(ours, targets=("conv_in",))
    lora.remove(ours)
    kohya_file(tmp_path / "a.safetensors", tensors, lambda _: "input_blocks_9_1_proj_in")
    with pytest.raises(weights.WeightsError, match="input_blocks_9_1_proj_in"):
        load_kohya(tmp_path / "a.safetensors", {"unet": ours})


def test_sdxl_without_its_conditions_says_which(tmp_path_factory):
    ours = load_stable_diffusion(folder("sdxl", str(tmp_path_factory.getbasetemp() / "sdxl")))
    given = inputs(ours)
    with pytest.raises(ValueError, match="time_ids"):
        ours(given["x"], given["t"], given["prompt_embeds"])


# ---------------------------------------------------------------------------------------------------- prompt to latents

PROMPTS = ["a polyp in the colon!", "no finding"]
NEGATIVE = ["a blurred image", ""]
SCHEDULER = dict(beta_start=0.000085, beta_end=0.0012, beta_schedule="scaled_linear", steps_offset=1,
                 clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading")  # fmt: skip
# A tenth of the published betas: a random network's latents then stay near 1 and hide no error.
STEPS = 5


def tower(tokenizer: ClipTokenizer, width: int, act: str, projection: int | None):
    settings = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=77, hidden_act=act, projection_dim=projection or 16, bos_token_id=0, eos_token_id=2,
        pad_token_id=1,
    )  # fmt: skip
    make = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    reference = make(settings).eval()
    for parameter in reference.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    names = ClipTextConfig.__annotations__
    ours = ClipText(ClipTextConfig(**{k: v for k, v in settings.to_dict().items() if k in names}), bool(projection))
    state = dict(reference.state_dict())
    if not projection:
        state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}
    return reference, weights.load(ours, state).eval()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Ours and transformers' of two folders; the second pads with "!"."""
    first, found = train_bpe(PROMPTS + NEGATIVE, merges=20), []
    for pad in ("<|endoftext|>", "!"):
        path = tmp_path_factory.mktemp("tokenizer")
        ClipTokenizer(first.vocab, first.merges, pad).save(path)
        found.append(
            (ClipTokenizer.from_folder(path), transformers.CLIPTokenizer.from_pretrained(path, model_max_length=77))
        )
    assert found[0][0].pad_id != found[1][0].pad_id
    return found


def small_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4,
    ).eval()  # fmt: skip


def latents_of_sd1(parts, prompts, negative, start, guidance: float = 7.5, steps: int = STEPS):
    """Prompt to latents as Stable Diffusion 1.x does it."""
    tokenizer, clip, unet = parts
    diffusion = Diffusion.from_settings(SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "here")

    def read(texts):
        return unet.read_text(clip(tokenizer(texts)[0]))

    denoise = guided(unet, read(prompts), read(negative), guidance)
    return samplers.pndm(denoise, diffusion, start, steps)


def latents_of_sdxl(parts, prompts, negative, start, guidance: float = 5.0, steps: int = STEPS):
    """The same of SDXL; without negative prompts its null is zeros."""
    tokenizers, clips, unet = parts
    diffusion = Diffusion.from_settings(SCHEDULER | {"_class_name": "EulerDiscreteScheduler"}, "here")
    height, width = (8 * side for side in start.shape[2:])
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(start), dtype=torch.float32)

    def embeds(texts):
        both = [clip.features(tokenizer(texts)[0]) for tokenizer, clip in zip(tokenizers, clips)]
        return torch.cat([states.penultimate for states in both], dim=-1), both[1].embeds

    states, pooled = embeds(prompts)
    none = embeds(negative) if negative else (torch.zeros_like(states), torch.zeros_like(pooled))
    denoise = guided(unet, unet.read_text(states, pooled, sizes), unet.read_text(*none, sizes), guidance)
    return samplers.euler(denoise, diffusion, start, steps)


@pytest.fixture
def sd1_pipelines(tokenizers, tmp_path_factory):
    torch.manual_seed(4)
    path = folder("sd1", str(tmp_path_factory.getbasetemp() / "sd1"))
    (ours, theirs), (reference, clip) = tokenizers[0], tower(tokenizers[0][0], 24, "quick_gelu", None)
    pipeline = StableDiffusionPipeline(
        vae=small_vae(), text_encoder=reference, tokenizer=theirs, unet=UNet2DConditionModel.from_pretrained(path),
        scheduler=diffusers.PNDMScheduler(**drop("clip_sample"), skip_prk_steps=True), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, (ours, clip, load_stable_diffusion(path))


@pytest.fixture
def sdxl_pipelines(tokenizers, tmp_path_factory):
    torch.manual_seed(4)
    path = folder("sdxl", str(tmp_path_factory.getbasetemp() / "sdxl"))
    towers = [tower(tokenizers[0][0], 16, "quick_gelu", None), tower(tokenizers[1][0], 24, "gelu", 16)]
    pipeline = StableDiffusionXLPipeline(
        vae=small_vae(), text_encoder=towers[0][0], text_encoder_2=towers[1][0], tokenizer=tokenizers[0][1],
        tokenizer_2=tokenizers[1][1], unet=UNet2DConditionModel.from_pretrained(path),
        scheduler=diffusers.EulerDiscreteScheduler(**drop("clip_sample", "set_alpha_to_one")),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    parts = [tokenizer for tokenizer, _ in tokenizers], [ours for _, ours in towers], load_stable_diffusion(path)
    return pipeline, parts


def drop(*names: str) -> dict:
    return {name: value for name, value in SCHEDULER.items() if name not in names}


def start_noise() -> torch.Tensor:
    return torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@torch.no_grad()
def test_prompts_to_latents_equal_stable_diffusions_pipeline(sd1_pipelines, guidance):
    pipeline, parts = sd1_pipelines
    given = dict(num_inference_steps=STEPS, guidance_scale=guidance, output_type="latent", latents=start_noise())
    expected = pipeline(PROMPTS, negative_prompt=NEGATIVE, height=128, width=64, **given).images
    assert 0.3 < expected.std() < 10
    close(latents_of_sd1(parts, PROMPTS, NEGATIVE, start_noise(), guidance), expected, 1e-5)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
@torch.no_grad()
def test_prompts_to_latents_equal_sdxls_pipeline(sdxl_pipelines, negative):
    pipeline, parts = sdxl_pipelines
    given = dict(num_inference_steps=STEPS, guidance_scale=5.0, output_type="latent", latents=start_noise())
    expected = pipeline(PROMPTS, negative_prompt=negative, height=128, width=64, **given).images
    assert 0.3 < expected.std() < 10
    close(latents_of_sdxl(parts, PROMPTS, negative, start_noise()), expected, 1e-5)


@torch.no_grad()
def test_planted_mistakes_show_tenfold(sd1_pipelines, sdxl_pipelines):
    """A step fewer, a guidance 2% off, the first tokenizer's padding in the second's place, encoded negatives where
    zeros belong."""
    sd1, sdxl, noise = sd1_pipelines[1], sdxl_pipelines[1], start_noise()
    right, right_xl = latents_of_sd1(sd1, PROMPTS, NEGATIVE, noise), latents_of_sdxl(sdxl, PROMPTS, None, noise)
    same_pad = ([sdxl[0][0], sdxl[0][0]], *sdxl[1:])
    for wrong, expected in (
        (latents_of_sd1(sd1, PROMPTS, NEGATIVE, noise, steps=STEPS - 1), right),
        (latents_of_sd1(sd1, PROMPTS, NEGATIVE, noise, guidance=7.65), right),
        (latents_of_sdxl(same_pad, PROMPTS, None, noise), right_xl),
        (latents_of_sdxl(sdxl, PROMPTS, ["", ""], noise), right_xl),
    ):
        assert (wrong - expected).abs().max() > 10 * 1e-5 * max(1, expected.abs().max())
