"""Kandinsky 3's U-Net against diffusers' Kandinsky3UNet: outputs, gradients, files, and the adapters of the paper."""

import json

import diffusers
import pytest
import torch
from conftest import close
from manifests import config, names_and_shapes
from torch import Tensor

from nanomed import weights
from nanomed.adapters import lora
from nanomed.denoisers.kandinsky3 import Kandinsky3Config, Kandinsky3UNet, load_kandinsky3

SMALL = dict(time_embedding_dim=24, groups=4, attention_head_dim=8, layers_per_block=2,
             block_out_channels=(8, 16, 24, 32), cross_attention_dim=16, encoder_hid_dim=20)  # fmt: skip


WIDER = SMALL | dict(time_embedding_dim=32, block_out_channels=(16, 32, 48, 64))


def drawn(seed: int, shape: dict) -> diffusers.Kandinsky3UNet:
    """diffusers' network at its start; what time does to the norms starts at zero there, so it is drawn."""
    torch.manual_seed(seed)
    reference = diffusers.Kandinsky3UNet(**shape).eval()
    for name, parameter in reference.named_parameters():
        if "context_mlp" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return reference


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """diffusers' network and the folder it wrote."""
    reference, folder = drawn(0, SMALL), tmp_path_factory.mktemp("kandinsky3") / "unet"
    reference.save_pretrained(folder)
    return reference, folder


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Latents that are not square; texts of several lengths, the last one the null: zeros under an empty mask."""
    torch.manual_seed(1)
    mask = torch.arange(7) < torch.tensor([[7], [4], [0]])
    embeds = torch.randn(3, 7, 20, dtype=dtype) * mask.any(1)[:, None, None]
    return dict(x=torch.randn(3, 4, 16, 24, dtype=dtype), t=torch.tensor([999, 0, 421]), prompt_embeds=embeds,
                attention_mask=mask)  # fmt: skip


def theirs(reference, batch: dict[str, Tensor]) -> Tensor:
    return reference(batch["x"], batch["t"], batch["prompt_embeds"], batch["attention_mask"].long()).sample


def test_outputs_equal_diffusers(saved):
    """To 1e-10 in float64, the null text included."""
    reference, folder = saved
    with torch.no_grad():
        expected = theirs(reference.double(), inputs(torch.float64))
        close(load_kandinsky3(folder, torch.float64)(**inputs(torch.float64)), expected, 1e-10)


def test_a_text_that_was_read_once_gives_the_same_bits(saved):
    """`read_text` and then steps that see no text any more, against the text in every step: equal, gradients too."""
    unet = load_kandinsky3(saved[1]).requires_grad_(True)
    batch = inputs(torch.float32)
    text = [batch.pop(name) for name in ("prompt_embeds", "attention_mask")]
    read = unet.read_text(*text)
    layers = [layer for attention in unet._readers() for layer in (attention.to_k, attention.to_v)]
    assert len(layers) == 2 * 3 * 2 * 2  # three levels, two cross-attentions in each, down and up
    layers += [unet.encoder_hid_proj, unet.add_time_condition]
    calls = [layer.register_forward_hook(lambda *_: pytest.fail("the text was read again")) for layer in layers]
    first = [unet(batch["x"], t * torch.ones_like(batch["t"]), **read) for t in (0, 500)]
    for call in calls:
        call.remove()
    again = [unet(batch["x"], t * torch.ones_like(batch["t"]), *text) for t in (0, 500)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    parameters = list(unet.parameters())
    grads = [torch.autograd.grad(sum(out.square().sum() for out in outs), parameters) for outs in (first, again)]
    largest = max(grad.abs().max() for grad in grads[1])
    assert all((a - b).abs().max() <= 1e-6 * largest for a, b in zip(*grads))


def test_in_float32_it_is_as_near_to_the_truth_as_diffusers():
    """A random network makes of rounding a few 1e-5, in either program, so that the two cannot agree to 1e-5. Over four
    networks the mean of the largest errors against float64 is at most 1.5 times diffusers', and each below 1e-4."""
    errors = []
    for seed in range(4):
        reference = drawn(seed, WIDER)
        ours = weights.load(weights.build(Kandinsky3UNet, Kandinsky3Config(**WIDER)), dict(reference.state_dict()))
        batch = {name: tensor[:2] for name, tensor in inputs(torch.float32).items()}  # -10,000 leaves the null 3 digits
        exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
        with torch.no_grad():
            mine, other = ours(**batch), theirs(reference, batch)
            truth = theirs(reference.double(), exact)
        errors.append([(out.double() - truth).abs().max().item() for out in (mine, other)])
    mine, other = (sum(column) for column in zip(*errors))
    assert mine <= 1.5 * other and max(map(max, errors)) < 1e-4, errors


def test_gradients_equal_diffusers(saved):
    """Of every parameter and of both inputs, to 1e-9 of the network's largest, in float64."""
    reference, folder = saved
    reference.double()
    ours, found = load_kandinsky3(folder, torch.float64).requires_grad_(True), []
    for network, call in ((ours, lambda b: ours(**b)), (reference, lambda b: theirs(reference, b))):
        batch = inputs(torch.float64)
        leaves = [batch[name].requires_grad_() for name in ("x", "prompt_embeds")]
        named = dict(network.named_parameters())
        loss = call(batch).square().mean()
        grads = torch.autograd.grad(loss, [*leaves, *named.values()])
        found.append(dict(zip(["x", "prompt_embeds", *named], grads)))
    mine, other = found
    largest = max(gradient.abs().max().item() for gradient in other.values())
    assert mine.keys() == other.keys()
    for name, gradient in other.items():
        assert (mine[name] - gradient).abs().max().item() <= 1e-9 * largest, name


def test_the_published_file_loads_strictly():
    said = config("kandinsky3_unet")
    unet = weights.build(Kandinsky3UNet, Kandinsky3Config(**{k: v for k, v in said.items() if k in SMALL}))
    assert {name: tuple(t.shape) for name, t in unet.state_dict().items()} == names_and_shapes("kandinsky3_unet")


@pytest.mark.parametrize("rank", [4, 16, 128])
def test_adapters_have_the_papers_sizes(rank):
    """417,792 parameters a rank on to_q, to_k, to_v and to_out.0."""
    unet = weights.build(Kandinsky3UNet, Kandinsky3Config())
    assert sum(p.numel() for p in lora.inject(unet, rank)) == 417_792 * rank


@pytest.mark.parametrize("odd", [dict(block_out_channels=[8, 16]), dict(layers_per_block=1), dict(add_noise=True)])
def test_another_network_is_refused_by_name(saved, tmp_path, odd):
    said = json.loads((saved[1] / "config.json").read_text()) | odd
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(weights.WeightsError, match=next(iter(odd))):
        load_kandinsky3(tmp_path)
