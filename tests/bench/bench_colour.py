"""What HLDF does to colours: the toy world, from a model whose colours are wrong.

    python tests/bench/bench_colour.py                       about 6 minutes of one thread; prints the table
    python tests/bench/bench_colour.py --picture FILE.png    and the same prompts and noise under each model

The shipped `weights/msdm-tiny` is deliberately trained on, all of its weights, with images of twice the saturation.
From there it is fine-tuned with adapters of rank 8 on images as they are, once with HLDF and once without: the same
start, data, order and number of steps. HLDF is composed here of the parts that Med-Art composes it of
(systems/medart.py): any system with a sampler can have it. Columns:

    colour      eq. 4 between the averages of drawn and real images' channel means and standard deviations
    saturation  Wasserstein-1 distance between the histograms of saturation
    frechet     Frechet distance of the toy classifier's features to real images (not an FID)
    seconds     of the fine-tuning
"""

import argparse
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanomed import files, hldf, lora, runtime, samplers, systems
from nanomed.data import toy
from nanomed.data.images import to_unit
from nanomed.metrics import classifier, colour
from nanomed.metrics.features import toy_features
from nanomed.metrics.scores import frechet_distance

SIZE, HELD_OUT = 64, 10_000  # scenes from HELD_OUT on are for measuring
M = 8  # solver steps of an image that is drawn for its colours


def oversaturated(image: np.ndarray) -> np.ndarray:
    return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(2.0))


class Scenes:
    """Scenes of the toy world in memory, drawn from in an order that depends on the seed alone."""

    def __init__(self, first: int, count: int, change=None):
        scenes = [toy.scene(seed) for seed in range(first, first + count)]
        self.arrays = [toy.render(scene, SIZE) for scene in scenes]
        if change:
            self.arrays = [change(array) for array in self.arrays]
        self.prompts = [toy.prompts(scene) for scene in scenes]

    def batch(self, size: int, *key, dropout: float = 0.0) -> dict:
        rng = np.random.default_rng(runtime.seed_of("batch", *key))
        rows = rng.integers(len(self.arrays), size=size)
        images = torch.stack([to_unit(self.arrays[row]) for row in rows])
        return {"image": images, "prompt": [self.prompt(row, rng) if rng.random() >= dropout else "" for row in rows]}

    def prompt(self, row: int, rng: np.random.Generator) -> str:
        """Three of a scene's sentences."""
        return " ".join(rng.permutation(self.prompts[row])[:3])


def colour_loss(system, batch: dict) -> Tensor:
    """HLDF: an image for every prompt in M steps, and the distance of its colours from the data's."""
    prompts = batch["prompt"]
    both = system.unet.read_text(**system.encode_text([*prompts, *[""] * len(prompts)]))
    cond, null = ({name: value[half] for name, value in both.items()} for half in _halves(len(prompts)))
    params = [param for param in system.unet.parameters() if param.requires_grad]
    denoise = hldf.recomputed(system.unet, cond, null, system.guidance, params, M, keep=M)  # there is memory
    noise = torch.randn(len(prompts), *system.latent_shape)
    latents = samplers.dpmpp_2m(denoise, replace(system.diffusion, spacing="linspace"), noise, M)
    return hldf.colour_loss(system.vae.decode(latents), hldf.colours(batch["image"]))


def layers(net: nn.Module) -> list[str]:
    """What an adapter can take hold of: all of it."""
    return [name for name, layer in net.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)]


def _halves(n: int) -> tuple[slice, slice]:
    return slice(n), slice(n, None)


def train(system, params: list[Tensor], batch, steps: int, lr: float, every: int = 0) -> float:
    """Train `params` with the system's own loss and, every so many steps, HLDF's; seconds."""
    system.requires_grad_(False).eval()
    for param in params:
        param.requires_grad_(True)
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=1e-2, fused=True)
    start, total = time.monotonic(), 0.0
    for step in range(steps):
        torch.manual_seed(runtime.seed_of("step", step))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20)
        inputs = batch(step)
        loss = system(inputs, "unet", step)["loss"]
        total += loss.item()
        if every and step % every == 0:
            colour = colour_loss(system, inputs)
            loss = loss + colour / M
        loss.backward()
        runtime.clip_gradients(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            colours = f"  colour {colour.item():.4f}" if every else ""
            print(f"  step {step + 1:4}  loss {total / (step % 50 + 1):.4f}{colours}", flush=True)
            total = 0.0
    return time.monotonic() - start


@torch.no_grad()
def draw(system, prompts: list[str], batch: int = 32) -> Tensor:
    """uint8 images (N, S, S, 3), image i from noise of its own."""
    system.eval()
    drawn = []
    for start in range(0, len(prompts), batch):
        rows = range(start, min(start + batch, len(prompts)))
        drawn.append(system.sample([prompts[row] for row in rows], runtime.ImageNoise(0, rows)))
    return files.to_bytes(torch.cat(drawn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = dict(images=600, drift=120, steps=100, batch=8, every=5, draws=128, threads=1)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-4, help="of the adapters")
    parser.add_argument("--drifted", type=Path, help="file of the drifted weights: kept there, or taken from there")
    parser.add_argument("--picture", type=Path, help="where to write samples of all models side by side")
    config = parser.parse_args()
    torch.set_num_threads(config.threads)
    runtime.keep_memory()

    wrong, right = Scenes(0, config.images, oversaturated), Scenes(0, config.images)
    real = Scenes(HELD_OUT, 2 * config.draws)
    rng = np.random.default_rng(0)
    prompts = [real.prompt(row, rng) for row in range(config.draws)]
    network = classifier.load(Path(__file__).parents[2] / "weights" / "msdm-tiny" / "classifier.safetensors")
    with torch.no_grad():
        features = toy_features(network, real.arrays)
    colours = colour.measure(real.arrays)

    rows = []

    def judged(name: str, images: Tensor, seconds: float) -> None:
        arrays = list(images.numpy())
        with torch.no_grad():
            frechet = frechet_distance(toy_features(network, arrays), features)
        drift = colour.drift(colours, colour.measure(arrays))
        rows.append((name, images, drift["hldf"], drift["saturation_w1"], frechet, seconds))
        print(f"{name:28} colour {drift['hldf']:.5f}  saturation {drift['saturation_w1']:.4f}  frechet {frechet:.2f}")

    shipped = systems.load(Path(__file__).parents[2] / "weights" / "msdm-tiny").to(memory_format=torch.channels_last)
    shipped.diffusion = replace(shipped.diffusion)  # which was made without numbers, on the meta device
    base = copy.deepcopy(shipped)
    if config.drifted and config.drifted.is_file():
        base.unet.load_state_dict(load_file(config.drifted))
    else:
        train(
            base,
            [*base.unet.parameters()],
            lambda step: wrong.batch(16, "drift", step, dropout=0.1),
            config.drift,
            5e-4,
        )
        if config.drifted:
            files.write_tensors(config.drifted, dict(base.unet.state_dict()))
    judged("shipped", draw(shipped, prompts), 0.0)
    judged("colours wrong", draw(base, prompts), 0.0)
    for name, every in (("fine-tuned", 0), (f"fine-tuned, HLDF N = {config.every}", config.every)):
        system = copy.deepcopy(base)
        torch.manual_seed(1)
        params = lora.inject(system.unet, 8, targets=layers(system.unet))
        seconds = train(
            system, params, lambda step: right.batch(config.batch, "tune", step), config.steps, config.lr, every
        )
        lora.fold(system.unet)
        judged(name, draw(system, prompts), seconds)
    other = Scenes(HELD_OUT + 2 * config.draws, config.draws)
    judged("other real images", torch.from_numpy(np.stack(other.arrays)), 0.0)

    print(f"\n{'':28} {'colour':>9} {'saturation':>11} {'frechet':>9} {'seconds':>8}")
    for name, _, distance, saturation, frechet, seconds in rows:
        print(f"{name:28} {distance:9.5f} {saturation:11.4f} {frechet:9.2f} {seconds or '':>8.4}")
    without, with_hldf = rows[2], rows[3]
    print(f"\nHLDF takes {1 - with_hldf[2] / without[2]:.0%} off the colour distance; the Frechet distance goes from "
          f"{without[4]:.2f} to {with_hldf[4]:.2f}")  # fmt: skip
    if config.picture:
        shown = [images[:12] for _, images, *_ in rows[1:4]] + [torch.from_numpy(np.stack(real.arrays[:12]))]
        grid = torch.cat([torch.cat(list(images), dim=1) for images in shown])  # one model a row
        files.write_png(config.picture, grid)


if __name__ == "__main__":
    main()
