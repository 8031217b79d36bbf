"""MoVQ against diffusers' VQModel on random weights, and the published names and shapes of both Kandinskys."""

import pytest
import torch
from conftest import close
from diffusers import VQModel
from manifests import about, config, names_and_shapes

from nanomed import weights
from nanomed.autoencoders.movq import MoVQ, SpatialNorm

SMALL = dict(in_channels=3, out_channels=3, block_out_channels=(32, 32, 64), layers_per_block=2, latent_channels=4,
             num_vq_embeddings=40, vq_embed_dim=4, norm_num_groups=8)  # fmt: skip
TYPES = dict(
    down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    norm_type="spatial",
)


def pair(seed: int = 0):
    """diffusers' VQModel with random weights, and ours with the same tensors."""
    torch.manual_seed(seed)
    reference = VQModel(**SMALL, **TYPES).eval()
    ours = weights.build(MoVQ, **SMALL)
    return reference, weights.load(ours, {k: v.clone().requires_grad_() for k, v in reference.state_dict().items()})


def gradients_equal(ours, reference) -> None:
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max().item() <= 1e-5 * largest, name


@pytest.mark.parametrize("height, width", [(16, 16), (24, 16)])
def test_encoder_equals_diffusers(height, width):
    reference, ours = pair()
    images = torch.rand(2, 3, height, width) * 2 - 1
    latents, expected = ours.encode(images), reference.encode(images).latents
    assert latents.shape == (2, 4, height // 4, width // 4)
    close(latents, expected, 1e-5)
    probe = torch.randn_like(latents)
    (latents * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients_equal(ours, reference)


@pytest.mark.parametrize("height, width", [(4, 4), (3, 5)])
def test_decoder_equals_diffusers(height, width):
    """Without the quantiser, as the pipelines run it."""
    reference, ours = pair(1)
    latents = torch.randn(2, 4, height, width)
    a, b = latents.clone().requires_grad_(), latents.clone().requires_grad_()
    images, expected = ours.decode(a), reference.decode(b, force_not_quantize=True).sample
    assert images.shape == (2, 3, height * 4, width * 4)
    close(images, expected, 1e-5)
    probe = torch.randn_like(images)
    (images * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients_equal(ours, reference)
    close(a.grad, b.grad, 1e-5)


def test_the_norms_are_fed_by_the_latent_before_the_post_quantiser_convolution():
    """Feeding what comes after it instead, the likeliest mistake, would be seen far above the tolerance."""
    _, ours = pair(2)
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        after = ours.post_quant_conv(latents)
        assert (ours.decoder(after, after) - ours.decode(latents)).abs().max() > 1e-2


def test_spatial_norm_of_a_constant_latent_is_a_scaled_group_norm():
    norm = SpatialNorm(64, 4)
    x, z = torch.randn(2, 64, 6, 6), torch.ones(2, 4, 3, 3)
    scale, shift = norm.conv_y(z)[:, :, :1, :1], norm.conv_b(z)[:, :, :1, :1]
    close(norm(x, z), norm.norm_layer(x) * scale + shift, 1e-6)


@pytest.mark.parametrize("component", ["kandinsky22_movq", "kandinsky3_movq"])
def test_published_names_and_shapes_load_strictly(component):
    """Kandinsky 3 has the same autoencoder, twice as wide."""
    settings = {k: v for k, v in config(component).items() if k in MoVQ.__init__.__annotations__}
    module = weights.build(MoVQ, **settings)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in names_and_shapes(component).items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    assert sum(p.numel() for p in module.parameters()) == about(component)["params"]


def test_sides_must_be_multiples_of_the_factor():
    with pytest.raises(ValueError, match="multiples of 4"):
        MoVQ(**SMALL).encode(torch.zeros(1, 3, 18, 16))
