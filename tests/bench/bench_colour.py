"""What HLDF does to colours: the toy world, and a model whose text-free branch was taught colours that are too strong.

    python tests/bench/bench_colour.py                       half an hour of one thread; prints the table
    python tests/bench/bench_colour.py --base FOLDER         keep the base models there, or take them from there
    python tests/bench/bench_colour.py --picture FILE.png    and the first seed's images of the same prompts and noise

A small PixArt and a small T5 learn the toy world; then, for a while, every image that comes without a prompt has half
as much saturation again and more contrast. Guidance draws with null + 4.5 (text - null), so what is wrong in the branch
without text comes out 3.5 times as strong and the other way round. Fine-tuning as Med-Art does it cannot mend that by
the loss on noise: it has no prompt dropout, hence never asks that branch. HLDF draws through both. So adapters are
fine-tuned on the toy world as it is, once with HLDF and once without: the same start, data, order and number of steps.

    colour     eq. 4 between the averages of drawn and real images' channel means and standard deviations
    saturation Wasserstein-1 distance between the saturations of all pixels
    frechet    Frechet distance of the toy classifier's features to real images (not an FID)
    seconds    of the fine-tuning
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from nanomed import systems
from nanomed.data import toy
from nanomed.data.images import to_unit
from nanomed.metrics import colour
from nanomed.metrics.features import toy_features
from nanomed.metrics.networks import classifier
from nanomed.metrics.scores import frechet_distance
from nanomed.run import files
from nanomed.run.hardware import keep_memory
from nanomed.run.randomness import ImageNoise, seed_of
from nanomed.training.optimizer import adamw, clip_gradients

SIZE, HELD_OUT = 32, 10_000  # scenes from HELD_OUT on are for measuring


def oversaturated(image: np.ndarray) -> np.ndarray:
    """Half as much saturation again, and a contrast of 1.1."""
    picture = ImageEnhance.Color(Image.fromarray(image)).enhance(1.5)
    return np.asarray(ImageEnhance.Contrast(picture).enhance(1.1))


class Scenes:
    """Scenes of the toy world in memory, drawn from in an order that depends on the seed alone."""

    def __init__(self, first: int, count: int, change=None):
        scenes = [toy.scene(seed) for seed in range(first, first + count)]
        self.arrays = [toy.render(scene, SIZE) for scene in scenes]
        if change:
            self.arrays = [change(array) for array in self.arrays]
        self.prompts = [toy.prompts(scene) for scene in scenes]

    def batch(self, size: int, *key, places: float = 0.3) -> dict:
        rng = np.random.default_rng(seed_of("batch", *key))
        rows = rng.integers(len(self.arrays), size=size)
        images = torch.stack([to_unit(self.arrays[row]) for row in rows])
        return {"image": images, "prompt": [self.prompt(row, rng, places) for row in rows]}

    def prompt(self, row: int, rng: np.random.Generator, places: float = 0.3) -> str:
        """A sentence of a scene, with probability `places` one that says where something is."""
        located = [prompt for prompt in self.prompts[row] if " located in " in prompt]
        return str(rng.choice(located if located and rng.random() < places else self.prompts[row]))


def train(system, stage: str, batch, steps: int, lr: float, decay: float = 0.0) -> float:
    """Train a stage with a cosine schedule; seconds."""
    params = system.trainable(stage)
    optimizer = adamw(params.values(), lr=lr, weight_decay=decay)
    start, total = time.monotonic(), 0.0
    for step in range(steps):
        torch.manual_seed(seed_of(stage, step))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
        losses = system(batch(step), stage, step)
        losses["loss"].backward()
        clip_gradients([*params.values()], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += losses["loss"].item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            colours = f"  colour {losses['colour'].item():.4f}" if "colour" in losses else ""
            print(f"  {stage} {step + 1:5}  loss {total / (step % 100 + 1):.4f}{colours}", flush=True)
            total = 0.0
    return time.monotonic() - start


def base_model(config: argparse.Namespace, seed: int, wrong: Scenes, right: Scenes):
    """The tiny Med-Art before its adapters, whose branch without a prompt has gone over to the wrong images."""
    folder = config.base and config.base / str(seed)
    if folder and (folder / "system.json").is_file():
        return systems.load(folder).to(memory_format=torch.channels_last)
    torch.manual_seed(seed)
    system = systems.build("medart-tiny").to(memory_format=torch.channels_last)

    def both(step: int) -> dict:
        halves = [scenes.batch(12, "vae", seed, step, i) for i, scenes in enumerate((right, wrong))]
        return {"image": torch.cat([half["image"] for half in halves])}

    train(system, "vae", both, config.vae_steps, 3e-3)
    with torch.no_grad():
        system.finish("vae", (both(step)["image"] for step in range(20)))

    def learned(step: int) -> dict:
        places = 1.0 if step < config.base_steps // 5 else 0.3
        batch = right.batch(32, "base", seed, step, places=places)
        return batch | {"prompt": ["" if i < 3 else prompt for i, prompt in enumerate(batch["prompt"])]}

    def drifted(step: int) -> dict:
        text, null = right.batch(22, "text", seed, step), wrong.batch(10, "null", seed, step)
        return {"image": torch.cat([text["image"], null["image"]]), "prompt": [*text["prompt"], *[""] * 10]}

    train(system, "base", learned, config.base_steps, 2e-3)
    train(system, "base", drifted, config.base_steps // 8, 5e-4)
    if folder:
        system.save(folder)
    return system


@torch.no_grad()
def draw(system, prompts: list[str], batch: int = 32) -> Tensor:
    """uint8 images (N, S, S, 3), image i from noise of its own."""
    system.eval()
    drawn = []
    for start in range(0, len(prompts), batch):
        rows = range(start, min(start + batch, len(prompts)))
        drawn.append(system.sample([prompts[row] for row in rows], ImageNoise(0, rows)))
    return files.to_bytes(torch.cat(drawn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = dict(images=1500, vae_steps=900, base_steps=1500, steps=100, batch=8, every=2, draws=256, threads=1)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=3e-4, help="of the adapters")
    parser.add_argument("--guidance", type=float, default=4.5, help="of all drawing, that of HLDF too")
    parser.add_argument("--base", type=Path, help="folder of the base models")
    parser.add_argument("--picture", type=Path, help="where to write samples of the first seed's models side by side")
    config = parser.parse_args()
    torch.set_num_threads(config.threads)
    keep_memory()

    wrong, right = Scenes(0, config.images, oversaturated), Scenes(0, config.images)
    real = Scenes(HELD_OUT, 2 * config.draws)
    rng = np.random.default_rng(0)
    prompts = [real.prompt(row, rng) for row in range(config.draws)]
    network = classifier.load(Path(__file__).parents[2] / "weights" / "msdm-tiny" / "classifier.safetensors")
    with torch.no_grad():
        features = toy_features(network, real.arrays)
    colours = colour.measure(real.arrays)

    rows: dict[str, list[tuple]] = {}

    def judged(name: str, images: Tensor, seconds: float) -> None:
        arrays = list(images.numpy())
        with torch.no_grad():
            frechet = frechet_distance(toy_features(network, arrays), features)
        drift = colour.drift(colours, colour.measure(arrays))
        rows.setdefault(name, []).append((drift["hldf"], drift["saturation_w1"], frechet, seconds))
        print(f"{name:28} colour {drift['hldf']:.5f}  saturation {drift['saturation_w1']:.4f}  frechet {frechet:.2f}")
        if len(rows[name]) == 1:
            shown.append(images[:12])

    shown: list[Tensor] = []
    for seed in config.seeds:
        base = base_model(config, seed, wrong, right)
        base.guidance = config.guidance
        judged("base", draw(base, prompts), 0.0)
        for name, every in (("fine-tuned", 0), (f"fine-tuned, HLDF N = {config.every}", config.every)):
            system = copy.deepcopy(base)
            system.hldf_every, system.hldf_keep = every, 8  # memory is no matter here
            torch.manual_seed(seed)
            system.adapt("adapters", 8)
            seconds = train(system, "adapters", lambda step, seed=seed: right.batch(config.batch, "tune", seed, step),
                            config.steps, config.lr, 1e-2)  # fmt: skip
            system.fold()
            judged(name, draw(system, prompts), seconds)
    other = Scenes(HELD_OUT + 2 * config.draws, config.draws)
    judged("other real images", torch.from_numpy(np.stack(other.arrays)), 0.0)

    print(f"\n{'mean (least to most)':28} {'colour':>24} {'saturation':>24} {'frechet':>24} {'seconds':>8}")
    for name, values in rows.items():
        columns = [f"{np.mean(c):.4g} ({min(c):.3g} to {max(c):.3g})" for c in zip(*values)]
        print(f"{name:28} {columns[0]:>24} {columns[1]:>24} {columns[2]:>24} {np.mean([v[3] for v in values]):8.0f}")
    without, with_hldf = (np.mean(values, axis=0) for values in list(rows.values())[1:3])
    print(f"\nHLDF takes {1 - with_hldf[0] / without[0]:.0%} off the colour distance; the Frechet distance goes from "
          f"{without[2]:.0f} to {with_hldf[2]:.0f}")  # fmt: skip
    if config.picture:
        shown[-1] = torch.from_numpy(np.stack(real.arrays[:12]))  # of the same prompts
        grid = torch.cat([torch.cat(list(images), dim=1) for images in shown])  # one model a row
        files.write_png(config.picture, grid.repeat_interleave(2, 0).repeat_interleave(2, 1))


if __name__ == "__main__":
    main()
