"""Protocols: from the same pixels and the same network, the features and distances of the library each is named after.

The network has random weights and batch statistics, so nothing is downloaded. Images have structure (gradients
and blobs) and several sizes, smaller and larger than 299, because that is where the front ends differ.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import close
from manifests import names_and_shapes
from pytorch_fid.fid_score import calculate_frechet_distance

from nanomed.metrics import features, scores
from nanomed.metrics.networks import inception


def pictures(count: int, side: tuple[int, int], seed: int) -> list[np.ndarray]:
    """Gradients, a blob and some noise, in colours of their own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : side[0], 0 : side[1]] / max(side)
    found = []
    for _ in range(count):
        ramp = np.multiply.outer(x * rng.normal() + y * rng.normal(), rng.uniform(0, 200, 3))
        blob = np.multiply.outer(
            np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8)) < 0.2, rng.normal(0, 90, 3)
        )
        found.append(np.clip(110 + ramp + blob + rng.normal(0, 12, (*side, 3)), 0, 255).astype(np.uint8))
    return found


def random_inception():
    """pytorch-fid's network with random weights and the batch statistics of some pictures.

    The statistics matter: with arbitrary ones the features of all images are alike to 1e-5, and every front end passes.
    """
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
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # plain averages, here of one batch
            torch.nn.init.uniform_(module.weight, 0.8, 1.6)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    some = torch.from_numpy(np.stack(pictures(6, (299, 299), 9))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        network.train()(some)
    return network.eval().requires_grad_(False)


PUBLISHED = Path(__file__).parents[1] / "weights" / "inception" / inception.FILE


@pytest.fixture(scope="module", params=["random"] + ["published"] * PUBLISHED.is_file())
def reference_network(request):
    """Random weights always; where the published file is there, everything again with it."""
    network = random_inception()
    if request.param == "published":
        network.load_state_dict(torch.load(PUBLISHED, weights_only=True))
    return network


@pytest.fixture(scope="module")
def network(reference_network):
    """Ours with its weights, folded and channels-last as it is used."""
    ours = inception.Inception()
    ours.load_state_dict(reference_network.state_dict())
    return ours.requires_grad_(False).fast()


@pytest.fixture(scope="module")
def published(reference_network, tmp_path_factory):
    """The same weights as the file that libraries load."""
    path = tmp_path_factory.mktemp("inception") / inception.FILE
    torch.save(reference_network.state_dict(), path)
    return path


def pool3(reference, x: torch.Tensor) -> torch.Tensor:
    fc, reference.fc = reference.fc, torch.nn.Identity()
    out = reference(x)
    reference.fc = fc
    return out


# ------------------------------------------------------------------------------------------------------ the network


def test_inception_equals_pytorch_fids_network_folded_or_not(reference_network, network):
    """Features to 1e-5 relative; folding BatchNorm and channels-last change nothing beyond rounding."""
    plain = inception.Inception().eval().requires_grad_(False)
    plain.load_state_dict(reference_network.state_dict())
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = pool3(reference_network, x)
    for ours in (plain, network):
        found, logits = ours(x.to(memory_format=torch.channels_last))
        assert ((found - expected).norm() / expected.norm()).item() < 1e-5
        close(found, expected, 1e-5)
        close(logits, expected @ reference_network.fc.weight.T, 1e-5)


def test_inception_has_the_published_names():
    with torch.device("meta"):
        empty = inception.Inception()
    ours = {n: tuple(t.shape) for n, t in empty.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert ours == names_and_shapes("inception_v3_fid")


def test_the_published_pickle_loads_and_a_missing_one_says_where_it_goes(published, tmp_path):
    from nanomed.weights import WeightsError

    loaded = inception.load(published.parent)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(WeightsError, match=r"weights/inception/.*--inception FILE"):
        inception.load(folder=str(tmp_path / "nowhere"))


# -------------------------------------------------------------------------------------------------- the front ends


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (400, 310)])
def test_tf_resize_is_torch_fidelitys(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    expected = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    close(features.tf1_resize(images.float(), 299), expected, 1e-5)


@pytest.mark.parametrize("size", [(64, 64), (256, 320), (576, 720)])
def test_clean_resize_is_clean_fids(size):
    """The function that clean-fid resizes with, and the recipe it stands for: Pillow's bicubic, a channel at a time in
    floating point, what overshoots cut off, nothing rounded."""
    from cleanfid.resize import build_resizer
    from PIL import Image

    (image,) = pictures(1, size, 3)
    image[:8, :8] = 255  # a corner that the bicubic overshoots
    image[8:16, :8] = 0
    theirs = torch.from_numpy(build_resizer("clean")(image)).permute(2, 0, 1)
    channels = [Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC) for c in range(3)]
    recipe = torch.from_numpy(np.stack(channels))
    assert recipe.max() > 255 and recipe.min() < 0
    close(theirs, recipe.clamp(0, 255), 1e-6)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    close(features.PROTOCOLS["clean"](pixels)[0], (theirs - 128) / 128, 1e-6)


def test_protocols_differ():
    images = torch.from_numpy(np.stack(pictures(2, (128, 128), 4))).permute(0, 3, 1, 2)
    outputs = [protocol(images) for protocol in features.PROTOCOLS.values()]
    for i, a in enumerate(outputs):
        assert a.shape == (2, 3, 299, 299) and a.abs().max() <= 1
        assert all((a - b).abs().mean() > 1e-3 for b in outputs[:i])


# ------------------------------------------------------------------------------- features and distances from pixels

SIZES = ((256, 256), (120, 160))


def torch_fidelitys(published, reference_network):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"], str(published))
    return extractor


def pytorch_fids(published, reference_network):
    """ToTensor on every image, then what InceptionV3.forward does before its first block."""
    from pytorch_fid.inception import InceptionV3
    from torchvision.transforms.functional import to_tensor

    class Blocks(torch.nn.Module):
        resize_input, normalize_input, last_needed_block, output_blocks = True, True, 0, [0]
        blocks = [lambda x: pool3(reference_network, x)]
        forward = InceptionV3.forward

    blocks = Blocks()

    def extract(images: torch.Tensor) -> tuple[torch.Tensor]:
        arrays = images.permute(0, 2, 3, 1).numpy()
        return tuple(blocks(torch.stack([to_tensor(array) for array in arrays])))

    return extract


def torchmetricss(published, reference_network):
    from torchmetrics.image.fid import NoTrainInceptionV3

    extractor = NoTrainInceptionV3("random", ["2048"], str(published))
    return lambda images: (extractor(images),)


@pytest.mark.parametrize("protocol, library", [
    ("tf", torch_fidelitys), ("pytorch-fid", pytorch_fids), ("torchmetrics", torchmetricss),
])  # fmt: skip
def test_features_and_fid_from_pixels_are_the_librarys(protocol, library, network, reference_network, published):
    """Features to 1e-4 (torch-fidelity's own bound), the distance of 8 to 8 images to 1e-3 relative. Theirs is
    pytorch-fid's function, over the four features that vary most, so that 8 images give a regular covariance."""
    extract = library(published, reference_network)
    ours, theirs = [], []
    for seed in (0, 1):
        images = [image for size in SIZES for image in pictures(4, size, seed)]
        found, logits = features.inception_features(network, images, protocol, batch=5)  # of which one is mixed
        expected = [extract(torch.from_numpy(np.stack(same)).permute(0, 3, 1, 2)) for same in (images[:4], images[4:])]
        expected = [torch.cat(parts) for parts in zip(*expected)]
        close(found, expected[0], 1e-4)
        assert ((found - expected[0]).norm(dim=1) / expected[0].norm(dim=1)).max() < 1e-4
        if len(expected) > 1:  # torch-fidelity's logits for the Inception Score
            close(logits, expected[1], 1e-4)
        ours.append(found)
        theirs.append(expected[0])
    vary = torch.cat(theirs).var(0).topk(4).indices
    moments = [
        m for x in theirs for m in (x[:, vary].numpy().mean(0), np.cov(x[:, vary].double().numpy(), rowvar=False))
    ]
    assert scores.frechet_distance(*(x[:, vary] for x in ours)) == pytest.approx(
        calculate_frechet_distance(*moments), rel=1e-3
    )


def test_torchmetrics_with_our_network_as_its_feature(network):
    """The other way to its numbers: its FID, with our front end and network inside, and its KID."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Feature(torch.nn.Module):
        num_features = 128

        def forward(self, x):
            return network(features.PROTOCOLS["torchmetrics"](x))[0][:, ::16]

    fid = FrechetInceptionDistance(feature=Feature(), normalize=False)
    fid.set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=Feature(), subsets=1, subset_size=4)
    found = []
    for seed in (0, 1):
        images = pictures(4, (96, 96), seed)
        for metric in (fid, kid):
            metric.update(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), real=not seed)
        found.append(features.inception_features(network, images, "torchmetrics", batch=3)[0][:, ::16])
    assert scores.frechet_distance(*found) == pytest.approx(fid.compute().item(), rel=1e-3)
    value = scores.kernel_distance(*found, subsets=1, size=4)[0]
    assert value == pytest.approx(kid.compute()[0].item(), rel=1e-3)


# --------------------------------------------------------------------------------------------------------- streaming


def test_images_of_mixed_sizes_keep_their_order_and_fill_their_batches():
    """A cheap stand-in for a protocol: every image becomes its own mean."""
    sizes = [(4, 6), (6, 4), (4, 6), (5, 5), (6, 4), (4, 6), (4, 6)]
    images = [np.full((*size, 3), 10 * i, np.uint8) for i, size in enumerate(sizes)]
    seen = []

    def mean(pixels):
        seen.append(tuple(pixels.shape))
        return pixels.float().mean((2, 3), keepdim=True)

    batches = list(features.resized(iter(images), mean, batch=4))
    assert [len(batch) for batch in batches] == [4, 3]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == [10.0 * i for i in range(7)]
    assert seen == [(2, 3, 4, 6), (1, 3, 6, 4), (1, 3, 5, 5), (1, 3, 6, 4), (2, 3, 4, 6)]


def test_no_more_images_are_read_than_a_batch_holds():
    read = []

    def source():
        for i in range(100):
            read.append(i)
            yield np.zeros((4, 4, 3), np.uint8)

    stream = features.resized(source(), lambda x: x.float(), batch=8)
    next(stream)
    assert len(read) == 8


def test_a_share_without_images_gives_no_features_and_odd_images_are_named(network):
    """A rank may have nothing to do; grey, transparent or floating images are the reader's business to convert."""
    found, logits = features.inception_features(network, [])
    assert found.shape == (0, 2048) and logits.shape == (0, 1008)
    good = np.zeros((8, 8, 3), np.uint8)
    for bad in (good[..., 0], np.zeros((8, 8, 4), np.uint8), good.astype(np.float32)):
        with pytest.raises(ValueError, match="image 1: features are of uint8"):
            features.inception_features(network, [good, bad])
    with pytest.raises(ValueError, match=r"--protocol legacy: choose one of tf, pytorch-fid"):
        features.inception_features(network, [good], "legacy")
