"""Hunyuan-DiT against diffusers' HunyuanDiT2DModel: outputs, gradients, rotations, adapters and files."""

import json

import diffusers
import pytest
import torch
from conftest import assert_gradients_equal, close
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from manifests import about, config, names_and_shapes
from safetensors.torch import save_file
from torch import Tensor

from nanomed import weights
from nanomed.adapters import formats, lora
from nanomed.denoisers.hunyuan import HunyuanConfig, HunyuanTransformer, load_hunyuan, rotary

SMALL = dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, patch_size=2, num_layers=6, mlp_ratio=4.3637,
             cross_attention_dim=20, cross_attention_dim_t5=16, pooled_projection_dim=12, text_len=7,
             text_len_t5=10, sample_size=16)  # fmt: skip
KINDS = {
    "v1.1": SMALL | dict(use_style_cond_and_image_meta_size=True),
    "v1.2": SMALL | dict(use_style_cond_and_image_meta_size=False),
    "plain": SMALL | dict(use_style_cond_and_image_meta_size=False, num_layers=4, learn_sigma=False),
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def pair(kind: str = "v1.2") -> tuple[diffusers.HunyuanDiT2DModel, HunyuanTransformer]:
    """diffusers' network at its default initialisation, and ours with the same weights."""
    torch.manual_seed(0)
    reference = diffusers.HunyuanDiT2DModel(**KINDS[kind], hidden_size=48).eval()
    ours = HunyuanTransformer(HunyuanConfig(**KINDS[kind]))
    return reference, weights.load(ours, {name: t.clone() for name, t in reference.state_dict().items()}).eval()


def inputs(kind: str = "v1.2", height: int = 16, width: int = 16) -> dict[str, Tensor]:
    """What ours takes, with texts of several lengths."""
    batch = dict(
        x=torch.randn(3, 4, height, width),
        t=torch.tensor([999, 0, 421]),
        bert=torch.randn(3, 7, 20),
        bert_mask=torch.arange(7) < torch.tensor([[7], [2], [4]]),
        t5=torch.randn(3, 10, 16),
        t5_mask=torch.arange(10) < torch.tensor([[1], [10], [6]]),
    )
    if kind == "v1.1":
        batch["sizes"] = torch.tensor([[1024.0, 1024, 768, 512, 0, 0]] * 2 + [[300.0, 400, 1280, 768, 10, 20]])
    return batch


def theirs(reference: diffusers.HunyuanDiT2DModel, batch: dict[str, Tensor]) -> Tensor:
    grid = batch["x"].shape[2] // 2, batch["x"].shape[3] // 2
    turns = get_2d_rotary_pos_embed(24, get_resize_crop_region_for_grid(grid, 32), grid, output_type="pt")
    return reference(
        batch["x"], batch["t"].to(batch["x"].dtype), batch["bert"], batch["bert_mask"].long(), batch["t5"],
        batch["t5_mask"].long(), batch.get("sizes"), torch.zeros(3, dtype=torch.int64), turns,
    ).sample  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("height, width", [(16, 16), (8, 20), (18, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_diffusers(kind, height, width):
    """All weights, the latents and both texts; to 1e-5, gradients to 1e-4."""
    reference, ours = pair(kind)
    mine = inputs(kind, height, width)
    yours = {name: t.clone() for name, t in mine.items()}
    for batch in (mine, yours):
        for name in ("x", "bert", "t5"):
            batch[name].requires_grad_()
    out, expected = ours(**mine), theirs(reference, yours)
    close(out, expected, 1e-5)
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    assert_gradients_equal(ours, reference, 1e-4)
    for name in ("x", "bert", "t5"):
        largest = yours[name].grad.abs().max()
        assert largest > 0 and (mine[name].grad - yours[name].grad).abs().max() <= 1e-4 * largest, name


def test_float64_leaves_no_doubt(monkeypatch):
    """What differs in float32 is rounding: with diffusers' casts to float32 taken out, the two agree to 1e-10."""
    cast, to = Tensor.float, Tensor.to
    reference, ours = (network.double() for network in pair("v1.1"))
    batch = {name: t.double() if t.is_floating_point() else t for name, t in inputs("v1.1").items()}

    def kept(x: Tensor, *args, **kwargs) -> Tensor:
        single = x.dtype == torch.float64 and (torch.float32 in args or kwargs.get("dtype") == torch.float32)
        return x if single else to(x, *args, **kwargs)

    with torch.no_grad():
        out = ours(**batch)
        # sinusoids are of float32 on both sides
        timesteps = [module for module in reference.modules() if type(module).__name__ == "Timesteps"]
        for module in timesteps:
            module.forward = lambda t, forward=module.forward: forward(t.int() if t.dtype == torch.float64 else t)
        monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else cast(x))
        monkeypatch.setattr(Tensor, "to", kept)
        expected = theirs(reference, batch)
        monkeypatch.undo()
    close(out, expected, 1e-10)


@pytest.mark.parametrize("rows, columns", [(64, 64), (80, 80), (48, 80), (80, 48), (72, 54), (5, 3), (1, 1)])
def test_rotations_equal_diffusers(rows, columns):
    """Cosine and sine of each place at the published shapes and at others."""
    grid = rows, columns
    cos, sin = get_2d_rotary_pos_embed(88, get_resize_crop_region_for_grid(grid, 32), grid, output_type="pt")
    turns = rotary(rows, columns, 88, 32)
    close(turns.real.repeat_interleave(2, dim=1), cos, 1e-6)
    close(turns.imag.repeat_interleave(2, dim=1), sin, 1e-6)


def test_bfloat16_is_as_close_to_float32_as_diffusers():
    reference, ours = pair("v1.1")
    batch = inputs("v1.1") | dict(t=torch.tensor([992, 0, 412]))  # which bfloat16 holds
    with torch.no_grad():
        exact = ours(**batch)
        half = {name: t.bfloat16() if t.is_floating_point() and name != "sizes" else t for name, t in batch.items()}
        expected = theirs(reference.bfloat16(), half)
        out = ours.bfloat16()(**half)
    assert out.dtype == torch.bfloat16
    error, tolerated = ((y.float() - exact).abs().mean() for y in (out, expected))
    assert error <= 1.2 * tolerated


# ----------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("kind", ["v1.1", "v1.2"])
def test_text_is_read_once_a_prompt(kind):
    """Keys and values made beforehand give the same output."""
    _, ours = pair(kind)
    batch = inputs(kind)
    with torch.no_grad():
        text = ours.read_text(*(batch.get(name) for name in ("bert", "bert_mask", "t5", "t5_mask", "sizes")))
        assert text["kv"].shape == (3, 6, 2, 2, 17, 24) and text["extra"].shape == (3, 48)
        calls = []
        ours.text_embedder.register_forward_hook(lambda *_: calls.append(1))
        out = ours(batch["x"], batch["t"], **text)
        assert not calls and torch.equal(out, ours(**batch))


def test_padding_is_seen_by_the_pool_only():
    """Of BERT nothing behind a text is seen. Of T5 the pooled vector sees it, so the encoder's rows must be whole."""
    _, ours = pair()
    batch = inputs()
    with torch.no_grad():
        out = ours(**batch)
        bert = batch["bert"].masked_fill(~batch["bert_mask"][..., None], 1e3)
        assert torch.equal(ours(**batch | dict(bert=bert)), out)
        t5 = batch["t5"].masked_fill(~batch["t5_mask"][..., None], 0)
        changed = (ours(**batch | dict(t5=t5)) - out).abs().amax((1, 2, 3)) > 1e-5
    assert changed.tolist() == [True, False, True]  # the second text fills its places


def test_what_is_missing_is_said():
    _, ours = pair("v1.1")
    batch = inputs("v1.1")
    sizes = batch.pop("sizes")
    with pytest.raises(ValueError, match="wants `sizes`"):
        ours(**batch)
    with pytest.raises(ValueError, match="reads 7 of BERT"):
        ours(**batch | dict(sizes=sizes, bert=batch["bert"][:, :5], bert_mask=batch["bert_mask"][:, :5]))
    assert ours.sizes_of(768, 512, 2).tolist() == [[1024, 1024, 768, 512, 0, 0]] * 2


# ------------------------------------------------------------------------------------------------- training and memory


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        _, ours = pair("v1.1")
        ours.checkpointing = checkpointing
        torch.manual_seed(1)
        ours(**inputs("v1.1")).square().sum().backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-6)


def test_adapters_reach_what_pefts_reach():
    """The same layers and, with the same adapter, the same output and gradients."""
    import peft

    reference, ours = pair("v1.1")
    lora.inject(ours, rank=2, targets=TARGETS)
    with torch.no_grad():
        for parameter in lora.parameters(ours):
            parameter += 0.1 * torch.randn_like(parameter)
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    keys = {f"base_model.model.{name}": t for name, t in lora.state(ours).items()}
    assert not peft.set_peft_model_state_dict(adapted, keys).unexpected_keys
    adapters = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
    assert len(adapters) == len(keys)
    batch = inputs("v1.1")
    out, expected = ours(**batch), theirs(adapted, batch)
    close(out, expected, 1e-5)
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients = {name.replace(".default", "").removeprefix("base_model.model."): p.grad for name, p in adapters.items()}
    largest = max(g.abs().max() for g in gradients.values())
    for name, parameter in ours.named_parameters():
        if ".lora_" in name:
            assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * largest, name


def test_the_published_networks_adapter_has_the_known_size():
    network = weights.build(HunyuanTransformer)
    with torch.device("meta"):
        params = lora.inject(network, rank=4, targets=TARGETS)
    assert len(params) == 2 * 320 and sum(p.numel() for p in params) == 4 * 870_400


def test_tencents_own_adapter_is_read(tmp_path):
    """Theirs adapts the fused projections, Wqkv of self-attention and kv_proj of cross-attention: each part of a fused
    layer has the common A and its rows of B, and the function is the same."""
    torch.manual_seed(0)
    _, ours = pair()
    base = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    tensors, expected, rank, alpha = {}, {}, 4, 4
    for i in range(6):
        for name, cin, parts in [
            ("attn1.Wqkv", 48, ["attn1.to_q", "attn1.to_k", "attn1.to_v"]),
            ("attn1.out_proj", 48, ["attn1.to_out.0"]),
            ("attn2.q_proj", 48, ["attn2.to_q"]),
            ("attn2.kv_proj", 20, ["attn2.to_k", "attn2.to_v"]),
            ("attn2.out_proj", 48, ["attn2.to_out.0"]),
        ]:
            a, b = torch.randn(rank, cin), torch.randn(48 * len(parts), rank)
            key = f"base_model.model.blocks.{i}.{name}"
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            for part, change in zip(parts, (b @ a).chunk(len(parts))):
                expected[f"blocks.{i}.{part}.weight"] = base[f"blocks.{i}.{part}.weight"] + alpha / rank * change
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    about = dict(peft_type="LORA", r=rank, lora_alpha=alpha,
                 target_modules=["Wqkv", "q_proj", "kv_proj", "out_proj"])  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    params = formats.load_peft(tmp_path, ours)
    assert sum(p.numel() for p in params) == 6 * rank * (8 * 48 + 6 * 48 + 2 * 20)
    lora.fold(ours)
    for name, tensor in ours.state_dict().items():
        close(tensor, expected.get(name, base[name]), 1e-6)
    _, bare = pair()
    tensors["base_model.model.blocks.0.attn1.Wqkv.lora_B.weight"] = torch.randn(143, rank)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(weights.WeightsError, match="Wqkv.*143"):
        formats.load_peft(tmp_path, bare)


# --------------------------------------------------------------------------------------------- files of the publishers


@pytest.mark.parametrize("version", ["v1_1", "v1_2"])
def test_published_transformers_load_strictly(version, tmp_path):
    component = f"hunyuandit_{version}_transformer"
    (tmp_path / "config.json").write_text(json.dumps(config(component)))
    network = weights.build(HunyuanTransformer, HunyuanConfig.from_json(tmp_path))
    published = names_and_shapes(component)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == published
    assert sum(p.numel() for p in network.parameters()) == about(component)["params"]
    if version == "v1_2":
        assert network.config == HunyuanConfig()


@pytest.mark.parametrize("kind", KINDS)
def test_loads_what_diffusers_saves(kind, tmp_path):
    reference, ours = pair(kind)
    batch = inputs(kind)
    with torch.no_grad():
        expected = ours(**batch)
        reference.save_pretrained(tmp_path / "one")
        loaded = load_hunyuan(tmp_path / "one")
        assert not loaded.training and loaded.config == ours.config
        assert torch.equal(loaded(**batch), expected)
        reference.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
        assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
        assert torch.equal(load_hunyuan(tmp_path / "shards", torch.float32)(**batch), expected)


def test_what_is_not_known_is_refused_by_name(tmp_path):
    with pytest.raises(weights.WeightsError, match="config.json is missing"):
        load_hunyuan(tmp_path)
    reference, _ = pair()
    reference.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    for name, value in dict(activation_fn="geglu", norm_type="ada_norm", hidden_size=64, num_layers=5).items():
        (tmp_path / "config.json").write_text(json.dumps(stated | {name: value}))
        with pytest.raises(weights.WeightsError, match=name):
            load_hunyuan(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stated | dict(use_style_cond_and_image_meta_size=True)))
    with pytest.raises(weights.WeightsError, match="style_embedder"):
        load_hunyuan(tmp_path)
