"""ViT against transformers, value for value and gradient for gradient, and the published files' tensors and labels."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import close
from manifests import about, config, names_and_shapes
from PIL import Image
from safetensors.torch import load_file

from nanomed import weights
from nanomed.metrics import scores
from nanomed.metrics.networks import vit

MANIFESTS = ["vit_base_patch16_224_in21k", "vit_kvasir_v2_classifier", "vit_skin_cancer_classifier"]
SMALL = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, image_size=32,
             patch_size=8)  # fmt: skip
LABELS = ["cecum", "polyps", "z-line", "esophagitis", "pylorus"]


def saved(folder, kind: str, **settings) -> torch.nn.Module:
    """transformers' network with random weights everywhere, saved as it publishes them, and as `.bin` where asked."""
    torch.manual_seed(0)
    named = dict(enumerate(LABELS))
    c = transformers.ViTConfig(**SMALL | settings, id2label=named, label2id={b: a for a, b in named.items()})
    make = transformers.ViTModel if kind == "backbone" else transformers.ViTForImageClassification
    reference = make(c).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(folder)
    if kind == "pickle":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return reference


def assert_gradients_equal(ours: torch.nn.Module, reference: torch.nn.Module, skip: str = "pooler") -> None:
    """To 1e-5 of the largest one. A parameter's partner is the one with its very values: transformers 5 calls them by
    other names in memory than in its files."""
    theirs = [p for name, p in reference.named_parameters() if skip not in name]
    largest = max(p.grad.abs().max() for p in theirs)
    mine = [p for name, p in ours.named_parameters() if skip not in name]
    assert len(mine) == len(theirs) and largest > 0
    for parameter in mine:
        partner = next(p for p in theirs if p.shape == parameter.shape and torch.equal(p, parameter))
        assert (parameter.grad - partner.grad).abs().max() <= 1e-5 * largest


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("kind", ["classifier", "pickle"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_saved_classifier_loads_and_equals_transformers(tmp_path, kind, bias):
    """Logits, class token, labels, and every gradient, from `model.safetensors` and from `pytorch_model.bin` alone."""
    reference = saved(tmp_path, kind, qkv_bias=bias)
    ours = vit.load(tmp_path)
    assert isinstance(ours, vit.VitClassifier) and list(ours.config.labels) == LABELS
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    x = torch.randn(3, 3, 32, 32)
    expected = reference(x, output_hidden_states=True)
    with torch.no_grad():
        close(ours(x), expected.logits, 1e-5)
        close(ours.class_token(x), reference.vit(x).last_hidden_state[:, 0], 1e-5)
    ours.requires_grad_(True)
    probe = torch.randn(3, len(LABELS))
    (ours(x) * probe).sum().backward()
    (expected.logits * probe).sum().backward()
    assert_gradients_equal(ours, reference)


def test_a_saved_backbone_loads_with_its_pooler_and_equals_transformers(tmp_path):
    reference = saved(tmp_path, "backbone")
    ours = vit.load(tmp_path)
    assert isinstance(ours, vit.Vit)
    x = torch.randn(2, 3, 32, 32)
    expected = reference(x)
    with torch.no_grad():
        close(ours(x), expected.last_hidden_state, 1e-5)
        close(ours.pooled(x), expected.pooler_output, 1e-5)
    ours.requires_grad_(True)
    probe = torch.randn_like(expected.last_hidden_state)
    (ours(x) * probe).sum().backward()
    (expected.last_hidden_state * probe).sum().backward()
    assert_gradients_equal(ours, reference)


def test_a_vit_of_the_published_shape_equals_transformers():
    """One layer of ViT-B/16 at 224 x 224: 197 tokens, 12 heads, eps 1e-12."""
    reference = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1), add_pooling_layer=False).eval()
    ours = vit.Vit(vit.VitConfig(num_hidden_layers=1)).eval()
    saved_names = {name.replace("layers.", "encoder.layer.", 1): t for name, t in reference.state_dict().items()}
    for new, old in (("attention.q_proj", "attention.attention.query"), ("attention.k_proj", "attention.attention.key"),
                     ("attention.v_proj", "attention.attention.value"), ("attention.o_proj", "attention.output.dense"),
                     ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")):  # fmt: skip
        saved_names = {name.replace(new, old): t for name, t in saved_names.items()}
    weights.load(ours, saved_names)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        close(ours(x), reference(x).last_hidden_state, 1e-5)


# ---------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize("component", MANIFESTS)
def test_published_tensors_load_strictly(component, tmp_path):
    """Names, shapes and the number of parameters of all three repositories, from their `config.json`."""
    published = config(component)
    labels = published.pop("id2label", [])
    published["id2label"] = {str(number): label for number, label in enumerate(labels)}
    (tmp_path / "config.json").write_text(json.dumps(published | {"model_type": "vit"}))
    c = vit.VitConfig.from_json(tmp_path)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in names_and_shapes(component).items()}
    if labels:
        network = weights.build(vit.VitClassifier, c)
        assert list(c.labels) == labels
    else:
        network = weights.build(vit.Vit, c, pooler=True)
    network.load_state_dict(tensors, strict=True, assign=True)
    assert sum(p.numel() for p in network.parameters()) == about(component)["params"]


def test_labels_come_in_the_order_of_their_numbers(tmp_path):
    """Past ten classes the order of the text is not that of the numbers."""
    table = {str(number): f"class {number}" for number in range(12)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": dict(sorted(table.items()))}))
    assert vit.VitConfig.from_json(tmp_path).labels == tuple(f"class {number}" for number in range(12))


def test_a_folder_that_is_not_a_vit_is_refused_by_name(tmp_path):
    with pytest.raises(weights.WeightsError, match="config.json is missing"):
        vit.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(weights.WeightsError, match="not the configuration of a ViT .*bert"):
        vit.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"1": "a"}}))
    with pytest.raises(weights.WeightsError, match="id2label"):
        vit.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "relu"}))
    with pytest.raises(weights.WeightsError, match="no model.safetensors"):
        vit.load(tmp_path)
    with pytest.raises(weights.WeightsError, match="'relu'"):
        vit.Vit(vit.VitConfig(hidden_act="relu"))


def test_weights_of_another_shape_and_pickled_code_are_refused(tmp_path):
    saved(tmp_path, "pickle")
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(weights.WeightsError, match="classifier.weight"):
        vit.load(tmp_path)
    torch.save({"classifier.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(weights.WeightsError, match="not a plain pickle"):
        vit.load(tmp_path)


# ------------------------------------------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("height, width", [(64, 64), (300, 200), (225, 640), (7, 9), (224, 224)])
def test_preprocessing_equals_transformers(height, width):
    """Its Pillow processor, on sizes above and below 224: 1/255 is the bar, and the same floats are what comes."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil(size={"height": 224, "width": 224}, resample=Image.Resampling.BILINEAR,
                                     image_mean=[0.5] * 3, image_std=[0.5] * 3)  # fmt: skip
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = torch.as_tensor(np.asarray(processor(Image.fromarray(image), return_tensors="np").pixel_values[0]))
    ours = vit.preprocess(image)
    assert (ours - expected).abs().max() <= 1e-6
    assert torch.equal(ours, vit.preprocess(Image.fromarray(image)))


def test_a_grey_image_has_three_equal_channels():
    grey = vit.preprocess(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), 16)
    assert grey.shape == (3, 16, 16) and torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


# ----------------------------------------------------------------------------------------------------------- features


def test_features_stream_and_do_not_depend_on_the_batch(tmp_path):
    saved(tmp_path, "classifier")
    network = vit.load(tmp_path)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (int(h), int(w), 3), dtype=np.uint8) for h, w in rng.integers(20, 60, (11, 2))]
    one, many = (vit.classifier_features(network, iter(images), batch) for batch in (1, 4))
    assert one.shape == (11, 48) and not one.requires_grad
    close(many, one, 1e-5)
    expected = network.class_token(torch.stack([vit.preprocess(image, 32) for image in images]))
    close(one, expected, 1e-5)
    assert vit.classifier_features(network, []).shape == (0, 48)


def test_kfd_is_zero_for_the_same_images_and_grows_with_their_distance(tmp_path):
    saved(tmp_path, "classifier")
    network = vit.load(tmp_path)
    rng = np.random.default_rng(0)
    images = rng.integers(60, 200, (80, 32, 32, 3)).astype(np.uint8)
    features = vit.classifier_features(network, images)
    shifts = [vit.classifier_features(network, images + np.uint8(shift)) for shift in (5, 25, 50)]
    distances = [scores.frechet_distance(features, shifted) for shifted in shifts]
    assert scores.frechet_distance(features, features) < 1e-6 < distances[0] < distances[1] < distances[2]


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="looks at 32 x 32"):
        vit.Vit(vit.VitConfig(**SMALL))(torch.zeros(1, 3, 16, 16))


def test_a_fresh_network_depends_on_its_seed_alone():
    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(3)
        network = vit.VitClassifier(vit.VitConfig(**SMALL, labels=("a", "b")))
        vit.initialise(network, seed)
        return network.state_dict()

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])
    weight = first["vit.encoder.layer.0.intermediate.dense.weight"]
    assert weight.abs().max() <= 0.04 and 0.015 < weight.std() < 0.02
