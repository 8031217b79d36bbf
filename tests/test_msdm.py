"""MSDM's networks, loss and sampling: golden tensors of the released modules, the paper's parameter table, and what
the corrected self-conditioning and guidance must do."""

import copy

import pytest
import torch
from conftest import close
from manifests import names_and_shapes
from safetensors.torch import load_file

from nanomed.adapters import lora
from nanomed.autoencoders.losses import VGGDistance, ssim
from nanomed.autoencoders.msdm import MSDMVAE
from nanomed.denoisers.msdm import MSDMUNet
from nanomed.layers.convolution import convolve

LAST = torch.channels_last


def weights_of(record: dict) -> dict:
    return {name[2:]: tensor for name, tensor in record.items() if name.startswith("w.")}


@pytest.fixture(scope="module")
def unet_record(golden):
    return load_file(golden / "unet_small.safetensors")


@pytest.fixture(scope="module")
def unet(unet_record):
    unet = MSDMUNet(8, (32, 32, 64, 128), text=24, dim=64).eval()
    unet.load_state_dict(weights_of(unet_record), strict=True)
    return unet


@torch.no_grad()
def test_unet_equals_the_released_module(unet, unet_record):
    """All zero-initialised weights of the recorded network were replaced, so that every path matters. 1e-5."""
    r = unet_record
    close(unet.time_embedder(r["t"], torch.float32), r["time_emb"], 1e-5)
    close(unet(r["x"], r["t"], r["c"], r["mask"]), r["y"], 1e-5)
    last = copy.deepcopy(unet).to(memory_format=LAST)  # then small maps are matrix products
    x = r["x"].contiguous(memory_format=LAST)
    close(last(x, r["t"], r["c"], r["mask"]), r["y"], 1e-5)


@pytest.fixture
def products(monkeypatch):
    """The calls of F.linear, counted."""
    calls, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *tensors: calls.append(1) or linear(*tensors))
    return calls


@pytest.mark.parametrize("options", [dict(kernel_size=1), dict(kernel_size=3, padding=1, bias=False)])
def test_a_small_map_is_convolved_as_a_matrix_product(options, products):
    """Value and all gradients equal the convolution's in float64 to 1e-12, and nothing changes its place in memory: a
    gradient lies as its weight does, or the optimizer would copy it."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(64, 24, **options).double().to(memory_format=LAST)
    x = torch.randn(2, 64, 4, 5, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
    out, ref = convolve(conv, x), conv(x)
    assert len(products) == 1 and out.is_contiguous(memory_format=LAST)
    close(out, ref, 1e-12)
    grad, tensors = torch.randn_like(ref), [x, *conv.parameters()]
    for got, expected in zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(ref, tensors, grad)):
        close(got, expected, 1e-12)
    convolve(conv, x).backward(grad)
    assert conv.weight.grad.is_contiguous(memory_format=LAST)


def test_other_convolutions_are_left_to_the_library(products):
    """Channels that come first, maps of as many positions as channels, strides, other paddings, adapted layers."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 4, 4)
    last, square = x.contiguous(memory_format=LAST), dict(kernel_size=3, padding=1)
    adapted = torch.nn.Sequential(torch.nn.Conv2d(64, 8, 1))
    lora.inject(adapted, 2, targets=["0"])
    cases = [
        (torch.nn.Conv2d(64, 8, 1), x),
        (torch.nn.Conv2d(64, 8, **square), x),
        (torch.nn.Conv2d(64, 8, **square), last),  # weights whose channels come first
        (torch.nn.Conv2d(64, 8, **square).to(memory_format=LAST), last.repeat(2, 1, 1, 1)),  # 64 positions
        (torch.nn.Conv2d(64, 8, 3, stride=2, padding=1).to(memory_format=LAST), last),
        (torch.nn.Conv2d(64, 8, 3).to(memory_format=LAST), last),
        (adapted[0], last),
    ]
    for layer, example in cases:
        assert torch.equal(convolve(layer, example), layer(example))
    assert not products


@torch.no_grad()
def test_reading_the_text_once_is_the_same_as_reading_it_every_step(unet, unet_record):
    r = unet_record
    text = unet.read_text(r["c"], r["mask"])
    assert torch.equal(unet(r["x"], r["t"], **text), unet(r["x"], r["t"], r["c"], r["mask"]))


@torch.no_grad()
def test_masked_tokens_reach_the_image_only_through_the_pooling(unet, unet_record):
    """Keys and values of padding are masked; the mean that queries the pooling includes padding, as released."""
    r = unet_record
    changed = r["c"].clone()
    changed[r["mask"] == 0] += 1.0
    text, other = unet.read_text(r["c"], r["mask"]), unet.read_text(changed, r["mask"])
    assert not torch.allclose(text["pooled"], other["pooled"])
    close(unet(r["x"], r["t"], **(other | {"pooled": text["pooled"]})), unet(r["x"], r["t"], **text), 1e-6)


@torch.no_grad()
def test_vae_equals_the_released_module(golden):
    r = load_file(golden / "vae_small.safetensors")
    vae = MSDMVAE(8, (8, 16, 32, 64))
    vae.load_state_dict(weights_of(r), strict=True)
    moments = vae.moments(r["image"])
    close(moments, r["moments"], 1e-5)
    close(vae.encode(r["image"], r["noise"]), r["z"], 1e-5)
    full, half = vae._decode(moments.chunk(2, dim=1)[0])
    close(full, r["decoded_mean"], 1e-5)
    close(half, r["deep_sup_half"], 1e-5)
    assert vae.loss(r["image"], r["noise"])["kl"].item() == pytest.approx(r["kl"].item(), rel=1e-5)


def test_ssim_equals_the_released_one(golden):
    r = load_file(golden / "ssim.safetensors")
    close(ssim(r["pred"], r["target"]), r["ssim"], 1e-5)
    close(ssim(r["target"], r["target"]), torch.ones(2), 1e-6)


def test_the_latent_scale_is_undone_by_decode(golden):
    r = load_file(golden / "vae_small.safetensors")
    vae = MSDMVAE(8, (8, 16, 32, 64))
    vae.load_state_dict(weights_of(r), strict=True)
    with torch.no_grad():
        plain, image = vae.encode(r["image"]), vae.decode(vae.encode(r["image"]))
        vae.scale = 0.25
        close(vae.encode(r["image"]), plain * 0.25, 1e-6)
        close(vae.decode(vae.encode(r["image"])), image, 1e-5)


def test_vae_loss_has_the_released_proportions(golden):
    """The released sum 3 S (MSE + 1 - SSIM) at both sizes + 1e-6 KL, divided by 3 S: written out again here."""
    r = load_file(golden / "vae_small.safetensors")
    vae = MSDMVAE(8, (8, 16, 32, 64))
    vae.load_state_dict(weights_of(r), strict=True)
    image = r["image"]
    with torch.no_grad():
        full, half = vae._decode(vae.encode(image, r["noise"]))
        small = torch.nn.functional.interpolate(image, scale_factor=0.5, mode="nearest-exact")
        total = 0.0
        for out, target in ((full, image), (half, small)):
            distance = 1 - ssim(((out + 1) / 2).clamp(0, 1), (target + 1) / 2)
            total += ((out - target) ** 2 + distance.view(-1, 1, 1, 1)).sum() / len(image)
        released = total + 1e-6 * r["kl"]
        close(vae.loss(image, r["noise"])["loss"] * image[0].numel(), released.squeeze(), 1e-5)


def test_vgg_distance_is_a_distance_and_carries_torchvisions_names():
    distance = VGGDistance()
    assert [n for n, _ in distance.named_parameters()][:2] == ["features.0.weight", "features.0.bias"]
    assert sum(p.numel() for p in distance.parameters()) == 14_714_688  # VGG16 without its classifier
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert distance(a, a).abs().max() == 0
        assert (distance(a, b) > 0).all()


@pytest.mark.parametrize("self_conditioning, expected", [(False, 326_508_296), (True, 326_526_728)])
def test_unet_has_the_papers_number_of_parameters(self_conditioning, expected):
    with torch.device("meta"):
        unet = MSDMUNet(self_conditioning=self_conditioning)
    assert sum(p.numel() for p in unet.parameters()) == expected


@pytest.mark.parametrize("component, build", [("msdm_unet", MSDMUNet), ("msdm_vae", MSDMVAE)])
def test_names_and_shapes_are_the_published_ones(component, build):
    with torch.device("meta"):
        module = build()
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == names_and_shapes(component)


def test_vae_has_the_papers_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in MSDMVAE().parameters()) == 13_365_094


def test_a_fresh_network_predicts_zero_and_learns():
    """The last convolution starts at zero; its gradient does not."""
    torch.manual_seed(0)
    unet = MSDMUNet(4, (32, 32, 64), text=16, dim=64, self_conditioning=True)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    out = unet(x, t, torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(x))
    (out - torch.randn_like(x)).abs().mean().backward()
    assert unet.outc["conv"]["conv"].weight.grad.abs().max() > 0


def test_places_give_every_position_its_own_name_at_any_size():
    """The learned map is added to the stem and stretched to other sizes; nothing else of the network changes."""
    torch.manual_seed(0)
    plain, placed = (MSDMUNet(4, (32, 32, 64), text=16, dim=64, dropout=0.0, places=n).eval() for n in (0, 8))
    plain.load_state_dict({name: t for name, t in placed.state_dict().items() if name != "places"})
    for unet in (plain, placed):
        torch.nn.init.ones_(unet.outc["conv"]["conv"].weight)
    text = torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.bool)
    for side in (8, 16):
        x, t = torch.zeros(1, 4, side, side), torch.tensor([500])
        with torch.no_grad():
            stretched = placed.places.repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)
            original = plain.in_conv["conv"].forward
            plain.in_conv["conv"].forward = lambda x, add=stretched, conv=original: conv(x) + add
            close(placed(x, t, *text), plain(x, t, *text), 1e-6)
            plain.in_conv["conv"].forward = original
            assert not torch.allclose(placed(x, t, *text), plain(x, t, *text), atol=1e-3)


def test_channel_dropout_removes_whole_channels():
    torch.manual_seed(0)
    unet = MSDMUNet(4, (32, 32, 64), text=16, dim=64)
    drop = unet.in_blocks[0][0].block_seq[0].basic_block.drop
    dropped = drop(torch.ones(64, 32, 4, 4))
    per_channel = dropped.flatten(2)
    assert ((per_channel == 0).all(-1) | (per_channel != 0).all(-1)).all()
    assert 0.05 < (per_channel == 0).all(-1).float().mean() < 0.15
