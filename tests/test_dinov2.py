"""DINOv2 against transformers, by both sets of names, at its own size and at another, from pixels to class tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import close
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from nanomed import weights
from nanomed.evaluation import extractors
from nanomed.metrics import features
from nanomed.metrics.networks import dinov2
from nanomed.weights import WeightsError

SMALL = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14)


def saved(folder, **settings) -> torch.nn.Module:
    """transformers' network with random weights everywhere, saved as it publishes them."""
    torch.manual_seed(0)
    reference = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL | settings)).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(folder)
    return reference


def hub_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch.hub's file holds, from transformers' names."""
    found = {}
    for name, tensor in tensors.items():
        if ".attention.attention." in name:
            if ".query." in name:
                parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
                found[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
        else:
            found[name] = tensor
    for mine, theirs in (("embeddings.position_embeddings", "pos_embed"), ("embeddings.patch_embeddings.projection",
                         "patch_embed.proj"), ("embeddings.", ""), ("encoder.layer.", "blocks."), ("layernorm", "norm"),
                         ("attention.output.dense", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
                         ("layer_scale2.lambda1", "ls2.gamma")):  # fmt: skip
        found = {name.replace(mine, theirs): tensor for name, tensor in found.items()}
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_transformers_value_and_gradient(tmp_path, bias):
    reference = saved(tmp_path, qkv_bias=bias)
    ours = dinov2.load(tmp_path)
    x = torch.randn(2, 3, 56, 56)
    expected = reference(x)
    with torch.no_grad():
        close(ours.states(x), expected.last_hidden_state, 1e-5)
        close(ours(x), expected.pooler_output, 1e-5)
    ours.requires_grad_(True)
    probe = torch.randn(2, 48)
    (ours(x) * probe).sum().backward()
    (expected.pooler_output * probe).sum().backward()
    theirs = [p for p in reference.parameters() if p.grad is not None]
    largest = max(p.grad.abs().max() for p in theirs)
    assert len(theirs) == len(list(ours.parameters()))
    for parameter in ours.parameters():
        partner = next(p for p in theirs if p.shape == parameter.shape and torch.equal(p, parameter))
        assert (parameter.grad - partner.grad).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("height, width", [(28, 28), (84, 84), (42, 70)])
def test_positions_of_another_size_are_interpolated_as_in_both_codes(tmp_path, height, width):
    """transformers goes by sizes; torch.hub's code by a factor of a grid that is a tenth longer."""
    reference = saved(tmp_path)
    ours = dinov2.load(tmp_path)
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        ours.offset = 0.0
        close(ours.states(x), reference(x).last_hidden_state, 1e-5)
        table = load_file(tmp_path / "model.safetensors")["embeddings.position_embeddings"]
        grid = table[:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
        scale = ((height // 14 + 0.1) / 4, (width // 14 + 0.1) / 4)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
        expected = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, 48)], 1)
        close(ours.embeddings.positions(height // 14, width // 14, 0.1), expected, 1e-6)
    assert dinov2.Dinov2(dinov2.Dinov2Config(**SMALL)).offset == 0.1


def test_both_sets_of_names_are_one_network(tmp_path, monkeypatch):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    theirs = hub_names(tensors)
    assert {"cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.bias",
            "blocks.2.attn.qkv.bias", "blocks.1.attn.proj.weight", "blocks.0.ls1.gamma",
            "blocks.0.mlp.fc1.weight"} <= theirs.keys()  # fmt: skip
    back = dinov2.of_hub(theirs)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    torch.save(theirs, tmp_path / dinov2.HUB)
    config = dinov2.Dinov2Config(**SMALL)
    monkeypatch.setattr(dinov2, "Dinov2Config", lambda: config)
    ours, folders = dinov2.load(tmp_path / dinov2.HUB), None
    monkeypatch.undo()
    folders = dinov2.load(tmp_path)
    assert weights.fingerprint(ours) == weights.fingerprint(folders)


def test_the_published_shape_is_the_default():
    """ViT-L/14 of 304 million parameters, built without memory."""
    network = weights.build(dinov2.Dinov2, dinov2.Dinov2Config())
    assert sum(p.numel() for p in network.parameters()) == 304_367_616
    names = dict(network.named_parameters())
    assert names["embeddings.position_embeddings"].shape == (1, 37 * 37 + 1, 1024)
    assert names["encoder.layer.23.mlp.fc1.weight"].shape == (4096, 1024)


def test_features_are_those_of_the_public_preprocessing(tmp_path):
    """torchvision's resize, tensor and normalisation, then transformers' class token."""
    reference = saved(tmp_path)
    (tmp_path / "facebook").mkdir()
    (tmp_path / dinov2.REPOSITORY).symlink_to(tmp_path)
    extractor = extractors.dino(str(tmp_path), 2, "cpu")
    public = transforms.Compose([
        transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((70, 50), (300, 260), (70, 50))]
    x = torch.stack([public(Image.fromarray(image)) for image in images])
    for image, expected in zip(images, x):
        close(features.for_dino(torch.from_numpy(image).permute(2, 0, 1)[None])[0], expected, 1e-6)
    ours = dinov2.load(tmp_path)
    with torch.no_grad():
        close(extractor.columns(images)["features"], ours(x), 1e-5)
        ours.offset = 0.0
        close(ours(x), reference(x).pooler_output, 1e-5)


def test_what_is_no_dinov2_is_refused(tmp_path):
    saved(tmp_path, use_swiglu_ffn=True)
    with pytest.raises(WeightsError, match="use_swiglu_ffn"):
        dinov2.load(tmp_path)
    network = dinov2.Dinov2(dinov2.Dinov2Config(**SMALL))
    with pytest.raises(ValueError, match="multiples of 14"):
        network(torch.zeros(1, 3, 50, 56))
    with pytest.raises(WeightsError, match="not the configuration of a DINOv2"):
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        dinov2.load(tmp_path)
