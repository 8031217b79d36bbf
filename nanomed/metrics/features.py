"""Images to features: how pixels are brought to a network's size is half of every FID, so it has names here.

Images are uint8 arrays (H, W, 3) of any sizes, from any iterable; a batch of them is held at a time.

tf            TF1 bilinear: corners aligned at zero, no antialiasing. torch-fidelity and torchmetrics <= 1.7, which
              is what the papers used
pytorch-fid   half-pixel bilinear without antialiasing, images scaled to [-1, 1]
torchmetrics  half-pixel bilinear with antialiasing: torchmetrics >= 1.8
clean         Pillow's antialiased bicubic (Parmar et al. 2022)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nanomed.metrics.networks import classifier, inception
from nanomed.metrics.scores import frechet_distance

SIDE = 299
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tf1_resize(images: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1 did it: output pixel i samples input i * in / out, with no half-pixel shift.

    Aligned corners give i * (in' - 1) / (out' - 1): that grid, once both sides have one pixel more.
    """
    padded = F.pad(images, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(padded, (side + 1, side + 1), mode="bilinear", align_corners=True)[:, :, :side, :side]


def _tf(images: Tensor) -> Tensor:
    return (tf1_resize(images.float(), SIDE) - 128) / 128


def _pytorch_fid(images: Tensor) -> Tensor:
    x = F.interpolate(images.float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * x - 1


def _torchmetrics(images: Tensor) -> Tensor:
    x = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return (x - 128) / 128


def _clean(images: Tensor) -> Tensor:
    """Each channel on its own in floating point; what the bicubic overshoots is cut off, nothing is rounded."""
    planes = images.cpu().float().flatten(0, 1).numpy()
    small = [np.asarray(Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for plane in planes]
    out = torch.from_numpy(np.stack(small)).clamp_(0, 255).view(len(images), 3, SIDE, SIDE)
    return (out.to(images.device) - 128) / 128


def pillow(pixels: Tensor, height: int, width: int, how: Image.Resampling) -> Tensor:
    """uint8 (B, 3, H, W) to uint8 (B, 3, height, width) by one of Pillow's antialiased filters, on its own numbers."""
    images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
    small = np.stack([np.asarray(image.resize((width, height), how)) for image in images])
    return torch.from_numpy(small).permute(0, 3, 1, 2).to(pixels.device)


def imagenet(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) by the mean and deviation of ImageNet's pixels."""
    x = pixels.float() / 255
    mean, deviation = (x.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / deviation


def for_dino(pixels: Tensor) -> Tensor:
    """As dgm-eval brings images to DINOv2 (Stein et al. 2023): stretched to 224 x 224, bicubic."""
    return imagenet(pillow(pixels, 224, 224, Image.Resampling.BICUBIC))


def for_swav(pixels: Tensor) -> Tensor:
    """As dgm-eval brings images to SwAV: their shorter side to 224, bilinear; the longer one as it comes."""
    height, width = pixels.shape[-2:]
    if max(height, width) > 16 * min(height, width):
        raise ValueError(f"an image of {width} x {height} pixels is too long: its shorter side becomes 224; crop it")
    if width <= height:
        size = int(224 * height / width), 224
    else:
        size = 224, int(224 * width / height)
    return imagenet(pillow(pixels, *size, Image.Resampling.BILINEAR))


PROTOCOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "tf": _tf,
    "pytorch-fid": _pytorch_fid,
    "torchmetrics": _torchmetrics,
    "clean": _clean,
}


def resized(
    images: Iterable[np.ndarray], resize: Callable[[Tensor], Tensor], batch: int, device="cpu"
) -> Iterator[Tensor]:
    """Batches (B, 3, S, S) of images in their order, after `resize` took them to one size.

    `resize` sees uint8 tensors (B, 3, H, W) of one size each: images of the same size within a batch go together.
    Raises ValueError for an image that is not uint8 (H, W, 3).
    """
    source = enumerate(images)
    while held := list(islice(source, batch)):
        places: dict[tuple[int, ...], list[int]] = {}
        for place, (i, image) in enumerate(held):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"image {i}: features are of uint8 (H, W, 3), not {image.dtype} {image.shape}")
            places.setdefault(image.shape, []).append(place)
        parts = []
        for same in places.values():
            pixels = torch.from_numpy(np.stack([held[place][1] for place in same]))
            parts.append(resize(pixels.to(device).permute(0, 3, 1, 2)))
        order = torch.tensor([place for same in places.values() for place in same])
        yield torch.cat(parts)[order.argsort()] if len(parts) > 1 else parts[0]


def inception_features(
    network: inception.Inception, images: Iterable[np.ndarray], protocol: str = "tf", batch: int = 32
) -> tuple[Tensor, Tensor]:
    """(features (N, 2048), logits (N, 1008)) of uint8 images, streamed; on the CPU in float32, (0, ...) for no images.

    A rank calls this with its own share of the images. Raises ValueError for an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}")
    weight = network.fc.weight
    features, logits = [torch.empty(0, weight.shape[1])], [torch.empty(0, weight.shape[0])]
    for x in resized(images, PROTOCOLS[protocol], batch, weight.device):
        found = network(x.contiguous(memory_format=torch.channels_last))
        features.append(found[0].float().cpu())
        logits.append(found[1].float().cpu())
    return torch.cat(features), torch.cat(logits)


def embedded(
    network: Callable[[Tensor], Tensor],
    images: Iterable[np.ndarray],
    resize: Callable[[Tensor], Tensor],
    batch: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Features (N, D) that `network` gives for uint8 images of any sizes, once `resize` has brought them to it; on the
    CPU in float32, (0, 0) for no images."""
    found = [network(x).float().cpu() for x in resized(images, resize, batch, device)]
    return torch.cat(found) if found else torch.empty(0, 0)


def toy_features(network: classifier.ToyClassifier, images: Iterable[np.ndarray], batch: int = 64) -> Tensor:
    """Features (N, 128) of the toy classifier for uint8 images of any size."""

    def resize(pixels: Tensor) -> Tensor:
        return F.interpolate(pixels.float() / 127.5 - 1, (classifier.SIDE,) * 2, mode="bilinear", antialias=True)

    found = [network(x)[0].cpu() for x in resized(images, resize, batch, network.head.weight.device)]
    return torch.cat([torch.empty(0, network.features.out_features), *found])


def frechet_to(
    real: Sequence[np.ndarray], toy: bool, folder: str | None = None
) -> tuple[Callable[[Tensor], float] | None, str]:
    """A function from uint8 images (N, S, S, 3) to their Frechet distance from `real`, and its name.

    FID where the Inception file is found; for the toy world its classifier; else (None, "").
    """
    try:
        network = inception.load(folder=folder)
    except inception.weights.WeightsNotFound:
        network = None
    if network is not None:
        features = inception_features(network, real)[0]
        return lambda images: frechet_distance(features, inception_features(network, images.numpy())[0]), "FID (tf)"
    if not toy:
        return None, ""
    shipped = inception.weights.find("msdm-tiny", folder) / "classifier.safetensors"
    if not Path(shipped).is_file():
        return None, ""
    stand_in = classifier.load(shipped)
    features = toy_features(stand_in, real)
    return lambda images: frechet_distance(features, toy_features(stand_in, images.numpy())), classifier.NAME
