"""Kandinsky 2.2's prior and decoder U-Net against diffusers on random weights, the published names and shapes, the
papers' adapter sizes, and what CLIP sees of an image."""

import numpy as np
import pytest
import torch
import transformers
from conftest import close
from diffusers import PriorTransformer as ReferencePrior
from diffusers import UNet2DConditionModel
from manifests import about, config, names_and_shapes
from PIL import Image

from nanomed import weights
from nanomed.adapters import lora
from nanomed.denoisers.kandinsky2 import DecoderUNet, PriorTransformer, shortest
from nanomed.text.clip import ClipText, ClipTextConfig
from nanomed.text.clip_vision import MEAN, STD, ClipVision, ClipVisionConfig, preprocess

PRIOR = dict(num_attention_heads=4, attention_head_dim=16, num_layers=3, embedding_dim=24, num_embeddings=11)
UNET = dict(in_channels=4, out_channels=8, block_out_channels=(32, 64, 96), layers_per_block=2, cross_attention_dim=40,
            attention_head_dim=16, encoder_hid_dim=24, norm_num_groups=16)  # fmt: skip
TYPES = dict(  # what a published config says besides
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    resnet_time_scale_shift="scale_shift", encoder_hid_dim_type="image_proj", addition_embed_type="image",
)  # fmt: skip


def named(constructor, published: dict) -> dict:
    """Those settings of a published config that the constructor takes."""
    taken = constructor.__init__.__annotations__
    return {name: value for name, value in published.items() if name in taken}


def reference_prior(seed: int = 0):
    """diffusers' prior with nothing left at zero, and ours with the same tensors."""
    torch.manual_seed(seed)
    reference = ReferencePrior(**PRIOR).eval()
    with torch.no_grad():
        for name in ("positional_embedding", "prd_embedding", "clip_mean"):
            getattr(reference, name).normal_()
        reference.clip_std.uniform_(0.5, 2)
    ours = weights.build(PriorTransformer, **PRIOR)
    return reference, weights.load(ours, {k: v.clone().requires_grad_() for k, v in reference.state_dict().items()})


def text(seed: int = 0, rows: int = 3):
    torch.manual_seed(seed)
    states, embeds = torch.randn(rows, 11, 24), torch.randn(rows, 24)
    mask = torch.arange(11) < torch.tensor([2, 7, 5][:rows])[:, None]
    return dict(text_states=states, text_embeds=embeds, text_mask=mask)


def run_reference(reference, x, t, text_states, text_embeds, text_mask):
    out = reference(x, t, proj_embedding=text_embeds, encoder_hidden_states=text_states, attention_mask=text_mask)
    return out.predicted_image_embedding


def gradients_equal(ours, reference, inputs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """To 1e-5 of the network's largest gradient, by name, and of the inputs'."""
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max().item() <= 1e-5 * largest, name
    for a, b in inputs:
        close(a.grad, b.grad, 1e-5)


# ------------------------------------------------------------------------------------------------------------- prior


def test_prior_equals_diffusers():
    reference, ours = reference_prior()
    condition, x, t = text(), torch.randn(3, 24), torch.tensor([0, 417, 999])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(a, t, **condition), run_reference(reference, b, t, **condition)
    close(out, expected, 1e-5)
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients_equal(ours, reference, [(a, b)])
    close(ours.embedding(x), reference.post_process_latents(x), 1e-6)
    close(ours.standardised(ours.embedding(x)), x, 1e-5)


def test_padding_that_is_masked_may_be_left_out():
    """Exactly: the same prediction from the 7 tokens of the longest text as from all 11."""
    reference, ours = reference_prior(1)
    condition, x, t = text(), torch.randn(3, 24), torch.tensor([3, 500, 998])
    null = {name: value[:1].expand(3, *value.shape[1:]) for name, value in condition.items()}
    short, _ = shortest(condition, null)
    assert short["text_states"].shape == (3, 7, 24) and short["text_mask"].shape == (3, 7)
    with torch.no_grad():
        close(ours(x, t, **short), run_reference(reference, x, t, **condition), 1e-5)
        hidden = condition | {
            "text_states": torch.where(condition["text_mask"][..., None], condition["text_states"], 9.0)
        }
        close(ours(x, t, **hidden), ours(x, t, **condition), 1e-6)


def test_every_token_of_the_prior_matters():
    """Text, pooled text, time and noisy embedding each move the prediction by far more than the tolerance."""
    _, ours = reference_prior(2)
    condition, x, t = text(), torch.randn(3, 24), torch.tensor([10, 400, 900])
    with torch.no_grad():
        base = ours(x, t, **condition)
        changed = [ours(x + 0.1, t, **condition), ours(x, t + 50, **condition)]
        for name in ("text_states", "text_embeds"):
            changed.append(ours(x, t, **condition | {name: condition[name] + 0.1}))
        changed.append(ours(x, t, **condition | {"text_mask": condition["text_mask"].roll(1, 0)}))
    for out in changed:
        assert (out - base).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------------- decoder


def reference_unet(seed: int = 0):
    torch.manual_seed(seed)
    reference = UNet2DConditionModel(**UNET, **TYPES).eval()
    ours = weights.build(DecoderUNet, **UNET)
    return reference, weights.load(ours, {k: v.clone().requires_grad_() for k, v in reference.state_dict().items()})


@pytest.mark.parametrize("height, width", [(8, 8), (12, 8)])
def test_unet_equals_diffusers(height, width):
    reference, ours = reference_unet()
    x, t, image = torch.randn(2, 4, height, width), torch.tensor([895, 1]), torch.randn(2, 24)
    a, b, e, f = (tensor.clone().requires_grad_() for tensor in (x, x, image, image))
    out = ours(a, t, e)
    expected = reference(b, t, encoder_hidden_states=None, added_cond_kwargs={"image_embeds": f}).sample
    assert out.shape == (2, 8, height, width)
    close(out, expected, 1e-5)
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    gradients_equal(ours, reference, [(a, b), (e, f)])


def test_the_image_embedding_reaches_the_unet_on_both_its_ways():
    _, ours = reference_unet(1)
    x, t, image = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 24)
    with torch.no_grad():
        base = ours(x, t, image)
        for part in (ours.encoder_hid_proj.image_embeds, ours.add_embedding.image_proj):
            kept = part.weight.clone()
            part.weight.mul_(1.1)
            assert (ours(x, t, image) - base).abs().max() > 1e-3
            part.weight.copy_(kept)


# --------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize(
    "component, make",
    [
        ("kandinsky22_prior_transformer", lambda c: PriorTransformer(**named(PriorTransformer, c))),
        ("kandinsky22_decoder_unet", lambda c: DecoderUNet(**named(DecoderUNet, c))),
        ("kandinsky22_prior_text_encoder", lambda c: ClipText(text_config(c), projection=True)),
        ("kandinsky22_prior_image_encoder", lambda c: ClipVision(ClipVisionConfig(**c))),
    ],
)
def test_published_names_and_shapes_load_strictly(component, make):
    """Built from the published config and from nothing else."""
    module = weights.build(make, config(component))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in names_and_shapes(component).items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    assert sum(p.numel() for p in module.parameters()) == about(component)["params"]


def text_config(published: dict) -> ClipTextConfig:
    return ClipTextConfig(**{k: v for k, v in published.items() if k in ClipTextConfig.__annotations__})


@pytest.mark.parametrize("component, network", [("prior_transformer", PriorTransformer), ("decoder_unet", DecoderUNet)])
def test_the_defaults_are_the_published_networks(component, network):
    ours = {name: tuple(tensor.shape) for name, tensor in weights.build(network).state_dict().items()}
    assert ours == names_and_shapes(f"kandinsky22_{component}")


@pytest.mark.parametrize("rank", [4, 8, 16, 24, 32, 48, 64, 80, 96, 128])
def test_adapters_have_the_papers_sizes(rank):
    """Tables 1 and 2 of Chaichuk & Tutubalina 2024 list adapters between these ranks, all of them multiples of
    327,680 (prior) and 205,824 (decoder) but for a misprint: the prior's rank 48 has 15,728,640, not 15,728,649."""
    for network, each in [(PriorTransformer, 327_680), (DecoderUNet, 205_824)]:
        assert sum(p.numel() for p in lora.inject(weights.build(network), rank)) == each * rank


def test_sizes_that_the_paper_prints():
    for network, rank, printed in [
        (PriorTransformer, 4, 1_310_720), (PriorTransformer, 48, 15_728_640), (PriorTransformer, 128, 41_943_040),
        (DecoderUNet, 4, 823_296), (DecoderUNet, 128, 68_288_512 - 41_943_040),
    ]:  # fmt: skip
        assert sum(p.numel() for p in lora.inject(weights.build(network), rank)) == printed


@pytest.mark.parametrize("adapter, network", [("prior", PriorTransformer), ("decoder", DecoderUNet)])
def test_adapters_have_the_published_names(adapter, network):
    module = weights.build(network)
    lora.inject(module, 4)
    ours = {f"base_model.model.{name}": tuple(tensor.shape) for name, tensor in lora.state(module).items()}
    assert ours == names_and_shapes(f"lora/mmcp_k22_{adapter}_r4")


# ----------------------------------------------------------------------------------------------- what CLIP sees of it


@pytest.mark.parametrize("size", [(224, 224), (300, 224), (640, 480), (101, 333), (1280, 1024), (225, 224), (64, 64)])
def test_preprocessing_equals_transformers(size):
    """Shortest side to 224 by Pillow's bicubic filter, centre crop, mean and deviation: to 1/255 of the range."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, resample=3,
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    expected = processor(image, return_tensors="pt").pixel_values[0]
    ours = preprocess(image)
    assert ours.shape == expected.shape
    difference = (ours - expected).abs().amax((1, 2)) * torch.tensor(STD)  # back on the scale of [0, 1]
    assert difference.max() <= 1 / 255
