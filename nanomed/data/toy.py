"""The embedded world: pictures that are meant to be colonoscopies, drawn from a seed, with the prompts they deserve.

It needs no download and no consent, and everything about an image is known, so a model can be trained in minutes and
asked afterwards whether it draws what it is told (`read`, `faithful`). Coordinates run over [0, 1], so a scene renders
at any size; the palette is chosen such that hue alone tells mucosa, polyp, instrument and box apart, at 32 pixels too.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanomed.data import grammar
from nanomed.data.grammar import CELLS
from nanomed.run import files
from nanomed.run.progress import progress

# Polyps are the only thing whose blue exceeds its green while red leads green; mucosa is orange (blue below green).
POLYP_COLORS = {"pink": (238, 112, 172), "red": (200, 34, 84), "purple": (148, 56, 160), "violet": (178, 92, 212),
                "burgundy": (124, 20, 66)}  # fmt: skip
DIAMETERS = dict(zip(grammar.SIZES, (0.17, 0.20, 0.24, 0.28)))  # of the image's side; a cell is 0.33
STEEL, GREEN = np.array([138, 156, 186], np.float32), np.array([34, 158, 72], np.float32)
NUMBERS = ("no polyps", "one polyp", "two polyps", "three polyps")  # as a caption counts
BOX = (0.02, 0.75, 0.26, 0.98)  # left, top, right, bottom: where the organisers' images have the scope guide


@dataclass(frozen=True)
class Polyp:
    """Where it is and how it looks."""

    cell: str
    size: str  # an entry of grammar.SIZES
    paris: str  # "is" sessile, "ip" on a stalk, "iia" flat
    color: str


@dataclass(frozen=True)
class Scene:
    """What an image shows; `seed` also fixes its texture."""

    seed: int
    procedure: str
    polyps: tuple[Polyp, ...]
    box: str  # "", "green" or "black"
    text: bool
    instrument: str  # "" or an entry of grammar.INSTRUMENTS
    path: tuple[str, ...]  # the cells the instrument lies in, from the edge inwards
    landmark: str  # "" or an entry of grammar.LANDMARKS, at the lumen
    lumen: tuple[float, float]


def _rng(*key: object) -> np.random.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def scene(seed: int) -> Scene:
    """The scene of a seed: half of them with a box, nearly half with polyps, two fifths with an instrument.

    Three polyps in five scenes: were it one in each, "1 polyp" would ask for no more of them than no prompt at all, and
    guidance, which enlarges the difference between the two, would have nothing to enlarge.
    """
    rng = _rng("toy scene", seed)
    box = str(rng.choice(["", "", "green", "black"]))
    free = [cell for cell in CELLS if not (box and cell == "lower-left")]
    number = int(rng.choice([0, 1, 2, 3], p=[0.55, 0.34, 0.08, 0.03]))
    cells = [free[i] for i in rng.permutation(len(free))[:number]]
    polyps = tuple(
        Polyp(
            cell,
            str(rng.choice(grammar.SIZES)),
            str(rng.choice(grammar.PARIS)),
            str(rng.choice(list(POLYP_COLORS))),
        )
        for cell in sorted(cells, key=CELLS.index)
    )
    paths = [path for path in _PATHS if not set(path) & set(cells) and set(path) <= set(free)]
    path = paths[rng.integers(len(paths))] if paths and rng.random() < 0.4 else ()
    lumen = (float(rng.uniform(0.36, 0.64)), float(rng.uniform(0.36, 0.64)))
    return Scene(
        seed=seed,
        procedure="colonoscopy" if rng.random() < 0.75 else "gastroscopy",
        polyps=polyps,
        box=box,
        text=bool(rng.random() < 0.4),
        instrument=str(rng.choice(grammar.INSTRUMENTS)) if path else "",
        path=path,
        landmark="" if polyps else str(rng.choice(grammar.LANDMARKS)),
        lumen=lumen,
    )


def _center(cell: str) -> tuple[float, float]:
    """(x, y) of a cell's middle, corner cells a little inwards, away from the black corners."""
    row, column = divmod(CELLS.index(cell), 3)
    return 0.5 + (column - 1) * 0.315, 0.5 + (row - 1) * 0.315


# One or two cells from an edge straight inwards.
_PATHS = [
    path
    for edge, inner in [("upper-left", "upper-center"), ("center-left", "center"), ("upper-right", "upper-center"),
                        ("center-right", "center"), ("lower-right", "lower-center"), ("upper-center", "center"),
                        ("lower-center", "center"), ("lower-left", "lower-center")]
    for path in ((edge,), (edge, inner))
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- drawing


def render(scene: Scene, size: int) -> np.ndarray:
    """The scene as uint8 RGB (size, size, 3); the same bytes every time."""
    rng = _rng("toy texture", scene.seed)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    x, y = (x + 0.5) / size, (y + 0.5) / size
    pixel = 1.0 / size
    image = _mucosa(scene, x, y, rng, size)
    if scene.path:
        image = _instrument(scene, image, x, y, rng, pixel)

    def draw(what, box: tuple[float, float, float, float], *arguments) -> None:
        """Let a small thing see and change only its part of the image."""
        left, top, right, bottom = (min(max(int(edge * size + 0.5), 0), size) for edge in box)
        part = slice(top, bottom), slice(left, right)
        image[part] = what(*arguments, image[part], x[part], y[part], rng, pixel)

    for polyp in scene.polyps:
        cx, cy = _center(polyp.cell)
        draw(_polyp, (cx - 0.25, cy - 0.25, cx + 0.25, cy + 0.35), polyp)
    for cx, cy, radius in _highlights(scene, rng):
        draw(_highlight, (cx - 0.03, cy - 0.03, cx + 0.03, cy + 0.03), (cx, cy, radius))
    corner = np.minimum(np.minimum(x + y, 2 - x - y), np.minimum(1 - x + y, 1 + x - y))
    image *= _soft(corner - 0.13, pixel)[..., None]  # the octagonal stop of an endoscope
    if scene.text:
        image = _text(image, rng, size)
    if scene.box:
        draw(_box, (0, 0.7, 0.3, 1), scene.box)
    image += 1.5 * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _soft(distance: np.ndarray, width: float) -> np.ndarray:
    """1 where `distance` is positive, 0 where negative, over an edge of about a pixel."""
    return np.clip(distance / width + 0.5, 0, 1)


def _mix(image: np.ndarray, color: np.ndarray, share: np.ndarray) -> np.ndarray:
    return image + (color - image) * share[..., None]


def _waves(x: np.ndarray, y: np.ndarray, rng: np.random.Generator, frequency: float, number: int = 5) -> np.ndarray:
    """Smooth noise of about unit size: a few cosines in random directions."""
    total = np.zeros_like(x)
    for angle, phase, stretch in rng.uniform((0, 0, 0.6), (math.pi, 2 * math.pi, 1.4), (number, 3)):
        along = math.cos(angle) * x + math.sin(angle) * y
        total += np.cos(2 * math.pi * frequency * stretch * along + phase)
    return total / math.sqrt(number / 2)


def _mucosa(scene: Scene, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    stomach = scene.procedure == "gastroscopy"
    base = np.array([214, 128, 92] if stomach else [206, 116, 88], np.float32) + rng.uniform(-14, 14) * np.array(
        [1, 0.7, 0.5]
    )
    tint = _waves(x, y, rng, 1.6)
    color = base.astype(np.float32) + tint[..., None] * np.array([7, 8, 4], np.float32)

    lx, ly = scene.lumen
    radius = np.hypot(x - lx, (y - ly) * rng.uniform(0.85, 1.15)) + 0.012 * _waves(x, y, rng, 2.5)
    around = np.arctan2(y - ly, x - lx)
    rings = rng.uniform(3.0, 4.5)
    lobes = 0.12 * np.cos(3 * around + rng.uniform(0, 6.28))
    fold = np.cos(2 * math.pi * rings * (np.sqrt(np.maximum(radius, 0) + 0.02) * 1.4 + lobes * radius))
    light = 0.92 + 0.13 * np.sign(fold) * np.abs(fold) ** 1.5 * np.clip(radius / 0.25, 0, 1)
    light = light * (1.06 - 0.5 * np.hypot(x - 0.5, y - 0.5) ** 2)
    depth = {"the pylorus": 0.055, "the ileum": 0.075}.get(scene.landmark, 0.11)
    light = light * (1 - 0.86 * np.exp(-((radius / depth) ** 2)))
    color = color * light[..., None]
    if scene.landmark:  # a pale rim round the opening
        rim = np.exp(-(((radius - 1.7 * depth) / 0.022) ** 2))
        pale = {"the z-line": (238, 196, 160), "the cecum": (226, 168, 120)}.get(scene.landmark, (232, 176, 140))
        color = _mix(color, np.array(pale, np.float32), 0.7 * rim)
    return _mix(color, np.array([158, 52, 40], np.float32), 0.5 * _vessels(rng, size))


def _vessels(rng: np.random.Generator, size: int) -> np.ndarray:
    """Branching lines, as a mask (size, size) in [0, 1]."""
    canvas = 2 * size
    mask = Image.new("L", (canvas, canvas))
    draw = ImageDraw.Draw(mask)
    branches = [(*rng.uniform(0.1, 0.9, 2), rng.uniform(0, 6.28), 0.007) for _ in range(4)]
    while branches:
        px, py, angle, width = branches.pop()
        for _ in range(7):
            angle += rng.normal(0, 0.35)
            qx, qy = px + 0.045 * math.cos(angle), py + 0.045 * math.sin(angle)
            draw.line(
                [px * canvas, py * canvas, qx * canvas, qy * canvas], fill=200, width=max(1, round(width * canvas))
            )
            px, py = qx, qy
            if width > 0.004 and rng.random() < 0.3:
                branches.append((px, py, angle + rng.choice([-0.8, 0.8]), width * 0.6))
    return np.asarray(mask.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _polyp(
    polyp: Polyp, image: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, pixel: float
) -> np.ndarray:
    half = DIAMETERS[polyp.size] / 2
    room = max(0.0, 0.15 - half) * 0.6
    cx, cy = np.array(_center(polyp.cell)) + rng.uniform(-room, room, 2)
    angle, squash = rng.uniform(0, math.pi), (0.8 if polyp.paris == "iia" else 0.93)
    along = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
    across = (y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)
    rho = np.hypot(along, across / squash) / half
    rho = rho * (1 + 0.05 * np.cos(3 * np.arctan2(y - cy, x - cx) + angle))
    color = np.array(POLYP_COLORS[polyp.color], np.float32) + rng.uniform(-8, 8)

    if polyp.paris == "ip":  # a stalk of mucosa below the head
        stalk = (
            _soft(half * 0.3 - np.abs(x - cx), pixel)
            * _soft(half * 1.5 - np.abs(y - cy - half * 0.6), pixel)
            * (y > cy)
        )
        image = _mix(image, np.array([186, 92, 74], np.float32), 0.8 * stalk)
    shadow = np.exp(-((np.maximum(np.hypot(x - cx - 0.01, y - cy - 0.02) / half - 0.9, 0) / 0.25) ** 2))
    image = image * (1 - (0.15 if polyp.paris == "iia" else 0.3) * shadow)[..., None]
    dome = np.sqrt(np.clip(1 - rho**2, 0, 1))
    lit = (x - cx) * -0.5 + (y - cy) * -0.8  # light from the upper left
    relief = 0.12 if polyp.paris == "iia" else 0.3
    shade = 1 - relief + relief * dome + relief * lit / half
    return _mix(image, color * shade[..., None], _soft((1 - rho) * half, pixel))


def _instrument(scene: Scene, image, x, y, rng, pixel) -> np.ndarray:
    sx, sy = _center(scene.path[0])
    tx, ty = _center(scene.path[-1])
    ox, oy = {"left": (-0.3, 0), "right": (0.3, 0), "upper": (0, -0.3), "lower": (0, 0.3)}[_edge(scene.path)]
    start = np.array([sx + ox, sy + oy]) + rng.uniform(-0.03, 0.03, 2)
    tip = np.array([tx - ox * 0.25, ty - oy * 0.25]) + rng.uniform(-0.02, 0.02, 2)
    direction = (tip - start) / np.linalg.norm(tip - start)
    length = np.linalg.norm(tip - start)
    along = (x - start[0]) * direction[0] + (y - start[1]) * direction[1]
    across = (y - start[1]) * direction[0] - (x - start[0]) * direction[1]
    half = rng.uniform(0.045, 0.055)
    rod = _soft(half - np.abs(across), pixel) * _soft(length - along, pixel)
    round_light = 0.72 + 0.45 * np.sqrt(np.clip(1 - (across / half) ** 2, 0, 1)) - 0.2 * across / half
    bands = 1 - 0.12 * (np.cos(2 * math.pi * along / 0.09) > 0.6)
    image = image * (1 - 0.35 * np.exp(-((across - half * 1.5) ** 2) / 0.001) * _soft(length - along, pixel))[..., None]
    image = _mix(image, np.clip(STEEL * (round_light * bands)[..., None], 0, 235), rod)
    if scene.instrument in ("biopsy forceps", "metal clip"):  # two jaws
        spread = np.abs(across) - (along - length) * 0.55
        jaws = _soft(0.016 - np.abs(spread), pixel) * _soft(along - length, pixel) * _soft(length + 0.07 - along, pixel)
        image = _mix(image, STEEL * 1.15, jaws)
    elif scene.instrument == "polyp snare":
        loop = np.abs(np.hypot((along - length - 0.055) / 1.3, across) - 0.042)
        image = _mix(image, STEEL * 1.15, _soft(0.011 - loop, pixel))
    elif scene.instrument == "injection needle":
        needle = (
            _soft(0.011 - np.abs(across), pixel) * _soft(along - length, pixel) * _soft(length + 0.1 - along, pixel)
        )
        image = _mix(image, STEEL * 1.2, needle)
    return image


def _edge(path: tuple[str, ...]) -> str:
    """From which side a path comes in."""
    first = path[0]
    if len(path) == 2 and first in ("upper-center", "lower-center"):
        return first.split("-")[0]
    return first.split("-")[1] if first.split("-")[1] != "center" else first.split("-")[0]


def _highlights(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(x, y, radius) of wet reflections: a few anywhere, one on every polyp."""
    spots = [(*rng.uniform(0.15, 0.85, 2), rng.uniform(0.006, 0.014)) for _ in range(rng.integers(3, 8))]
    centers = [_center(polyp.cell) for polyp in scene.polyps]
    return spots + [(px - 0.025, py - 0.035, 0.012) for px, py in centers]


def _highlight(place: tuple[float, float, float], image, x, y, rng, pixel) -> np.ndarray:
    cx, cy, radius = place
    spot = _soft(radius - np.hypot(x - cx, (y - cy) * 1.5), pixel)
    return _mix(image, np.array([252, 246, 240], np.float32), 0.85 * spot)


def _text(image: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """Two lines of a patient overlay at the upper edge, drawn large and reduced."""
    canvas = max(size, 256)
    mask = Image.new("L", (canvas, canvas))
    draw = ImageDraw.Draw(mask)
    font = ImageFont.load_default(size=canvas * 0.062)
    lines = (
        f"{rng.integers(10, 29)}/{rng.integers(10, 13)}/{rng.integers(2010, 2024)}",
        f"ID {rng.integers(1000, 9999)}",
    )
    for i, line in enumerate(lines):
        draw.text((canvas * 0.05, canvas * (0.02 + 0.07 * i)), line, fill=255, font=font)
    share = np.asarray(mask.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    return _mix(image, np.array([244, 244, 240], np.float32), share)


def _box(
    kind: str, image: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, pixel: float
) -> np.ndarray:
    """The scope guide: a green or a black rectangle; the black one has a green frame and the drawing of the scope."""
    left, top, right, bottom = BOX
    inside = np.minimum(np.minimum(x - left, right - x), np.minimum(y - top, bottom - y))
    fill = GREEN if kind == "green" else np.array([8, 14, 10], np.float32)
    image = _mix(image, fill, _soft(inside, pixel))
    cx, cy = (left + right) / 2, (top + bottom) / 2
    curve = np.abs(np.hypot(x - cx, (y - cy) * rng.uniform(0.8, 1.2)) - 0.06)
    line = np.array([8, 14, 10], np.float32) if kind == "green" else GREEN
    image = _mix(image, line, _soft(0.012 - curve, pixel) * (inside > 0))
    if kind == "black":
        frame = _soft(inside, pixel) * _soft(0.05 - inside, pixel)
        image = _mix(image, GREEN, frame)
    return image


# ---------------------------------------------------------------------------------------------------------- prompts


def prompts(scene: Scene) -> list[str]:
    """The 7 to 14 prompts of a scene, in the organisers' grammar."""
    n = len(scene.polyps)
    said = [
        grammar.procedure(scene.procedure),
        grammar.count("polyp", n),
        grammar.count("finding", n),
        grammar.count("instrument", int(bool(scene.instrument))),
        grammar.containing(grammar.BOX) if scene.box else grammar.not_containing(grammar.BOX),
        grammar.containing("text") if scene.text else grammar.not_containing("text"),
    ]
    if scene.polyps:
        said += [
            grammar.containing("a polyp"),
            grammar.located("abnormality", [polyp.cell for polyp in scene.polyps]),
            grammar.colors(dict.fromkeys(polyp.color for polyp in scene.polyps)),
            grammar.sizes(_present(grammar.SIZES, [polyp.size for polyp in scene.polyps])),
            grammar.paris(_present(grammar.PARIS, [polyp.paris for polyp in scene.polyps])),
        ]
    if scene.landmark:
        column, row = (int(3 * c) for c in scene.lumen)
        said += [grammar.containing(scene.landmark), grammar.located("anatomical landmark", [CELLS[3 * row + column]])]
    if scene.instrument:
        said += [grammar.containing(scene.instrument), grammar.located("instrument", scene.path)]
    return said


def _present(order: tuple[str, ...], values: list[str]) -> list[str]:
    return [value for value in order if value in values]


def version() -> str:
    """Changes when the drawing does, so that no cache serves an old world."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def write(folder: str | Path, n: int, size: int, seed: int = 0) -> None:
    """Render scenes seed .. seed + n - 1 to disk as the organisers lay their set out.

    `images/*.jpg` and `prompt-gt.csv` with `Prompt;Filename` and CRLF. The CSV comes last: where it is, all is.
    """
    lines = ["Prompt;Filename"]
    for number in progress(range(seed, seed + n), "rendering scenes", "image"):
        name = f"clb{hashlib.sha256(f'toy image {number}'.encode()).hexdigest()[:22]}.jpg"
        drawn = scene(number)
        with files.atomic(Path(folder) / "images" / name) as temporary:
            Image.fromarray(render(drawn, size)).save(temporary, format="JPEG", quality=95, subsampling=0)
        lines += [f"{prompt};{name}" for prompt in prompts(drawn)]
    files.write_text(Path(folder) / "prompt-gt.csv", "\r\n".join(lines) + "\r\n")


# ---------------------------------------------------------------------------------------------------------- reading


def read(image: np.ndarray) -> dict[str, object]:
    """What a uint8 image (H, W, 3) of this world shows, from its colours alone.

    Returns box, polyp, instrument (bool), polyps (int), positions (frozenset of cells). A cell holds a polyp when
    enough of its pixels have a polyp's hue; every polyp lies inside one cell.
    """
    size = len(image)
    red, green, blue = np.moveaxis(image.astype(np.int32), -1, 0)
    bright = image.max(-1) > 45
    polyp = bright & (blue - green > 0.07 * red) & (red - green > 0.12 * red)
    steel = bright & (blue - red > 10) & (blue - green > 6) & (red - green < 4)
    box = bright & (green - red > 25) & (green - blue > 12)

    edges = [round(i * size / 3) for i in range(4)]
    areas = {
        cell: polyp[edges[i // 3] : edges[i // 3 + 1], edges[i % 3] : edges[i % 3 + 1]].sum() / size**2
        for i, cell in enumerate(CELLS)
    }
    positions = frozenset(cell for cell, area in areas.items() if area > 0.0085)
    corner = box[size * 2 // 3 :, : size // 3]
    return {
        "box": bool(corner.sum() / size**2 > 0.010),
        "polyp": bool(positions),
        "polyps": len(positions),
        "positions": positions,
        "instrument": bool(steel.sum() / size**2 > 0.010),
    }


def answers(said: dict[str, object], seen: dict[str, object]) -> list[bool]:
    """Of what a prompt says (`grammar.parse`), all that `read` can judge, whether the image seen shows it: box yes or
    no, polyp yes or no, the number of polyps, their places (right when the set of cells is), instrument yes or no."""
    judged = {key: key for key in ("box", "polyp", "polyps", "instrument")} | {"abnormality_at": "positions"}
    return [said[key] == seen[judged[key]] for key in judged if key in said]


def faithful(image: np.ndarray, prompt: str) -> tuple[int, int]:
    """(attributes the image shows as the prompt says, attributes the prompt names that `read` can judge)."""
    right = answers(grammar.parse(prompt), read(image))
    return sum(right), len(right)


def claims(caption: str) -> list[str]:
    """What a caption of this world says (nanomed/captions/tiny.py writes them), as prompts of the organisers' grammar;
    of other texts, and of what it does not say, nothing."""
    said = []
    for number, words in enumerate(NUMBERS):
        if re.search(rf"\b{words}\b", caption):
            said.append(grammar.count("polyp", number))
    cells = re.findall(r"one in the (\S+?)[,.](?=\s|$)", caption)
    if cells and set(cells) <= set(CELLS):
        said.append(grammar.located("abnormality", cells))
    if match := re.search(r"There is (a|no)\b[^.]*\bbox artefact", caption):
        said.append(grammar.not_containing(grammar.BOX) if match[1] == "no" else grammar.containing(grammar.BOX))
    if match := re.search(r"There is (an|no) instrument", caption):
        said.append(grammar.count("instrument", int(match[1] == "an")))
    return said
