"""The KL autoencoder against diffusers' AutoencoderKL, value for value and gradient for gradient, and its files."""

import json

import diffusers
import pytest
import torch
from conftest import close
from manifests import about, config, names_and_shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanomed import weights
from nanomed.autoencoders.kl import OLD_NAMES, AutoencoderKL, KLConfig, load_kl, renamed

SHAPES = {
    "three levels": dict(block_out_channels=(16, 32, 48), layers_per_block=2, latent_channels=4, norm_num_groups=8),
    "two levels": dict(block_out_channels=(32, 64), layers_per_block=1, latent_channels=3, norm_num_groups=32),
    "one level": dict(block_out_channels=(16,), layers_per_block=2, latent_channels=4, norm_num_groups=4),
}


def settings(shape: str) -> dict:
    levels = len(SHAPES[shape]["block_out_channels"])
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    return SHAPES[shape] | blocks | dict(scaling_factor=0.18215)


def pair(shape: str = "three levels") -> tuple[diffusers.AutoencoderKL, AutoencoderKL]:
    """diffusers' autoencoder at its default initialisation, and ours with the same weights."""
    torch.manual_seed(0)
    reference = diffusers.AutoencoderKL(**settings(shape)).eval()
    ours = AutoencoderKL(KLConfig(**SHAPES[shape]))
    return reference, weights.load(ours, {name: t.clone() for name, t in reference.state_dict().items()})


def assert_gradients_equal(ours: torch.nn.Module, reference: torch.nn.Module, tolerance: float = 1e-5) -> None:
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert expected.keys() == {name for name, p in ours.named_parameters() if p.grad is not None} and largest > 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad - expected[name]).abs().max() <= tolerance * largest, name


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("shape", SHAPES)
def test_encoding_equals_diffusers(shape):
    """Moments, the scaled mean, the scaled draw with given noise, and the gradients of the draw."""
    reference, ours = pair(shape)
    images = torch.rand(2, 3, 24, 40) * 2 - 1
    posterior = reference.encode(images).latent_dist
    noise = torch.randn_like(posterior.mean)
    draw = (posterior.mean + posterior.std * noise) * 0.18215
    close(ours.moments(images), posterior.parameters, 1e-5)
    close(ours.encode(images), posterior.mode() * 0.18215, 1e-5)
    close(ours.encode(images, noise), draw, 1e-5)
    assert draw.shape[1:] == (SHAPES[shape]["latent_channels"], 24 // ours.factor, 40 // ours.factor)
    probe = torch.randn_like(draw)
    (draw * probe).sum().backward()
    (ours.encode(images, noise) * probe).sum().backward()
    assert_gradients_equal(ours, reference)


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_diffusers(shape):
    """Images, the gradients of the weights, and the one of the latents, through which HLDF reaches the sampler."""
    reference, ours = pair(shape)
    mine = torch.randn(2, SHAPES[shape]["latent_channels"], 6, 10, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    expected, images = reference.decode(theirs / 0.18215).sample, ours.decode(mine)
    close(images, expected, 1e-5)
    probe = torch.randn_like(images)
    (images * probe).sum().backward()
    (expected * probe).sum().backward()
    assert_gradients_equal(ours, reference)
    assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()


def test_a_log_variance_is_kept_within_the_published_bounds():
    reference, ours = pair()
    for vae in (reference, ours):
        vae.quant_conv.weight.data *= 1000
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = reference.encode(images).latent_dist
        logvar = ours.moments(images).chunk(2, dim=1)[1]
    assert logvar.min() == -30 and logvar.max() == 20
    close(logvar, expected.logvar, 1e-5)


def test_checkpointing_changes_no_gradient_and_keeps_less():
    def backward(checkpointing: bool) -> tuple[list[Tensor], int]:
        _, ours = pair()
        ours.decoder.checkpointing = checkpointing
        latents = torch.linspace(-1, 1, 4 * 12 * 12).view(1, 4, 12, 12).requires_grad_()
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel() if tensor.untyped_storage().data_ptr() not in weight_pointers else 0
            return tensor

        weight_pointers = {p.untyped_storage().data_ptr() for p in ours.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = ours.decode(latents).square().sum()
        during = kept
        out.backward()
        return [latents.grad, *(p.grad for p in ours.decoder.parameters())], during

    plain, all_kept = backward(False)
    again, few_kept = backward(True)
    largest = max(gradient.abs().max() for gradient in plain)
    assert all((a - b).abs().max() <= 1e-6 * largest for a, b in zip(again, plain))
    assert few_kept < all_kept / 3


# --------------------------------------------------------------------------------------------- files of the publishers


@pytest.mark.parametrize(
    "component", ["pixart_vae", "sd_vae_ft_ema", "sd14_vae", "sd15_vae", "sdxl_vae", "hunyuan_vae"]
)
@pytest.mark.parametrize("generation", ["new names", "old names", "old names, convolutions"])
def test_published_autoencoders_load_strictly(component, generation, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(component)))
    vae = weights.build(AutoencoderKL, KLConfig.from_json(tmp_path))
    published = {}
    for name, shape in names_and_shapes(component).items():
        if generation != "new names" and ".attentions." in name:
            for old, new in OLD_NAMES.items():
                name = name.replace(f".{new}.", f".{old}.")
            if generation.endswith("convolutions") and len(shape) == 2:
                shape = (*shape, 1, 1)
        published[name] = torch.empty(shape, device="meta")
    assert any("proj_attn" in name for name in published) == (generation != "new names")
    expected = {name: tensor.shape for name, tensor in renamed(published).items()}
    assert {name: tensor.shape for name, tensor in vae.state_dict().items()} == expected
    assert sum(p.numel() for p in vae.parameters()) == about(component)["params"] == 83_653_863
    assert vae.scale == config(component)["scaling_factor"]


@pytest.mark.parametrize("generation", ["new", "old", "convolutions"])
def test_loads_what_diffusers_saves_in_either_generation_of_names(generation, tmp_path):
    reference, ours = pair()
    reference.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    if generation != "new":
        for name in [name for name in tensors if ".attentions." in name and ".group_norm." not in name]:
            tensor = tensors.pop(name)
            for old, new in OLD_NAMES.items():
                name = name.replace(f".{new}.", f".{old}.")
            tensors[name] = tensor[:, :, None, None] if generation == "convolutions" and tensor.ndim == 2 else tensor
        save_file(tensors, file)
    loaded = load_kl(tmp_path)
    assert not loaded.training
    for name, tensor in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_loads_shards_and_the_half_precision_variant(tmp_path):
    reference, ours = pair()
    reference.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and list(tmp_path.glob("*index*"))
    loaded = load_kl(tmp_path, torch.float32)
    assert load_kl(tmp_path).post_quant_conv.weight.dtype == torch.float16
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        close(loaded.decode(latents), ours.decode(latents), 1e-2)
        close(loaded.decode(latents), reference.float().decode(latents / 0.18215).sample, 1e-5)


def test_wrong_configs_and_files_are_named(tmp_path):
    with pytest.raises(weights.WeightsError, match="config.json is missing"):
        load_kl(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(weights.WeightsError, match="not the configuration of a KL autoencoder"):
        load_kl(tmp_path)
    reference, _ = pair()
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(tensors | {"decoder.surprise": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(weights.WeightsError, match="decoder.surprise"):
        load_kl(tmp_path)
