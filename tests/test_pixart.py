"""PixArt's transformer against diffusers' PixArtTransformer2DModel: outputs, gradients, adapters and files."""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import assert_gradients_equal, close
from manifests import about, config, names_and_shapes
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from nanomed import weights
from nanomed.adapters import lora
from nanomed.denoisers.pixart import OPTIONAL, PixArtConfig, PixArtTransformer, load_pixart, positions

# The published shapes in small: 16 latents a side at training is 512 pixels, 128 is 1024-MS, in whose network the size
# of the image is a condition; heads of 24 keep dim / 3 and dim / 4 whole as 72 does
SMALL = dict(num_attention_heads=2, attention_head_dim=24, num_layers=3, caption_channels=20)
KINDS = {
    "512": SMALL | dict(sample_size=64),
    "1024-MS": SMALL | dict(sample_size=128),
    "256": SMALL | dict(sample_size=32, in_channels=3, out_channels=3, num_layers=1),
    "stretched": SMALL | dict(sample_size=64, interpolation_scale=1.5, use_additional_conditions=True),
}
REAL = [7, 12, 1]  # tokens of the rows of a batch
MEDART = ("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear",
          "linear_1", "linear_2")  # fmt: skip  # the suffixes of the released Med-Art script


def pair(kind: str = "512") -> tuple[diffusers.PixArtTransformer2DModel, PixArtTransformer]:
    """diffusers' network at its default initialisation, and ours with the same weights."""
    torch.manual_seed(0)
    reference = diffusers.PixArtTransformer2DModel(**KINDS[kind] | dict(cross_attention_dim=48)).eval()
    ours = PixArtTransformer(PixArtConfig(**KINDS[kind]))
    return reference, weights.load(ours, {name: t.clone() for name, t in reference.state_dict().items()}).eval()


def inputs(kind: str = "512", height: int = 12, width: int = 12, length: int = 20) -> dict[str, Tensor]:
    """What ours takes. Behind the text of a row stands rubbish, which nothing may see."""
    rows = len(REAL)
    batch = dict(
        x=torch.randn(rows, KINDS[kind].get("in_channels", 4), height, width),
        t=torch.tensor([999, 0, 421]),
        prompt_embeds=torch.randn(rows, length, 20),
        attention_mask=torch.arange(length) < torch.tensor(REAL)[:, None],
    )
    if PixArtConfig(**KINDS[kind]).conditioned_on_size:
        batch |= dict(resolution=torch.tensor([[512.0, 768.0]] * rows), aspect_ratio=torch.tensor([[0.67]] * rows))
    return batch


def theirs(reference: diffusers.PixArtTransformer2DModel, batch: dict[str, Tensor]) -> Tensor:
    sizes = {name: batch.get(name) for name in ("resolution", "aspect_ratio")}
    return reference(
        batch["x"], batch["prompt_embeds"], batch["t"], sizes, encoder_attention_mask=batch["attention_mask"].long()
    ).sample


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("height, width", [(12, 12), (8, 20), (18, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_diffusers(kind, height, width):
    """All weights, the latents and the text, with texts of several lengths; to 1e-5."""
    reference, ours = pair(kind)
    mine = inputs(kind, height, width)
    yours = {name: t.clone() for name, t in mine.items()}
    for batch in (mine, yours):
        for name in ("x", "prompt_embeds"):
            batch[name].requires_grad_()
    out, expected = ours(**mine), theirs(reference, yours)
    close(out, expected, 1e-5)
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    assert_gradients_equal(ours, reference, 1e-5)
    for name in ("x", "prompt_embeds"):
        largest = yours[name].grad.abs().max()
        assert largest > 0 and (mine[name].grad - yours[name].grad).abs().max() <= 1e-5 * largest, name


def test_float64_leaves_no_doubt():
    """What differs in float32 is rounding: in float64, from the same float32 sinusoids, the two agree to 1e-12."""
    reference, ours = (network.double() for network in pair("1024-MS"))
    batch = {name: t.double() if t.is_floating_point() else t for name, t in inputs("1024-MS").items()}
    with torch.no_grad():
        close(ours(**batch), theirs(reference, batch), 1e-12)


@pytest.mark.parametrize(
    "rows, columns, base, scale", [(32, 32, 32, 1), (64, 64, 64, 2), (20, 52, 64, 2), (7, 3, 16, 1)]
)
def test_positions_equal_diffusers(rows, columns, base, scale):
    table = diffusers.models.embeddings.get_2d_sincos_pos_embed(
        96, (rows, columns), base_size=base, interpolation_scale=scale, output_type="pt"
    )
    close(positions(rows, columns, 96, base, scale), table.float(), 1e-7)


def test_bfloat16_is_as_close_to_float32_as_diffusers():
    reference, ours = pair()
    batch = inputs()
    with torch.no_grad():
        exact = ours(**batch)
        half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in batch.items()}
        expected = theirs(reference.bfloat16(), half)
        out = ours.bfloat16()(**half)
    assert out.dtype == torch.bfloat16
    error, tolerated = ((y.float() - exact).abs().mean() for y in (out, expected))
    assert error <= 1.2 * tolerated


# ----------------------------------------------------------------------------------------------------------------- text


def test_text_is_read_once_a_prompt_and_cut_at_the_longest():
    """Keys and values made beforehand give the same output and, through them, the same gradients."""
    _, ours = pair()
    batch = inputs()
    text = ours.read_text(batch["prompt_embeds"], batch["attention_mask"])
    assert text["kv"].shape == (3, 3, 2, max(REAL), 48) and text["attention_mask"].sum(1).tolist() == REAL
    x, t = batch["x"], batch["t"]
    with torch.no_grad():
        close(ours(x, t, **text), ours(**batch), 1e-6)
    calls = []
    ours.caption_projection.register_forward_hook(lambda *_: calls.append(1))
    probe = torch.randn(3, 8, 12, 12)
    (ours(x, t, **text) * probe).sum().backward()
    assert not calls
    expected = pair()[1]
    (expected(**batch) * probe).sum().backward()
    assert_gradients_equal(ours, expected, 1e-5)


def test_what_is_masked_is_not_seen():
    _, ours = pair()
    batch = inputs()
    other = batch["prompt_embeds"].masked_fill(~batch["attention_mask"][..., None], 1e4)
    moved = batch["prompt_embeds"].clone()
    moved[1, 11] += 1
    with torch.no_grad():
        out = ours(**batch)
        assert torch.equal(ours(**batch | dict(prompt_embeds=other)), out)
        changed = (ours(**batch | dict(prompt_embeds=moved)) - out).abs().amax((1, 2, 3))
    assert (changed > 1e-5).tolist() == [False, True, False]


def test_a_mask_with_holes_equals_diffusers():
    reference, ours = pair()
    batch = inputs()
    batch["attention_mask"][1, 2:5] = False
    with torch.no_grad():
        close(ours(**batch), theirs(reference, batch), 1e-5)


def test_a_size_must_be_said_where_it_is_a_condition():
    _, ours = pair("1024-MS")
    batch = inputs("1024-MS")
    del batch["resolution"]
    with pytest.raises(ValueError, match="wants `resolution`"):
        ours(**batch)


# ------------------------------------------------------------------------------------------------- training and memory


def test_checkpointing_changes_no_gradient_and_keeps_less():
    def backward(checkpointing: bool) -> tuple[PixArtTransformer, int]:
        _, ours = pair()
        ours.checkpointing = checkpointing
        torch.manual_seed(1)
        batch = inputs()
        pointers = {p.untyped_storage().data_ptr() for p in ours.parameters()}
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() if tensor.untyped_storage().data_ptr() not in pointers else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = ours(**batch).square().sum()
        during = kept
        out.backward()
        return ours, during

    plain, all_kept = backward(False)
    again, few_kept = backward(True)
    assert_gradients_equal(again, plain, 1e-6)
    assert few_kept < all_kept / 5


@pytest.mark.filterwarnings("ignore:LoRA targets that no layer has")
def test_medarts_adapter_reaches_what_peft_reaches():
    """The 12 suffixes of the released script on our network and, through peft, on diffusers': the same layers, and
    with the same adapter the same output and the same gradients."""
    import peft

    reference, ours = pair()
    lora.inject(ours, rank=2, targets=MEDART)
    with torch.no_grad():
        for parameter in lora.parameters(ours):
            parameter += 0.1 * torch.randn_like(parameter)
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(MEDART)))
    keys = {f"base_model.model.{name}": t for name, t in lora.state(ours).items()}
    assert not peft.set_peft_model_state_dict(adapted, keys).unexpected_keys
    adapters = {name: p for name, p in adapted.named_parameters() if ".lora_" in name}
    assert len(adapters) == len(keys)
    batch = inputs()
    out, expected = ours(**batch), theirs(adapted, batch)
    close(out, expected, 1e-5)
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients = {name.replace(".default", "").removeprefix("base_model.model."): p.grad for name, p in adapters.items()}
    largest = max(g.abs().max() for g in gradients.values())
    for name, parameter in ours.named_parameters():
        if ".lora_" in name:
            assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * largest, name


@pytest.mark.filterwarnings("ignore:LoRA targets that no layer has")
def test_medarts_adapter_of_the_published_network_has_the_published_size():
    network = weights.build(PixArtTransformer)
    with torch.device("meta"):
        params = lora.inject(network, rank=8, targets=MEDART)
    assert len(params) == 2 * 287 and sum(p.numel() for p in params) == 6_882_688


def test_a_fresh_network_learns():
    torch.manual_seed(0)
    ours = PixArtTransformer(PixArtConfig(**SMALL))
    batch = inputs()
    target = torch.randn(3, 8, 1, 1)
    optimizer = torch.optim.Adam(ours.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = F.mse_loss(ours(**batch), target.expand(-1, -1, 12, 12))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


# --------------------------------------------------------------------------------------------- files of the publishers


@pytest.mark.parametrize("component", ["pixart_alpha_xl2_512x512", "pixart_alpha_xl2_1024_MS"])
def test_published_transformers_load_strictly(component, tmp_path):
    """With the one tensor besides that the files carry and nothing uses."""
    (tmp_path / "config.json").write_text(json.dumps(config(component)))
    network = weights.build(PixArtTransformer, PixArtConfig.from_json(tmp_path))
    published = names_and_shapes(component)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == published
    assert sum(p.numel() for p in network.parameters()) == about(component)["params"]
    assert about(component)["optional"].keys() == set(OPTIONAL)
    if component.endswith("512x512"):
        assert PixArtConfig.from_json(tmp_path) == PixArtConfig()


def test_loads_what_diffusers_saves(tmp_path):
    """In one file, with and without y_embedding; in shards; as the fp16 variant; converted while reading."""
    reference, ours = pair()
    batch = inputs()
    with torch.no_grad():
        expected = ours(**batch)
        reference.save_pretrained(tmp_path / "one")
        file = tmp_path / "one" / "diffusion_pytorch_model.safetensors"
        loaded = load_pixart(tmp_path / "one")
        assert not loaded.training and loaded.config == ours.config
        assert torch.equal(loaded(**batch), expected)
        save_file(load_file(file) | {OPTIONAL[0]: torch.zeros(120, 20)}, file)
        assert torch.equal(load_pixart(tmp_path / "one")(**batch), expected)

        reference.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
        assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 2
        assert torch.equal(load_pixart(tmp_path / "shards")(**batch), expected)

        reference.half().save_pretrained(tmp_path / "half", variant="fp16", max_shard_size="100KB")
        assert load_pixart(tmp_path / "half").proj_out.weight.dtype == torch.float16
        close(load_pixart(tmp_path / "half", torch.float32)(**batch), expected, 5e-3)


def test_wrong_configs_and_files_are_named(tmp_path):
    with pytest.raises(weights.WeightsError, match="config.json is missing"):
        load_pixart(tmp_path)
    (tmp_path / "config.json").write_text('{"num_layers": "many"}')
    reference, _ = pair()
    reference.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"surprise": torch.zeros(1)}, file)
    with pytest.raises(weights.WeightsError, match="surprise"):
        load_pixart(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the memory from Linux")
@pytest.mark.parametrize("dtype, bound", [("float32", 1.15), ("bfloat16", 1.3)])
def test_loading_holds_the_weights_once(tmp_path, dtype, bound):
    """The peak of resident memory above what imports and a first small load take, with every page of the weights read:
    at most 1.15x the weights as they are, 1.3x where they become bfloat16 on the way. The file has 300 MB."""
    for folder, shape in dict(small=SMALL, large=dict(num_layers=3)).items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(shape))
        names = weights.build(PixArtTransformer, PixArtConfig(**shape)).state_dict()
        tensors = {name: torch.ones(t.shape) for name, t in names.items()}
        save_file(tensors, tmp_path / folder / "diffusion_pytorch_model.safetensors")
    code = f"""
import re, sys, torch
from nanomed import weights
from nanomed.denoisers.pixart import load_pixart
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def load(name):
    network = load_pixart(f"{tmp_path}/{{name}}", torch.{dtype})
    for tensor in network.parameters():
        tensor.detach().amax()
    return network
load("small")
start = peak()
weights.tensors.CHUNK //= 8  # the published file is eight times as large as this one, and mapped in pieces of that size
network = load("large")
held = sum(t.numel() * t.element_size() for t in network.parameters())
assert held > 100e6
assert "sympy" not in sys.modules  # which torch imports for some operations on the meta device: a second at the start
print((peak() - start) / held)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= bound
