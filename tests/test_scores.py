"""Metrics: closed forms first, then the libraries that published numbers come from, on the same features."""

import numpy as np
import pytest
import torch
import torchmetrics
from conftest import close
from manifests import names_and_shapes
from pytorch_fid.fid_score import calculate_frechet_distance

from nanomed.metrics import features, inception, scores


def sets(n: int, m: int, d: int, shift: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + m + d)
    mix = torch.randn(d, d, generator=generator) / d**0.5
    a = torch.randn(n, d, generator=generator) @ mix
    b = 1.2 * torch.randn(m, d, generator=generator) @ mix + shift
    return a, b


# --------------------------------------------------------------------------------------------- Frechet distance


def test_frechet_distance_of_gaussians_with_a_closed_form():
    """Commuting covariances: |m|^2 + sum (s_a - s_b)^2."""
    sa, sb = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 2.0]).double()
    mean = torch.tensor([1.0, 0.0, -2.0]).double()
    value = scores.frechet_from_moments(torch.zeros(3).double(), torch.diag(sa), mean, torch.diag(sb))
    assert value == pytest.approx(5 + ((sa.sqrt() - sb.sqrt()) ** 2).sum().item(), rel=1e-12)
    assert scores.frechet_from_moments(mean, torch.diag(sa), mean, torch.diag(sa)) < 1e-9


@pytest.mark.parametrize("n, m, d", [(500, 400, 32), (2100, 2100, 64)])
def test_frechet_distance_equals_pytorch_fid(n, m, d):
    a, b = sets(n, m, d)
    x, y = a.double().numpy(), b.double().numpy()
    moments = x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)
    assert scores.frechet_distance(a, b) == pytest.approx(calculate_frechet_distance(*moments), rel=1e-6)


def test_fewer_samples_than_dimensions_stay_real_and_agree():
    """Singular covariances: the N x N form, the eigenvalue form and a direct product of eigenvalues are one number."""
    a, b = sets(20, 30, 64)
    short = scores.frechet_distance(a, b)
    long = scores.frechet_from_moments(*scores.moments(a), *scores.moments(b))
    product = torch.linalg.eigvals(scores.moments(a)[1] @ scores.moments(b)[1]).real.clamp(min=0).sqrt().sum()
    (ma, ca), (mb, cb) = scores.moments(a), scores.moments(b)
    direct = ((ma - mb) ** 2).sum() + ca.trace() + cb.trace() - 2 * product
    assert short == pytest.approx(long, rel=1e-6) and short == pytest.approx(direct.item(), rel=1e-5)
    assert scores.frechet_distance(a, a) < 1e-6


# ------------------------------------------------------------------------------------------------ KID, IS, P and R


def test_kid_equals_torchmetrics_on_full_subsets():
    """With one subset that holds everything there is nothing random: equal to 1e-6."""
    from torchmetrics.image.kid import poly_mmd

    a, b = sets(60, 60, 16)
    expected = poly_mmd(a.double(), b.double(), degree=3, gamma=None, coef=1.0).item()
    mean, deviation = scores.kernel_distance(a, b, subsets=3, size=60)
    assert mean == pytest.approx(expected, rel=1e-6) and deviation < 1e-9
    subset_mean, spread = scores.kernel_distance(a, b, subsets=200, size=30)
    assert subset_mean == pytest.approx(expected, abs=5 * spread / 200**0.5)


def test_inception_score_equals_torchmetrics():
    """One split, so that the shuffle of torchmetrics does not matter."""
    logits = 3 * torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    probabilities = logits.double().softmax(1)
    entropy = (probabilities * (probabilities.log() - probabilities.mean(0).log())).sum(1).mean().exp().item()
    assert scores.inception_score(logits, splits=1)[0] == pytest.approx(entropy, rel=1e-6)
    assert scores.inception_score(torch.zeros(40, 5), splits=4) == pytest.approx((1.0, 0.0), abs=1e-9)
    sharp = 100 * torch.eye(10).repeat(4, 1)
    assert scores.inception_score(sharp, splits=4, seed=None)[0] == pytest.approx(10.0, rel=1e-6)


@pytest.mark.parametrize("block", [7, 4096])
def test_precision_and_recall_follow_their_definition(block):
    """Against the definition written out with a full distance matrix in float64."""
    real, fake = sets(120, 90, 8, shift=0.6)

    def inside(points, centres):
        radius = torch.cdist(centres.double(), centres.double()).sort(1).values[:, 3]
        return (torch.cdist(points.double(), centres.double()) < radius).any(1).double().mean().item()

    precision, recall = scores.precision_recall(real, fake, block=block)
    assert precision == pytest.approx(inside(fake, real), abs=1e-6)
    assert recall == pytest.approx(inside(real, fake), abs=1e-6)
    assert scores.f1(0.5, 0.25) == pytest.approx(1 / 3) and scores.f1(0.0, 0.0) == 0.0
    assert scores.precision_recall(real, real) == (1.0, 1.0)


def test_precision_and_recall_equal_torch_fidelity():
    """The same k on the same features."""
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    real, fake = sets(150, 130, 8, shift=0.5)
    expected = calculate_precision_recall_full(fake, real, neighborhood=3)
    assert scores.precision_recall(real, fake) == pytest.approx([float(x) for x in expected], abs=1e-6)


@pytest.mark.parametrize("call", [
    lambda: scores.frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3)),
    lambda: scores.inception_score(torch.zeros(3, 4), splits=10),
    lambda: scores.precision_recall(torch.zeros(3, 4), torch.zeros(9, 4)),
])  # fmt: skip
def test_too_few_images_are_refused(call):
    with pytest.raises(ValueError):
        call()


# ------------------------------------------------------------------------------------------------------ Inception


@pytest.fixture(scope="module")
def reference_network():
    """pytorch-fid's network with random weights and batch statistics, which no download is needed for."""
    import torchvision
    from pytorch_fid import inception as theirs

    torch.manual_seed(0)
    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    for name, block in (("5b", theirs.FIDInceptionA(192, 32)), ("5c", theirs.FIDInceptionA(256, 64)),
                        ("5d", theirs.FIDInceptionA(288, 64)), ("6b", theirs.FIDInceptionC(768, 128)),
                        ("6c", theirs.FIDInceptionC(768, 160)), ("6d", theirs.FIDInceptionC(768, 160)),
                        ("6e", theirs.FIDInceptionC(768, 192)), ("7b", theirs.FIDInceptionE_1(1280)),
                        ("7c", theirs.FIDInceptionE_2(2048))):  # fmt: skip
        setattr(network, f"Mixed_{name}", block)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@torch.no_grad()
def test_inception_equals_pytorch_fids_network_folded_or_not(reference_network):
    """Features to 1e-5; folding BatchNorm and channels-last change nothing beyond rounding."""
    ours = inception.Inception()
    ours.load_state_dict(reference_network.state_dict())
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    fc, reference_network.fc = reference_network.fc, torch.nn.Identity()
    expected = reference_network(x)
    reference_network.fc = fc
    plain, logits = ours.eval()(x)
    close(plain, expected, 1e-6)
    close(logits, expected @ fc.weight.T, 1e-5)
    close(ours.fast()(x.to(memory_format=torch.channels_last))[0], expected, 1e-5)


def test_inception_has_the_published_names():
    with torch.device("meta"):
        network = inception.Inception()
    ours = {n: tuple(t.shape) for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert ours == names_and_shapes("inception_v3_fid")


def test_the_published_pickle_loads_and_a_missing_one_says_where_it_goes(reference_network, tmp_path):
    from nanomed.weights import WeightsError

    torch.save(reference_network.state_dict(), tmp_path / inception.FILE)
    network = inception.load(tmp_path)
    assert network.Conv2d_1a_3x3.conv.bias is not None and not network.fc.weight.requires_grad
    with pytest.raises(WeightsError, match=r"weights/inception/.*--inception FILE"):
        inception.load(folder=str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------ protocols


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (400, 310)])
def test_tf_resize_is_torch_fidelitys(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    expected = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    close(features.tf1_resize(images.float(), 299), expected, 1e-5)


def test_protocols_differ_as_published():
    """What each front end feeds the network, against its library's own arithmetic."""
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    unit = torch.nn.functional.interpolate(images / 255, size=(299, 299), mode="bilinear", align_corners=False)
    close(features.PROTOCOLS["pytorch-fid"](images), 2 * unit - 1, 1e-6)
    outputs = [protocol(images) for protocol in features.PROTOCOLS.values()]
    for i, a in enumerate(outputs):
        assert a.shape == (2, 3, 299, 299) and a.abs().max() < 2
        assert all((a - b).abs().mean() > 1e-3 for b in outputs[:i])


@torch.no_grad()
def test_fid_from_pixels_equals_torchmetrics_with_the_same_network(reference_network):
    """torchmetrics >= 1.8 takes our network as its feature and resizes by itself: 1e-3 relative from pixels."""
    network = inception.Inception()
    network.load_state_dict(reference_network.state_dict())
    network.fast()

    class Feature(torch.nn.Module):
        num_features = 2048

        def forward(self, x):
            return network(features.PROTOCOLS["torchmetrics"](x))[0]

    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (12, 64, 64, 3), np.uint8)
    fake = np.clip(real.astype(int) // 2 + rng.integers(0, 90, real.shape), 0, 255).astype(np.uint8)
    metric = torchmetrics.image.fid.FrechetInceptionDistance(feature=Feature(), normalize=False)
    metric.set_dtype(torch.float64)
    for images, is_real in ((real, True), (fake, False)):
        metric.update(torch.from_numpy(images).permute(0, 3, 1, 2), real=is_real)
    a = features.inception_features(network, list(real), "torchmetrics", batch=5)[0]
    b = features.inception_features(network, list(fake), "torchmetrics")[0]
    assert scores.frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=1e-3)
