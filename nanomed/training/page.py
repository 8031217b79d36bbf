"""The page of a run: RUN/report.html, drawn from the run's own files, one file that needs nothing else
(run/webpage.py). It reads on a desktop and on a phone, in the light and in the dark.
"""

import json
import math
import os
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from nanomed.run import files, webpage
from nanomed.run.progress import duration
from nanomed.run.runs import Run
from nanomed.run.webpage import bullets, escaped, text

NAME = "report.html"
MAKER = '<meta name="generator" content="nanomed: a training run">'  # by this a page is known as one of these
GRIDS, SIDE = 12, 320  # grids shown of a stage, and the longer side of each in pixels
POINTS = 300  # of a curve, about as many as its drawing has pixels
NO_CURVES = ("stage", "step", "clipped", "skipped", "images_per_second", "memory_gb")
_failed: set[Path] = set()  # runs of which it was said that their page cannot be written

STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6877; --line: #dde3ea; --paper: #fff; --tint: #f5f7fa;
  --curve: #1f6fb2; --seen: #c2570c; --best: #2e7d4f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #9aa7b5; --line: #333d48; --paper: #1a2027;
  --tint: #11151a; --curve: #6cb2ee; --seen: #f0a05c; --best: #6fc795; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--tint); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 10px; overflow-wrap: anywhere; }
h3 { font-size: .9rem; font-weight: 600; margin: 0 0 4px; overflow-wrap: anywhere; }
p { margin: 0 0 10px; overflow-wrap: anywhere; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px;
  margin-top: 20px; }
.soft, figcaption, .key { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 20px;
  margin-top: 14px; }
.charts > div { min-width: 0; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); }
.axis { stroke: var(--line); } .raw { fill: none; stroke: var(--curve); stroke-width: .8; opacity: .5; }
.smooth { fill: none; stroke: var(--curve); stroke-width: 2.2; stroke-linejoin: round; }
.dot { fill: var(--curve); } .seen { fill: var(--seen); }
.time { display: flex; gap: 12px; overflow-x: auto; margin-top: 18px; padding-bottom: 8px; }
figure { margin: 0; flex: 0 0 min(220px, 70%); }
img { width: 100%; display: block; border-radius: 4px; border: 2px solid transparent; background: #000; }
img.small { image-rendering: pixelated; }
.kept img { border-color: var(--best); } .kept figcaption { color: var(--best); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere;
  vertical-align: top; }
th { font-weight: 600; color: var(--soft); width: 34%; }
ul { margin: 0; padding-left: 1.2em; } li { overflow-wrap: anywhere; }
@media (max-width: 680px) { body { font-size: 15px; } main { padding: 10px 10px 40px; } section { padding: 14px; } }
"""


def keep(run: Run) -> None:
    """Write the page anew, by rank 0. One that cannot be written is no reason to stop training: that is said once."""
    if run.ranks.first:
        try:
            write(run.folder)
        except Exception as error:  # whatever it is: a week's training is worth more than its picture
            if run.folder not in _failed:
                _failed.add(run.folder)
                run.say(f"{run.folder / NAME} cannot be written ({error}); training goes on without it")


def write(folder: str | Path) -> Path:
    """Draw a run's page from its config.json, state.json, log.jsonl, samples/ and test/results.json; return its path.

    Raises FileExistsError where a file of that name is there that is not such a page, OSError, ValueError and KeyError
    where the run's files cannot be read.
    """
    folder = Path(folder)
    page = folder / NAME
    if page.exists() and MAKER not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise FileExistsError("a file of that name is there already, and not a page of this run")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    lines = log_of(folder)
    stages = dict.fromkeys([*(line["stage"] for line in lines), *state.get("plan", ())])
    parts = [(f"Stage {name}", _stage(folder, name, lines, state)) for name in stages if name]
    results = folder / "test" / "results.json"
    if results.is_file():
        parts.insert(0, ("Results of the test", _results(json.loads(results.read_text(encoding="utf-8")))))
    given = {name: config.get(name, "") for name in config.get("given", ()) if name != "model"}
    parts += [
        ("Notes", bullets(notes(lines))),
        ("Settings that were given", _table(given) or '<p class="soft">none: all are the preset\'s</p>'),
        ("Machine", _table(_machine(config))),
    ]
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    lead = f"{config.get('model')} on {config.get('data')}: {state.get('status')}, as of {now}"
    files.write_text(page, webpage.page(folder.resolve().name, lead, parts, STYLE, f"{MAKER}\n"))
    return page


def log_of(folder: Path) -> list[dict]:
    """The lines of log.jsonl. One that a kill has cut short is left out."""
    found, path = [], folder / "log.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("stage"), str) and isinstance(entry.get("step"), int):
            found.append(entry)
    return found


def curves(lines: Sequence[dict]) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value), ...]} of a stage, by step. Of a step that was made twice, as after a kill, the later."""
    found: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and name not in NO_CURVES and "best" not in line and math.isfinite(value):
                found.setdefault(name, {})[line["step"]] = float(value)
    return {name: sorted(values.items()) for name, values in found.items()}


def smoothed(values: Sequence[float]) -> list[float]:
    """The exponential moving average over about a twentieth of the values, without a bias towards zero."""
    decay, total, weight, out = 1 - 1 / max(len(values) / 20, 1), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        out.append(total / weight)
    return out


def notes(lines: Sequence[dict]) -> list[str]:
    """What the log holds besides curves, the last hundred: notes, changed settings, steps that broke."""
    found: list[str] = []
    skipped: dict[str, int] = {}
    for line in lines:
        where = f"{line['stage'] or 'start'}, step {line['step']:,}"
        if "note" in line:
            found.append(f"{where}: {line['note']}")
        for name, change in line.get("changed", {}).items():
            told = "of the data are others" if name == "contents" else f"was {change[0]!r} and is {change[1]!r}"
            found.append(f"{where}: {name} {told}")
        if line.get("anyway"):
            found.append(f"{where}: gone on anyway; from here on the numbers are not an undisturbed run's")
        if "loss" in line and line["loss"] is None:
            found.append(f"{where}: the loss was not finite")
        if line.get("skipped", 0) > skipped.get(line["stage"], 0):
            skipped[line["stage"]] = line["skipped"]
            found.append(f"{where}: {line['skipped']} broken steps skipped so far")
    return found[-100:]


def chosen(items: Sequence[int], count: int = GRIDS) -> list[int]:
    """At most `count` of the items, evenly apart, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


# ------------------------------------------------------------------------------------------------------------ a stage


def _stage(folder: Path, stage: str, lines: Sequence[dict], state: dict) -> str:
    """Pace and time left, curves, and the grids as a time line."""
    mine = [line for line in lines if line["stage"] == stage]
    trained = [line for line in mine if "loss" in line]
    plan = state.get("plan", {}).get(stage, {})
    step, last = (mine[-1]["step"] if mine else 0), plan.get("steps", 0)
    told = [f"step {step:,} of {last:,}" if last else f"step {step:,}"]
    pace = trained[-1].get("images_per_second") if trained else None
    if stage in state.get("stages", ()):
        told.append("finished")
    elif pace and last > step:
        told.append(f"{duration((last - step) * plan['images'] / pace)} left, without the looks at checkpoints")
    if pace:
        told.append(f"{pace:g} images a second, {trained[-1].get('memory_gb', 0):g} GB")
    best = next((line["best"] for line in reversed(mine) if isinstance(line.get("best"), dict)), None)
    if best:
        told.append(f"kept: step {best['step']:,}")
    found = curves(mine)
    seen = found.pop("valid_loss", [])
    found = {"loss": found.pop("loss", [])} | found
    drawings = [_chart(name, points, seen if name == "loss" else []) for name, points in found.items()]
    pattern = re.compile(re.escape(stage) + r"-step-(\d+)\.png")
    grids = {int(m[1]): path for path in (folder / "samples").glob("*.png") if (m := pattern.fullmatch(path.name))}
    figures = [_figure(grids[n], f"step {n:,}", bool(best) and n == best["step"]) for n in chosen(sorted(grids))]
    charts = f'<div class="charts">{"".join(drawings)}</div>' if any(drawings) else ""
    line = f'<div class="time" tabindex="0" role="region" aria-label="grids">{"".join(figures)}</div>'
    return f"<p>{text('; '.join(told))}</p>{charts}{line if figures else ''}"


def _chart(name: str, points: Sequence[tuple[int, float]], seen: Sequence[tuple[int, float]]) -> str:
    """A curve by step: raw and thin, smoothed and thick; `seen` are dots, of the loss on held-out images. The scale is
    logarithmic, over four decades at most, where all values are positive."""
    if not points and not seen:
        return ""
    width, height, left, right, top, bottom = 360, 190, 52, 8, 10, 22
    steps, values = zip(*points, *seen)
    low, high = min(values), max(values)
    logarithmic = low > 0
    if logarithmic:
        low = max(low, high / 1e4)
        low, high = (low / 1.1, high * 1.1) if high / low < 1.2 else (low, high)
    elif low == high:
        low, high = low - 1, high + 1
    scale = math.log if logarithmic else float
    wide = max(max(steps) - min(steps), 1)

    def place(step: float, value: float) -> tuple[float, float]:
        share = (scale(min(max(value, low), high)) - scale(low)) / (scale(high) - scale(low))
        x = left + (width - left - right) * (step - min(steps)) / wide
        return x, height - bottom - (height - bottom - top) * share

    def line(kind: str, curve: Sequence[tuple[int, float]]) -> str:
        drawn = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve)
        return f'<polyline class="{kind}" points="{drawn}"/>' if len(curve) > 1 else ""

    smooth = list(zip((step for step, _ in points), smoothed([value for _, value in points])))
    shapes = [line("raw", extremes(points)), line("smooth", smooth[:: max(len(smooth) // POINTS, 1)] + smooth[-1:])]
    for kind, dots in (("seen", extremes(seen)), ("dot", points if len(points) == 1 else [])):
        for x, y in (place(*point) for point in dots):
            shapes.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    for value in (low, math.sqrt(low) * math.sqrt(high) if logarithmic else (low + high) / 2, high):
        _, y = place(min(steps), value)
        shapes.append(f'<line class="axis" x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"/>'
                      f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')  # fmt: skip
    for step, anchor in {min(steps): "start", max(steps): "end"}.items():
        x, _ = place(step, high)
        shapes.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{step:,}</text>')
    key = ([f"now {points[-1][1]:.4g}"] if points else []) + (
        [f"dots: held-out images, now {seen[-1][1]:.4g}"] if seen else []
    )
    key.append("log scale" if logarithmic else "linear scale")
    return (f'<div><h3>{text(name)}</h3><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escaped(name)}">'
            f'{"".join(shapes)}</svg><div class="key">{text(", ".join(key))}</div></div>')  # fmt: skip


def _short(value: float) -> str:
    """Three digits, and an exponent without its zero: what stands beside an axis."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def extremes(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A long curve by the least and the greatest of every few points, so that no peak is lost."""
    width = math.ceil(2 * len(points) / POINTS)
    if width <= 2:
        return list(points)
    out = []
    for start in range(0, len(points), width):
        few = points[start : start + width]
        out += sorted({min(few, key=lambda point: point[1]), max(few, key=lambda point: point[1])})
    return out


def _figure(path: Path, caption: str, kept: bool) -> str:
    """A grid, small, as an image inside the page."""
    said = caption + (", kept" if kept else "")
    with Image.open(path) as image:
        shown = webpage.thumbnail(image.convert("RGB"), SIDE, said)
    return f"<figure{' class=kept' if kept else ''}>{shown}<figcaption>{text(said)}</figcaption></figure>"


# ------------------------------------------------------------------------------------------------------ the other parts


def _results(results: dict) -> str:
    rows = {name: f"{each['value']:.4g} (N = {each['n_fake']}, {each['protocol']})" for name, each in results.items()}
    return _table(rows) + '<p class="soft">with intervals, floors and images: test/report.html</p>'


def _machine(config: dict) -> dict[str, str]:
    """What the run is computed on, by the process that draws the page."""
    made = config.get("environment", {})
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    versions = ", ".join(f"{name} {made[name]}" for name in ("python", "torch", "numpy", "cuda") if made.get(name))
    told = {"system": platform.platform(), "processor": f"{platform.machine()}, {os.cpu_count()} cores", "GPU": card,
            "processes": config.get("world", 1), "versions": versions, "commit": made.get("git")}  # fmt: skip
    return {name: str(value) for name, value in told.items() if value}


def _table(rows: dict) -> str:
    body = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{body}</table>" if rows else ""
