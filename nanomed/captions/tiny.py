"""A LLaVA-NeXT in miniature that learns from nothing to say what the toy world shows, in minutes on two cores.

    python train.py --model captioner-tiny     (or python -m nanomed.captions train)
    python -m nanomed.captions vsg toy:200 --model weights/captioner-tiny --out captions.csv

The network is that of networks/llava.py, saved in the layout of `-hf`: any code here takes it for a published one. Its
tower looks at 48 pixels in patches of 16, so that a patch of the whole image is one of the nine cells that the
organisers' prompts speak of, and at four tiles of the image at 96.

A caption says how many polyps there are, of which colour and in which cell, the box and the instrument;
`toy.claims` reads it back as prompts of the organisers' grammar, which the toy world's deterministic reader judges.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as joiners
from torch import Tensor

from nanomed.captions.models import Model
from nanomed.captions.networks.decoder import DecoderConfig
from nanomed.captions.networks.llava import LlavaConfig, LlavaNext
from nanomed.captions.networks.tiles import Tiles
from nanomed.data import grammar, toy
from nanomed.run import files
from nanomed.run.flags import UsageError
from nanomed.text.clip_vision import ClipVisionConfig

SIDE = 96  # of the images it learns from
OPENING = "An endoscopic image"
PROMPT = "<image>describe:"
MARKS = ("<s>", "</s>", "<image>")
WRITTEN = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
HELD_OUT = 10_000_000  # scenes from here on are for judging


def describe(scene: toy.Scene) -> str:
    """The caption that a scene deserves."""
    polyps = [f"a {polyp.color} one in the {polyp.cell}" for polyp in scene.polyps]
    text = f"{OPENING} with {toy.NUMBERS[len(polyps)]}"
    text += f": {', '.join(polyps)}." if polyps else "."
    text += f" There is a {scene.box} box artefact." if scene.box else " There is no box artefact."
    return text + (" There is an instrument." if scene.instrument else " There is no instrument.")


def judged(image: np.ndarray, caption: str) -> tuple[int, int]:
    """(attributes that a caption names rightly, attributes that it names), by the deterministic reader."""
    seen = toy.read(image)
    right = [answer for prompt in toy.claims(caption) for answer in toy.answers(grammar.parse(prompt), seen)]
    return sum(right), len(right)


def tokenizer() -> Tokenizer:
    """Words and signs of all captions, spaces before words included."""
    cells = [f"one in the {cell}" for cell in grammar.CELLS]
    texts = [OPENING, "describe:", *toy.NUMBERS, *toy.POLYP_COLORS, *cells, "There is a green black box artefact. ",
             "There is an instrument, no with: a"]  # fmt: skip
    split = pre_tokenizers.Split(Regex(r" ?[\w-]+|\S| "), behavior="isolated")
    words = {word for text in texts for start in ("", " ") for word, _ in split.pre_tokenize_str(start + text)}
    vocabulary = [*MARKS, "<unk>", *sorted(words)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = split, joiners.Fuse()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 0)])
    return made


def build() -> Model:
    """The untrained captioner."""
    made = tokenizer()
    text = DecoderConfig(vocab_size=made.get_vocab_size(), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, rope_theta=10000.0)  # fmt: skip
    vision = ClipVisionConfig(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=3,
                              image_size=SIDE // 2, patch_size=16, projection_dim=96)  # fmt: skip
    config = LlavaConfig(text, vision, MARKS.index("<image>"), layer=-1)
    tiles = Tiles(vision.image_size, vision.patch_size, ((SIDE, SIDE),))
    return Model(LlavaNext(config, tiles), made, [MARKS.index("</s>")], PROMPT)


def save(model: Model, folder: str | Path) -> None:
    """Write the folder that `nanomed.captions.load` reads, in the layout of `-hf`. `expect_free` judges it before."""
    folder, c = Path(folder), model.network.config
    tiles = model.network.tiles
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "config.json", {  # first, for it says whose folder this is
        "model_type": "llava_next", "image_token_index": c.image_token, "vision_feature_layer": c.layer,
        "eos_token_id": model.ends[0], "image_grid_pinpoints": tiles.grids, "prompt": PROMPT,
        "vision_config": asdict(c.vision), "text_config": asdict(c.text)})  # fmt: skip
    files.write_tensors(folder / "model.safetensors", model.network.state_dict())
    with files.atomic(folder / "tokenizer.json") as temporary:
        model.tokenizer.save(str(temporary))
    sides = {"height": tiles.side, "width": tiles.side}
    files.write_json(folder / "preprocessor_config.json", {
        "image_grid_pinpoints": tiles.grids, "crop_size": sides, "size": {"shortest_edge": tiles.side},
        "image_mean": tiles.mean, "image_std": tiles.std})  # fmt: skip


def expect_free(folder: str | Path) -> None:
    """Refuse to write over a model or a run that is no captioner. Raises UsageError."""
    there = [name for name in WRITTEN if Path(folder, name).exists()]
    try:
        own = not there or json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["prompt"] == PROMPT
    except (OSError, ValueError, KeyError, TypeError):
        own = False
    if not own:
        raise UsageError(f"--out {folder}: {there[0]} is there already, of something else; choose another folder")


def loss_of(model: Model, images: list[Image.Image], captions: list[str]) -> Tensor:
    """Mean over the captions' tokens, end included, of -log p(token | image, prompt, tokens before)."""
    before, mask = model.read(images, [PROMPT] * len(images))
    ids = [[*model.tokenizer.encode(text, add_special_tokens=False).ids, model.ends[0]] for text in captions]
    length = max(map(len, ids))
    target = torch.tensor([row + [-100] * (length - len(row)) for row in ids], device=before.device)
    embedded = torch.cat([before, model.writer.embed(target.clamp(min=0)[:, :-1])], dim=1)
    seen = torch.cat([mask, target[:, :-1] >= 0], dim=1)
    logits = model.writer(embedded, seen)[:, before.shape[1] - 1 :]  # (B, length, V): each foretells the next
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)


@dataclass(frozen=True)
class Recipe:
    """What a captioner learns from and how: the same one for the same numbers."""

    steps: int = 500
    batch: int = 32  # scenes at a time
    scenes: int = 3000  # of the toy world, the first ones
    lr: float = 2e-3  # the largest; it rises over 100 steps and falls by a cosine
    seed: int = 0  # of weights and batches


def train(
    recipe: Recipe = Recipe(), progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    device: str | torch.device = "cpu",
) -> Model:  # fmt: skip
    """The captioner that a recipe makes. `progress` wraps the steps, for a bar."""
    torch.manual_seed(recipe.seed)
    model = build()
    model.network.to(device)
    pictures = [Image.fromarray(toy.render(toy.scene(i), SIDE)) for i in range(recipe.scenes)]
    captions = [describe(toy.scene(i)) for i in range(recipe.scenes)]
    optimizer = torch.optim.AdamW(model.network.parameters(), recipe.lr, (0.9, 0.98), weight_decay=0.01, fused=True)
    for step in progress(range(recipe.steps)):
        part = min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))
        optimizer.param_groups[0]["lr"] = recipe.lr * part
        rows = torch.randint(recipe.scenes, (recipe.batch,)).tolist()
        loss_of(model, [pictures[i] for i in rows], [captions[i] for i in rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.network.eval().requires_grad_(False)
    return model


def accuracy(model: Model, scenes: int = 200) -> tuple[float, float]:
    """Of scenes that were not learned: the share of named attributes that are right by the reader; and the share of
    captions that are word for word what the scene deserves."""
    right = named = same = 0
    for start in range(0, scenes, 50):
        drawn = [toy.scene(HELD_OUT + i) for i in range(start, min(start + 50, scenes))]
        images = [toy.render(scene, SIDE) for scene in drawn]
        texts = model.generate([Image.fromarray(image) for image in images], [PROMPT] * len(images), max_new_tokens=60)
        for scene, image, text in zip(drawn, images, texts):
            a, b = judged(image, text)
            right, named, same = right + a, named + b, same + (text == describe(scene))
    return right / max(named, 1), same / scenes
