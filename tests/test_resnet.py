"""SwAV's ResNet-50 against torchvision's and the public loader's padding, from its file and from pixels."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from conftest import close
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

from nanomed import weights
from nanomed.evaluation import extractors
from nanomed.metrics import features
from nanomed.metrics.networks import resnet
from nanomed.weights import WeightsError


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """torchvision's, with statistics that are not those of a network that has seen nothing."""
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, std=0.1)
    net.fc = torch.nn.Identity()
    return net.eval()


@pytest.fixture(scope="module")
def file(reference, tmp_path_factory):
    """As published: names of a network on several devices, the projection head and the prototypes with it."""
    tensors = {f"module.{name}": tensor for name, tensor in reference.state_dict().items()}
    tensors["module.projection_head.0.weight"] = torch.zeros(8, 8)
    tensors["module.prototypes.weight"] = torch.zeros(3, 8)
    path = tmp_path_factory.mktemp("swav") / resnet.FILE
    torch.save(tensors, path)
    return path


def test_it_equals_torchvision_value_and_gradient(reference, file):
    ours = resnet.load(file)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    exact, theirs = copy.deepcopy(ours).double(), copy.deepcopy(reference).double()
    for size in ((64, 64), (65, 90)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            close(ours(x), reference(x), 1e-5)
        x, probe = x.double().requires_grad_(), torch.randn(2, 2048).double()  # a float32 ReLU may open by rounding
        a, b = (net(x) for net in (exact, theirs))
        close(a, b, 1e-10)
        (mine,), (expected,) = (torch.autograd.grad((out * probe).sum(), x) for out in (a, b))
        assert (mine - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_the_padding_of_the_public_code_is_three_in_two_steps(reference, file):
    """One pixel around the image, two in the convolution."""
    ours, x = resnet.load(file), torch.randn(1, 3, 40, 40)
    two = torch.nn.functional.conv2d(torch.nn.ConstantPad2d(1, 0.0)(x), ours.conv1.weight, stride=2, padding=2)
    with torch.no_grad():
        close(ours.conv1(x), two, 1e-6)


def test_a_safetensors_copy_is_the_same_network(reference, file, tmp_path):
    save_file({name: t.contiguous() for name, t in reference.state_dict().items()}, tmp_path / "swav.safetensors")
    again = resnet.load(tmp_path / "swav.safetensors")
    assert weights.fingerprint(again) == weights.fingerprint(resnet.load(file))
    assert sum(p.numel() for p in again.parameters()) == 23_508_032


def test_features_are_those_of_the_public_preprocessing(reference, file):
    """The shorter side to 224 by torchvision's transforms; images of several shapes in one batch."""
    public = transforms.Compose([
        transforms.Resize(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 64), (70, 97), (131, 60), (70, 97))]
    found = extractors.swav(str(file.parent), 4, "cpu").columns(images)["features"]
    for image, row in zip(images, found):
        x = public(Image.fromarray(image))[None]
        close(features.for_swav(torch.from_numpy(image).permute(2, 0, 1)[None]), x, 1e-6)
        with torch.no_grad():
            close(row[None], reference(x), 1e-5)


def test_what_is_no_resnet_or_no_plain_file_is_refused(tmp_path):
    torch.save({"module.conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / resnet.FILE)
    with pytest.raises(WeightsError, match="missing"):
        resnet.load(tmp_path / resnet.FILE)
    torch.save({"arch": print}, tmp_path / resnet.FILE)
    with pytest.raises(WeightsError, match="not a plain pickle"):
        resnet.load(tmp_path / resnet.FILE)
