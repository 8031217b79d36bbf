"""What the measures are worth: twelve known damages in five strengths, and whether each measure says so.

On the embedded world, where a perfect generator exists: fresh scenes. They are damaged, measured against other fresh
scenes, and every measure that needs no download is asked four things: does it move beyond what chance moves it, in the
direction that it calls worse, further with every strength, and from how many images on is its interval clear of the
value that undamaged scenes have. `python -m nanomed.evaluation` runs it and writes the page.
"""

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from torch import Tensor

from nanomed.data import grammar, toy
from nanomed.evaluation import extractors, table, toyworld, webpage
from nanomed.evaluation.store import Extractor
from nanomed.metrics import colour, entries, memorisation

REAL, FAKE, TRAIN, OTHER = 30_000_000, 31_000_000, 32_000_000, 33_000_000  # first scenes of each set
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)
MIDDLE = 3  # the strength at which the numbers of images are compared
BACKWARDS = 0.05  # of a measure's whole way: a step back that still counts as monotone
WORSE = {"authenticity": -1, "Vendi score": -1, "nearer than held-out": 1}  # what the results' table cannot say


@dataclass
class Scenes:
    """Images with prompts, and what damages take from elsewhere."""

    images: list[np.ndarray]  # uint8 (S, S, 3)
    prompts: list[str]
    polyps: list[bool]
    train: list[np.ndarray]

    def of(self, images: Iterable[np.ndarray]) -> "Scenes":
        """Other images of the same scenes."""
        return Scenes(list(images), self.prompts, self.polyps, self.train)


def scenes(first: int, count: int, side: int) -> Scenes:
    """Fresh scenes of the embedded world, with as many for training."""
    drawn = [toy.scene(first + i) for i in range(count)]
    train = [toy.render(toy.scene(TRAIN + i), side) for i in range(count)]
    images, told = [toy.render(scene, side) for scene in drawn], [_prompt(scene, i) for i, scene in enumerate(drawn)]
    return Scenes(images, told, [bool(scene.polyps) for scene in drawn], train)


def _prompt(scene: toy.Scene, i: int) -> str:
    """One of a scene's prompts that the toy reader can judge."""
    told = [prompt for prompt in toy.prompts(scene) if toyworld.LABELS.keys() & grammar.parse(prompt).keys()]
    return told[i % len(told)]


# ------------------------------------------------------------------------------------------------------- the damages


def each(change: Callable[[Image.Image, float, int], Image.Image], *strengths: float):
    """A damage of every image on its own: change(picture, how much, which image)."""

    def damage(sound: Scenes, strength: int) -> Scenes:
        pictures = [change(Image.fromarray(x), strengths[strength - 1], i) for i, x in enumerate(sound.images)]
        return sound.of(np.asarray(picture) for picture in pictures)

    return damage


def share(replace: Callable[[Scenes, int], np.ndarray], *shares: float):
    """A damage of some of the images: image i becomes replace(scenes, i)."""

    def damage(sound: Scenes, strength: int) -> Scenes:
        order = np.random.default_rng(5).permutation(len(sound.images)).argsort() / len(sound.images)
        hit = order < shares[strength - 1]  # who is hit at one strength is hit at the next
        return sound.of(replace(sound, i) if hit[i] else x for i, x in enumerate(sound.images))

    return damage


def _noise(picture: Image.Image, deviation: float, i: int) -> Image.Image:
    x = np.asarray(picture) + np.random.default_rng(i).normal(0, deviation, (*picture.size[::-1], 3))
    return Image.fromarray(x.round().clip(0, 255).astype(np.uint8))


def _jpeg(picture: Image.Image, quality: float, i: int) -> Image.Image:
    picture.save(stream := io.BytesIO(), "JPEG", quality=int(quality))
    return Image.open(stream).convert("RGB")


def _cast(picture: Image.Image, much: float, i: int) -> Image.Image:
    return Image.fromarray((np.asarray(picture) * (1 - much, 1, 1 + much)).clip(0, 255).astype(np.uint8))


def _crop(picture: Image.Image, kept: float, i: int) -> Image.Image:
    (width, height), off = picture.size, (1 - kept) / 2
    box = (off * width, off * height, (1 - off) * width, (1 - off) * height)
    return picture.resize(picture.size, Image.Resampling.BICUBIC, box)


def _without_polyp(sound: Scenes, i: int) -> np.ndarray:
    """A scene with a polyp gives way to one without."""
    healthy = [row for row, polyp in enumerate(sound.polyps) if not polyp]
    if not sound.polyps[i] or not healthy:
        return sound.images[i]
    number, side = OTHER + 1000 * i, len(sound.images[i])
    while toy.scene(number).polyps:
        number += 1
    return toy.render(toy.scene(number), side)


def _collapsed(sound: Scenes, strength: int) -> Scenes:
    kept = max(1, len(sound.images) >> strength)
    return sound.of(sound.images[i % kept] for i in range(len(sound.images)))


def _misprompted(sound: Scenes, strength: int) -> Scenes:
    order, n = np.random.default_rng(6).permutation(len(sound.images)), len(sound.images)
    hit = order[: round(n * SHARES[strength - 1])]
    prompts = list(sound.prompts)
    for i, other in zip(hit, np.roll(hit, 1)):
        prompts[i] = sound.prompts[other]
    return Scenes(sound.images, prompts, sound.polyps, sound.train)


def _skin(sound: Scenes, i: int) -> np.ndarray:
    """A picture of another world: a brown spot on pale skin."""
    draw, side = np.random.default_rng(i), len(sound.images[i])
    picture = Image.new("RGB", (side, side), tuple(int(c) for c in draw.integers((215, 165, 140), (240, 195, 170))))
    (x, y), radius = draw.uniform(0.35, 0.65, 2) * side, draw.uniform(0.1, 0.3) * side
    brown = tuple(int(c) for c in draw.integers((70, 35, 20), (140, 90, 60)))
    ImageDraw.Draw(picture).ellipse((x - radius, y - radius * 0.8, x + radius, y + radius * 0.8), fill=brown)
    return np.asarray(_noise(picture.filter(ImageFilter.GaussianBlur(side / 40)), 4, i))


DAMAGES: dict[str, Callable[[Scenes, int], Scenes]] = {
    "blur": each(lambda x, radius, i: x.filter(ImageFilter.GaussianBlur(radius)), 0.4, 0.7, 1, 1.5, 2.5),
    "noise": each(_noise, 3, 6, 12, 24, 48),
    "JPEG": each(_jpeg, 80, 60, 40, 20, 8),
    "colour cast": each(_cast, 0.03, 0.06, 0.12, 0.2, 0.35),
    "grey": each(lambda x, much, i: ImageEnhance.Color(x).enhance(1 - much), *SHARES),
    "missing class": share(_without_polyp, *SHARES),
    "copies of training images": share(lambda sound, i: sound.train[i], 0.05, 0.1, 0.25, 0.5, 1),
    "mode collapse": _collapsed,
    "wrong prompts": _misprompted,
    "crops": each(_crop, 0.95, 0.9, 0.8, 0.65, 0.5),
    "flips": share(lambda sound, i: sound.images[i][:, ::-1], *SHARES),
    "two data sets mixed": share(_skin, 0.02, 0.05, 0.1, 0.25, 0.5),
}


# ------------------------------------------------------------------------------------------------------ the measures


class Eyes:
    """What networks and counters make of images, each distinct image once."""

    def __init__(self) -> None:
        stand_in = extractors.stand_in("", 64, "cpu")
        if stand_in is None:
            raise FileNotFoundError("weights/msdm-tiny/classifier.safetensors: run this in the checkout")
        self.networks: tuple[Extractor, ...] = (stand_in, extractors.radiomic("", 64, "cpu"))
        self.seen: dict[bytes, dict[str, Tensor]] = {}

    def look(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """{column: (N, ...)}"""
        keys = [np.ascontiguousarray(x).tobytes() for x in images]
        fresh = {key: x for key, x in zip(keys, images) if key not in self.seen}
        if fresh:
            new = [np.ascontiguousarray(x) for x in fresh.values()]
            main, radiomic = (network.columns(new) for network in self.networks)
            colours = [colour.measure([x]) for x in new]
            columns = {
                "main": main["features"], "v1": radiomic["features"], "v0": radiomic["v0"],
                "small": memorisation.pixels(new), "means": torch.from_numpy(np.stack([c.means[0] for c in colours])),
                "stds": torch.from_numpy(np.stack([c.stds[0] for c in colours])),
                "saturation": torch.from_numpy(np.stack([c.saturation for c in colours])),
            }  # fmt: skip
            for i, key in enumerate(fresh):
                self.seen[key] = {name: values[i] for name, values in columns.items()}
        rows = [self.seen[key] for key in keys]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def measures(real: Mapping[str, Tensor], train: Mapping[str, Tensor], fake: Mapping[str, Tensor],
             sound: Scenes, n: int) -> entries.Entries:  # fmt: skip
    """Every measure that needs no download, of the first n images of each side."""
    a, b = ({name: values[:n] for name, values in side.items()} for side in (real, fake))
    main = entries.Measured(a["main"], b["main"], "", "")
    found = main.frechet("Frechet distance") | main.kernel() | main.precision_recall() | main.density_coverage()
    found |= main.f_beta() | main.authenticity() | main.vendi()
    found |= entries.radiomic(*({"features": side["v1"], "v0": side["v0"]} for side in (a, b)), "")
    found |= entries.colour_drift(a, b)
    spaces = [{"pixels": side["small"], "features": side["main"]} for side in (train, b, a)]
    nearest = memorisation.examine(*spaces)
    found["copies of training images"] = entries.share([i in set(nearest.flagged) for i in range(n)], "")
    for name, space in nearest.spaces.items():
        found[f"nearer than held-out, {name}"] = {"value": space.nearer}
    judged = toyworld.faithfulness(sound.images[:n], sound.prompts[:n])["prompt faithfulness"]
    return found | {"prompt faithfulness": entries.share(judged, "")}


# --------------------------------------------------------------------------------------------------------- the matrix


def worse(name: str) -> int:
    """1 where a higher value is worse, -1 where a lower one is."""
    known = next((way for start, way in WORSE.items() if name.startswith(start)), 0)
    return known or -table.direction(name)


def verdict(values: Sequence[float], interval: tuple[float, float], way: int) -> str:
    """What a measure made of a damage, from its values at strengths 0 to 5 and the interval of the undamaged one:
    "still", "wrong" (it improved), "right" or "monotone"."""
    change = way * (values[-1] - values[0])
    low, high = interval
    most = max(values[1:], key=lambda value: abs(value - values[0]))
    if low <= most <= high:
        return "still"
    if change <= 0 or low <= values[-1] <= high:
        return "wrong"
    steps = way * np.diff(values)
    return "monotone" if (steps >= -BACKWARDS * change).all() else "right"


def matrix(count: int, side: int, counts: Sequence[int], say: Callable[[str], None]) -> dict:
    """{"measures": {name: {"undamaged": ..., damage: {"values", "verdict", "clear_at"}}}, ...}, all of it JSON.

    count   images on each side
    counts  numbers of images at which intervals are compared with the undamaged value, rising, up to `count`
    """
    eyes, sound = Eyes(), scenes(FAKE, count, side)
    real, train = eyes.look(scenes(REAL, count, side).images), eyes.look(sound.train)

    def all_of(damaged: Scenes, sizes: Iterable[int]) -> dict[int, entries.Entries]:
        fake = eyes.look(damaged.images)
        return {n: measures(real, train, fake, damaged, n) for n in sizes}

    base = all_of(sound, counts)
    names = list(base[count])
    found = {name: {"undamaged": base[count][name], "worse": worse(name)} for name in names}
    for label, damage in DAMAGES.items():
        say(label)
        at = {strength: all_of(damage(sound, strength), counts if strength == MIDDLE else [count])
              for strength in range(1, 6)}  # fmt: skip
        for name in names:
            first = base[count][name]
            values = [first["value"], *(at[strength][count][name]["value"] for strength in range(1, 6))]
            ends = first.get("interval") or {"low": first["value"] - 0.05, "high": first["value"] + 0.05}
            said, clear = verdict(values, (ends["low"], ends["high"]), worse(name)), None
            for n in reversed(counts if said in ("right", "monotone") else ()):  # from here on, up to all of them
                between, undamaged = at[MIDDLE][n][name].get("interval"), base[n][name]["value"]
                if not between or worse(name) * (between["low" if worse(name) > 0 else "high"] - undamaged) <= 0:
                    break
                clear = n
            found[name][label] = {"values": values, "verdict": said, "clear_at": clear}
    return {"images": count, "side": side, "counts": list(counts), "measures": found}


# ----------------------------------------------------------------------------------------------------------- the page

SIGNS = {"monotone": "●", "right": "○", "wrong": "×", "still": "·"}


def page(found: Mapping, side: int) -> str:
    """The matrix as HTML: a curve over the strengths in every cell, pictures of every damage above."""
    pictures, head, few = [], "", scenes(FAKE, 12, side)
    row = next(i for i, polyp in enumerate(few.polyps) if polyp)
    for label, damage in DAMAGES.items():
        shown = [webpage.Picture(damage(few, much).images[row], f"strength {much}") for much in (1, 2, 4, 5)]
        pictures.append(webpage.Row(label, [webpage.Picture(few.images[row], "undamaged")], shown, "undamaged"))
        head += f"<th>{webpage.thumbnail(shown[2].image)}{webpage.text(label)}</th>"
    rows = []
    for name, cells in found["measures"].items():
        drawn = "".join(_cell(cells[label], label, found["images"]) for label in DAMAGES)
        arrow = {1: "higher is worse", -1: "lower is worse"}.get(cells["worse"], "")
        rows.append(f'<tr><td>{webpage.text(name)}<div class="soft">{arrow}</div></td>{drawn}</tr>')
    grid = f'<table class="matrix"><tr><th>measure</th>{head}</tr>{"".join(rows)}</table>'
    body = f'<div class="scroll">{grid}</div>'
    legend = (
        f"{SIGNS['monotone']} moves the right way with every strength, {SIGNS['right']} the right way but not at every "
        f"strength, {SIGNS['wrong']} the wrong way or there and back, {SIGNS['still']} within the interval of "
        f"undamaged images. Beside it: from how many images on the interval of strength {MIDDLE} is clear of the "
        f"undamaged value at that number, which is the floor: no generator is better than fresh scenes (among "
        f"{', '.join(map(str, found['counts']))}); a dash: at none of them. Above each damage: a picture of strength 4."
    )
    return webpage.page(
        "Which number to believe",
        f"Twelve damages of the toy world in five strengths, {found['images']} images of {side} pixels a side.",
        [("The matrix", f'<p class="soft">{webpage.text(legend)}</p>{body}'),
         ("The damages", webpage.side_by_side(pictures))],
    )  # fmt: skip


def _cell(cell: Mapping, label: str, count: int) -> str:
    values = np.array(cell["values"], dtype=float)
    span = np.ptp(values) or 1.0
    points = " ".join(f"{4 + 12 * i},{26 - 22 * (v - values.min()) / span:.1f}" for i, v in enumerate(values))
    drawing = (f'<svg viewBox="0 0 68 30"><polyline points="{points}" '
               f'style="fill:none;stroke:var(--ink);stroke-width:1.8"/></svg>')  # fmt: skip
    said = ", ".join(f"{value:.4g}" for value in values)
    mark = f"{SIGNS[cell['verdict']]} {cell['clear_at'] or '–'}"
    return f'<td title="{label}: {said}" class="{cell["verdict"]}">{drawing}{mark}</td>'


def markdown(found: Mapping) -> str:
    """The matrix as a table of signs, with the number of images from which the interval is clear."""
    lines = ["| measure | " + " | ".join(DAMAGES) + " |", "|---|" + "---|" * len(DAMAGES)]
    for name, cells in found["measures"].items():
        row = [f"{SIGNS[cells[label]['verdict']]} {cells[label]['clear_at'] or ''}".strip() for label in DAMAGES]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def as_json(found: Mapping) -> str:
    """The matrix as text."""
    return json.dumps(found, indent=1, default=float)
