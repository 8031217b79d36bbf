"""Measure generated images against real ones.

    python evaluate.py --real DIR --fake DIR --out results                FID, precision, recall, F1, IS
    python evaluate.py --real toy --fake samples --prompts test.csv       the toy world: also prompt faithfulness

Every number is printed with the protocol it was computed under and the number of images on each side.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanomed import files, runtime

SMALL = 2048  # below this many images an FID is biased by more than most papers' differences


@dataclass
class Config:
    real: str = ""  # folder of real images, or "toy" for fresh scenes of the embedded world
    fake: str = ""  # folder of generated images; with manifest.jsonl of sample.py, prompts are known
    prompts: str = ""  # file of prompts, row i for the i-th image; empty: from manifest.jsonl where there is one
    out: str = "results"  # folder for results.json
    metrics: str = "fid,pr,is,faithfulness"  # which ones, by comma
    protocol: str = "tf"  # tf (the papers) | pytorch-fid | torchmetrics (>= 1.8) | clean
    inception: str = ""  # the Inception file; empty: weights/inception/
    weights: str = ""  # where weights are, besides weights/
    stand_in: str = ""  # train the toy world's classifier, write it to this file and stop
    limit: int = 0  # use the first images only; 0 = all
    batch: int = 32  # images at a time in the feature network


METRICS = ("fid", "pr", "is", "faithfulness")


def main() -> None:
    config = runtime.parse(Config, description=__doc__)
    if config.stand_in:
        return train_stand_in(config.stand_in)
    if not config.real or not config.fake:
        raise runtime.UsageError("say which folders: --real DIR --fake DIR")
    asked = [name.strip() for name in config.metrics.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in METRICS]:
        raise runtime.UsageError(f"--metrics {unknown[0]}: choose among {', '.join(METRICS)}")
    runtime.init()
    fake = image_files(config.fake, config.limit)
    real = config.real if config.real == "toy" else image_files(config.real, config.limit)
    results = evaluate(real, fake, prompts_of(config, len(fake)), config, asked)
    files.write_json(Path(config.out) / "results.json", results)
    print(table(results))


def image_files(folder: str, limit: int = 0) -> list[Path]:
    """The images of a folder by name, those in `images/` if it has such a folder."""
    from nanomed.data.images import SUFFIXES
    from nanomed.data.table import DataError

    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder")
    root = root / "images" if (root / "images").is_dir() else root
    found = sorted(path for path in root.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    if not found:
        raise DataError(f"{root}: no images ({', '.join(SUFFIXES)})")
    return found[:limit] if limit else found


def prompts_of(config: Config, count: int) -> list[str] | None:
    """The prompt of every generated image, where they are known."""
    from nanomed.data.prompts import read_prompts
    from nanomed.data.table import DataError

    manifest = Path(config.fake) / "manifest.jsonl"
    if config.prompts:
        prompts = read_prompts(config.prompts)
    elif manifest.is_file():
        prompts = [json.loads(line)["prompt"] for line in manifest.read_text(encoding="utf-8").splitlines()]
    else:
        return None
    if len(prompts) < count:
        raise DataError(f"{config.prompts or manifest}: {len(prompts)} prompts for {count} images in {config.fake}")
    return prompts[:count]


def pixels(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Images as uint8 (H, W, 3), one after the other."""
    from nanomed.data.images import open_rgb

    for path in paths:
        yield np.asarray(open_rgb(path))


@torch.inference_mode()
def evaluate(
    real: str | list[Path], fake: list[Path], prompts: list[str] | None, config: Config, asked: list[str]
) -> dict:
    """{metric: {"value", "protocol", "n_real", "n_fake", ...}} of real against generated images."""
    from nanomed.data import toy
    from nanomed.metrics import scores

    n_fake = len(fake)
    drawn = np.asarray(next(pixels(fake[:1])))
    if real == "toy":  # fresh scenes, as many as there are generated images, which no training set holds
        reals = [toy.render(toy.scene(10_000_000 + i), drawn.shape[0]) for i in range(n_fake)]
    else:
        reals = real
    n_real = len(reals)
    results: dict[str, dict] = {}

    def add(name: str, value: float, protocol: str, **more) -> None:
        results[name] = {"value": value, "protocol": protocol, "n_real": n_real, "n_fake": n_fake} | more

    if {"fid", "pr", "is"} & set(asked):
        real_features, fake_features, logits, name, protocol = features(reals, fake, config, real == "toy")
        if "fid" in asked:
            add(name, scores.frechet_distance(real_features, fake_features), protocol)
        if "pr" in asked and min(n_real, n_fake) > 3:
            precision, recall = scores.precision_recall(real_features, fake_features)
            add("precision", precision, f"k = 3, {protocol}")
            add("recall", recall, f"k = 3, {protocol}")
            add("F1", scores.f1(precision, recall), f"k = 3, {protocol}")
        if "is" in asked and logits is not None and n_fake >= 10:
            mean, deviation = scores.inception_score(logits)
            add("IS", mean, f"10 splits, {protocol}", deviation=deviation)
    if "faithfulness" in asked and prompts is not None:
        results |= faithfulness(fake, prompts)
    return results


def features(reals, fake: list[Path], config: Config, toy_world: bool):
    """(real features, fake features, logits or None, name of the Frechet distance, protocol)."""
    from nanomed import weights
    from nanomed.metrics import classifier, inception
    from nanomed.metrics.features import inception_features, toy_features

    real_images = reals if toy_world else pixels(reals)
    try:
        network = inception.load(config.inception or None, config.weights or None)
    except weights.WeightsNotFound as error:
        stand_in = weights.find("msdm-tiny", config.weights or None) / "classifier.safetensors"
        if config.inception or not stand_in.is_file():
            raise
        print(f"{error}\nuntil then: features of the toy world's classifier, good for comparing toy models only")
        network = classifier.load(stand_in)
        a, b = toy_features(network, real_images), toy_features(network, pixels(fake))
        return a, b, None, classifier.NAME, "toy classifier"
    a, _ = inception_features(network, real_images, config.protocol, config.batch)
    b, logits = inception_features(network, pixels(fake), config.protocol, config.batch)
    return a, b, logits, "FID", f"Inception pool3, {config.protocol}"


def faithfulness(fake: list[Path], prompts: list[str]) -> dict[str, dict]:
    """Prompt faithfulness on the toy world: the share of attributes named in a prompt that its image shows."""
    from nanomed.data import grammar, toy

    right = named = 0
    kinds: dict[str, list[bool]] = {"box": [], "polyp": [], "abnormality_at": [], "instrument": []}
    for image, prompt in zip(pixels(fake), prompts):
        try:
            said = grammar.parse(prompt)
        except ValueError:
            continue  # a prompt of another world names nothing that can be judged
        shown, judged = toy.faithful(image, prompt)
        right, named = right + shown, named + judged
        seen = toy.read(image)
        for kind, answers in kinds.items():
            if kind in said:
                answers.append(said[kind] == seen["positions" if kind == "abnormality_at" else kind])
    if not named:
        return {}
    results = {"prompt faithfulness": {"value": right / named, "protocol": "toy reader", "n_real": 0, "n_fake": named}}
    labels = {"box": "box artefact yes/no", "polyp": "polyp yes/no", "abnormality_at": "polyp position",
              "instrument": "instrument yes/no"}  # fmt: skip
    for kind, answers in kinds.items():
        if answers:
            results[labels[kind]] = {
                "value": sum(answers) / len(answers), "protocol": "toy reader", "n_real": 0, "n_fake": len(answers),
            }  # fmt: skip
    return results


def train_stand_in(path: str, images: int = 3000, steps: int = 600, batch: int = 32) -> None:
    """Train the classifier whose features stand in for Inception's on the toy world: which attributes a scene shows.

    Scenes 20,000,000 and up: neither models nor evaluations see them. A few minutes on two cores.
    """
    from tqdm import trange

    from nanomed.data import grammar, toy
    from nanomed.metrics.classifier import SIDE, ToyClassifier

    def scene(number: int) -> tuple[torch.Tensor, list[float]]:
        drawn = toy.scene(20_000_000 + number)
        cells = {polyp.cell for polyp in drawn.polyps}
        shown = [bool(drawn.box), *(cell in cells for cell in grammar.CELLS), bool(drawn.instrument), drawn.text]
        pixels = torch.from_numpy(toy.render(drawn, SIDE)).permute(2, 0, 1)
        return pixels, [float(attribute) for attribute in shown]

    pairs = [scene(i) for i in trange(images, desc="scenes")]
    inputs, targets = torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
    torch.manual_seed(0)
    network = ToyClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="steps"):
        rows = torch.randint(images - 500, (batch,))
        x = inputs[rows] / 127.5 - 1
        x = x + 0.1 * torch.rand(()) * torch.randn_like(x)  # generated images are not as clean as rendered ones
        torch.nn.functional.binary_cross_entropy_with_logits(network(x)[1], targets[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        logits = network(inputs[-500:] / 127.5 - 1)[1]
    print(f"right on 500 held-out scenes: {((logits > 0) == targets[-500:].bool()).float().mean():.4f}")
    files.write_tensors(path, dict(network.state_dict()))


def of_run(fake: Path, real: list[Path], config) -> dict[str, str]:
    """What train.py reports at the end of a run: the images it drew against held-out ones."""
    settings = Config(fake=str(fake), weights=config.weights)
    paths = image_files(str(fake))
    toy_world = config.data.startswith("toy")
    asked = list(METRICS)
    results = evaluate("toy" if toy_world else real, paths, prompts_of(settings, len(paths)), settings, asked)
    files.write_json(fake / "results.json", results)
    print(table(results))
    return {
        name: f"{entry['value']:.4f} (N = {entry['n_fake']}, {entry['protocol']})" for name, entry in results.items()
    }


def table(results: dict[str, dict]) -> str:
    """The results as text, N beside every number."""
    lines = [f"{'metric':34} {'value':>10}  {'N real':>7} {'N fake':>7}  protocol"]
    for name, entry in results.items():
        spread = f" +- {entry['deviation']:.3f}" if "deviation" in entry else ""
        lines.append(
            f"{name:34} {entry['value']:>10.4f}  {entry['n_real'] or '-':>7} {entry['n_fake']:>7}  "
            f"{entry['protocol']}{spread}"
        )
    sizes = [min(e["n_real"], e["n_fake"]) for e in results.values() if e["n_real"]]
    if sizes and min(sizes) < SMALL:
        lines.append(f"N = {min(sizes)} is small: a Frechet distance is biased upwards below {SMALL} images")
    return "\n".join(lines)


if __name__ == "__main__":
    runtime.main(main)
