"""What only the embedded world has: a reader that judges prompt faithfulness, and a stand-in for Inception.

Both join the world of `nanomed/data/toy.py` to a metric, so they stand above data and metrics and below evaluate.py.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from nanomed.data import grammar, toy
from nanomed.metrics.networks.classifier import SIDE, ToyClassifier
from nanomed.run import files
from nanomed.run.progress import progress

STAND_IN = 20_000_000  # first of the scenes that the stand-in is trained on: neither models nor evaluations see them

LABELS = {"box": "box artefact yes/no", "polyp": "polyp yes/no", "abnormality_at": "polyp position",
          "instrument": "instrument yes/no"}  # fmt: skip


def faithfulness(images: Iterable[np.ndarray], prompts: Sequence[str]) -> dict[str, list[bool]]:
    """Prompt faithfulness: for every attribute that a prompt names, whether its image shows it.

    images   uint8 (H, W, 3), one for each prompt
    Returns {"prompt faithfulness": every judgement, "box artefact yes/no": those about boxes, ...}; a measure is the
    mean of its list. A caption of the toy world says several things. Prompts of another world name nothing that can be
    judged, and give nothing.
    """
    judged: dict[str, list[bool]] = {"prompt faithfulness": []} | {label: [] for label in LABELS.values()}
    for image, prompt in zip(images, prompts):
        sentences = _sentences(prompt)
        seen = toy.read(image) if sentences else {}
        for said in sentences:
            judged["prompt faithfulness"] += toy.answers(said, seen)
            for kind, label in LABELS.items():
                if kind in said:
                    judged[label].append(said[kind] == seen["positions" if kind == "abnormality_at" else kind])
    return {label: answers for label, answers in judged.items() if answers}


def _sentences(prompt: str) -> list[dict[str, object]]:
    """What a prompt of the grammar says, else each thing that it says as a caption."""
    try:
        return [grammar.parse(prompt)]
    except ValueError:
        return [grammar.parse(claim) for claim in toy.claims(prompt)]


def train_stand_in(path: str, images: int = 3000, steps: int = 600, batch: int = 32) -> float:
    """Train the classifier whose features stand in for Inception's on the toy world, and write it to `path`.

    It names what a scene shows; the share of attributes it gets right on 500 held-out scenes is returned. A few
    minutes on two cores.
    """
    def scene(number: int) -> tuple[torch.Tensor, list[float]]:
        drawn = toy.scene(STAND_IN + number)
        cells = {polyp.cell for polyp in drawn.polyps}
        shown = [bool(drawn.box), *(cell in cells for cell in grammar.CELLS), bool(drawn.instrument), drawn.text]
        pixels = torch.from_numpy(toy.render(drawn, SIDE)).permute(2, 0, 1)
        return pixels, [float(attribute) for attribute in shown]

    held_out = min(500, images // 4)
    pairs = [scene(i) for i in progress(range(images), "rendering", "scene")]
    inputs, targets = torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])
    torch.manual_seed(0)
    network = ToyClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress(range(steps), "training", "step"):
        rows = torch.randint(images - held_out, (batch,))
        x = inputs[rows] / 127.5 - 1
        x = x + 0.1 * torch.rand(()) * torch.randn_like(x)  # generated images are not as clean as rendered ones
        F.binary_cross_entropy_with_logits(network(x)[1], targets[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    files.write_tensors(path, dict(network.state_dict()))
    logits = network(inputs[-held_out:] / 127.5 - 1)[1].detach()
    return ((logits > 0) == targets[-held_out:].bool()).float().mean().item()
