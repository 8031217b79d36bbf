"""Images to features: how pixels are brought to a network's size is half of every FID, so it has names here.

tf            TF1 bilinear: corners aligned at zero, no antialiasing. torch-fidelity and torchmetrics <= 1.7, which
              is what the papers used
pytorch-fid   half-pixel bilinear without antialiasing, images scaled to [-1, 1]
torchmetrics  half-pixel bilinear with antialiasing: torchmetrics >= 1.8
clean         Pillow's antialiased bicubic (Parmar et al. 2022)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nanomed.metrics import classifier, inception
from nanomed.metrics.scores import frechet_distance

SIDE = 299


def tf1_resize(images: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1 did it: output pixel i samples input i * in / out, with no half-pixel shift."""

    def taps(length: int) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.arange(side, dtype=torch.float32) * (length / side)
        low = at.floor().long()
        return low, (low + 1).clamp(max=length - 1), at - low

    y0, y1, wy = taps(images.shape[2])
    x0, x1, wx = taps(images.shape[3])
    wy = wy[:, None]
    top, bottom = images[:, :, y0], images[:, :, y1]
    top = top[..., x0] + (top[..., x1] - top[..., x0]) * wx
    bottom = bottom[..., x0] + (bottom[..., x1] - bottom[..., x0]) * wx
    return top + (bottom - top) * wy


def _tf(images: Tensor) -> Tensor:
    return (tf1_resize(images.float(), SIDE) - 128) / 128


def _pytorch_fid(images: Tensor) -> Tensor:
    x = F.interpolate(images.float() / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * x - 1


def _torchmetrics(images: Tensor) -> Tensor:
    x = F.interpolate(images.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return (x - 128) / 128


def _clean(images: Tensor) -> Tensor:
    """Each channel on its own, in floating point, as clean-fid does it."""
    out = torch.empty(len(images), 3, SIDE, SIDE)
    for i, image in enumerate(images.float().numpy()):
        for c, plane in enumerate(image):
            out[i, c] = torch.from_numpy(
                np.array(Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            )
    return (out - 128) / 128


PROTOCOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "tf": _tf,
    "pytorch-fid": _pytorch_fid,
    "torchmetrics": _torchmetrics,
    "clean": _clean,
}


def batched(images: Iterable[np.ndarray], size: int) -> Iterator[Tensor]:
    """uint8 images (H, W, 3) as batches (B, 3, H, W); a batch ends where the size of the images changes."""
    source, batch = iter(images), []
    for image in source:
        if batch and (len(batch) == size or image.shape != batch[0].shape):
            yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
            batch = []
        batch.append(image)
    if batch:
        yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)


def inception_features(
    network: inception.Inception, images: Iterable[np.ndarray], protocol: str = "tf", batch: int = 32
) -> tuple[Tensor, Tensor]:
    """(features (N, 2048), logits (N, 1008)) of uint8 images, streamed."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}")
    device = network.fc.weight.device
    found = []
    for pixels in batched(images, batch):
        x = PROTOCOLS[protocol](pixels).to(device, memory_format=torch.channels_last)
        found.append([y.cpu() for y in network(x)])
    return torch.cat([features for features, _ in found]), torch.cat([logits for _, logits in found])


def toy_features(network: classifier.ToyClassifier, images: Iterable[np.ndarray], batch: int = 64) -> Tensor:
    """Features (N, 128) of the toy classifier for uint8 images of any size."""
    found = []
    for pixels in batched(images, batch):
        x = F.interpolate(pixels.float() / 127.5 - 1, (classifier.SIDE,) * 2, mode="bilinear", antialias=True)
        found.append(network(x)[0])
    return torch.cat(found)


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
