"""Decoding in tiles: equal to diffusers' tiled decoding where both blend alike, exact where nothing is cut."""

import diffusers
import pytest
import torch
from conftest import close

from nanomed import systems, weights
from nanomed.autoencoders.kl import AutoencoderKL, KLConfig
from nanomed.autoencoders.tiles import decode_tiles, spans


@pytest.fixture(scope="module")
def pair():
    """diffusers' autoencoder with tiles of 16 x 16 latents, and ours with its weights."""
    torch.manual_seed(0)
    shape = dict(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4)
    theirs = diffusers.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 3, sample_size=64,
                                     up_block_types=["UpDecoderBlock2D"] * 3, scaling_factor=1.0, **shape)  # fmt: skip
    theirs.enable_tiling()
    ours = AutoencoderKL(KLConfig(**shape, scaling_factor=1.0))
    return weights.load(ours, dict(theirs.state_dict())).eval(), theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(12, 42), (33, 8), (12, 12), (10, 30)])
def test_a_row_of_tiles_equals_diffusers(pair, height, width):
    """Along one side, of lengths at which diffusers adds no tile that lies within another. Where four tiles meet, it
    blends what it has blended already."""
    ours, theirs = pair
    z = torch.randn(2, 4, height, width)
    found = decode_tiles(ours.decode, z, 16, 4)
    close(found, theirs.decode(z).sample, 1e-5)
    if max(height, width) == 12:
        assert torch.equal(found, torch.cat([ours.decode(row) for row in z.split(1)]))
    else:
        assert (found - ours.decode(z)).abs().max() > 1e-3


@pytest.mark.parametrize("height, width, tile", [(40, 37, 16), (16, 90, 16), (33, 65, 9), (12, 12, 12)])
def test_a_decoder_that_looks_at_single_places_is_decoded_exactly(height, width, tile):
    """Weights add up to 1 everywhere, corners included, for sides that tiles do not fill; no tile is larger."""
    seen = []

    def decode(z: torch.Tensor) -> torch.Tensor:
        seen.append(max(z.shape[2:]))
        assert len(z) == 1
        return z.repeat_interleave(4, 2).repeat_interleave(4, 3)

    z = torch.randn(3, 2, height, width)
    close(decode_tiles(decode, z, tile, 4), z.repeat_interleave(4, 2).repeat_interleave(4, 3), 1e-6)
    assert max(seen) <= tile


def test_tiles_are_no_more_than_needed():
    assert [(start, length) for start, length, _ in spans(28, 16, 4)] == [(0, 16), (12, 16)]
    with pytest.raises(ValueError, match="too small"):
        decode_tiles(lambda z: z, torch.zeros(1, 1, 8, 8), 3, 8)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["sd-tiny", "kandinsky2-tiny", "kandinsky3-tiny", "msdm-tiny"])
def test_every_system_decodes_in_tiles(preset):
    """Images larger than a tile, one by one; those that fit as ever."""
    system = systems.build(preset).eval()
    latents, calls = torch.randn(2, *system.latent_shape), []
    whole = system.decode(latents)
    part = system.get_submodule(system.autoencoder)
    decode = part.decode
    part.decode = lambda z: calls.append(tuple(z.shape[2:])) or decode(z)
    system.tile = 32
    assert torch.equal(system.decode(latents), whole) and calls == [tuple(latents.shape[2:])]
    system.tile, side = 20, 20 * latents.shape[2] // 32
    assert system.decode(latents).shape == whole.shape and len(calls) == 1 + 2 * 4
    assert max(max(call) for call in calls[1:]) == side
