"""A page that shows an evaluation: tables, pictures and charts in one HTML file (run/webpage.py) that reads on a
desktop and on a phone.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from nanomed.evaluation import table
from nanomed.run import webpage
from nanomed.run.webpage import bullets, text

THUMB = 160  # pixels, the longer side of a picture
SHOWN = 280  # characters of a prompt before it folds

STYLE = """
:root { --ink: #1d2733; --soft: #5b6877; --line: #dde3ea; --paper: #ffffff; --tint: #f5f7fa; --real: #1f6fb2;
  --fake: #d1661a; --best: #e7f3ec; --fair: #eef6e4; --bad: #fdecea; --warn: #9a4d00; color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--tint); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 12px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 12px; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 8px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px;
  margin-top: 20px; }
.soft, figcaption, .legend { color: var(--soft); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, table.cards th:last-child { text-align: left; }
th { color: var(--soft); font-weight: 600; }
td.wrap { white-space: normal; text-align: left; color: var(--soft); font-size: .85rem; min-width: 12em; }
td.best { background: var(--best); font-weight: 700; }
td .flag { color: var(--warn); font-weight: 700; }
.scroll { overflow-x: auto; } .below { margin-top: 14px; }
ul { margin: 0; padding-left: 1.2em; } li { margin-bottom: 4px; overflow-wrap: anywhere; }
.verdict { border-left: 4px solid var(--soft); background: var(--tint); padding: 10px 14px; margin-bottom: 16px; }
.verdict.alarm { border-color: #b3261e; background: var(--bad); }
.verdict.clear { border-color: #2e7d4f; background: var(--best); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 18px; }
.charts > div { max-width: 420px; }
svg { width: 100%; height: auto; display: block; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 16px; margin-top: 20px; }
.pair { border: 1px solid var(--line); border-radius: 8px; padding: 8px; min-width: 0; }
.pair.copy { border: 2px solid #b3261e; }
.pair .two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 6px; }
.row { border-top: 1px solid var(--line); padding: 14px 0; } .row:first-of-type { border-top: 0; padding-top: 0; }
.sides { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; }
.strip { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 6px; }
.side { font-size: .8rem; font-weight: 600; margin-bottom: 4px; }
.real { color: var(--real); } .fake { color: var(--fake); }
figure { margin: 0; min-width: 0; }
figcaption { overflow-wrap: anywhere; line-height: 1.3; margin-top: 3px; font-size: .75rem; }
img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #000; border-radius: 4px; display: block; }
img.small { image-rendering: pixelated; }
details summary { cursor: pointer; color: var(--soft); }
.legend b { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 4px 0 10px; }
table.matrix { table-layout: fixed; min-width: 1030px; font-size: .8rem; }
table.matrix th, table.matrix td { padding: 4px 5px; white-space: normal; text-align: center; vertical-align: bottom;
  line-height: 1.25; }
table.matrix th { font-size: .74rem; }
table.matrix th:first-child, table.matrix td:first-child { text-align: left; width: 148px; vertical-align: middle;
  position: sticky; left: 0; background: var(--paper); overflow-wrap: anywhere; }
table.matrix td .soft { font-size: .72rem; }
table.matrix td svg { width: 56px; height: 26px; margin: 0 auto 2px; }
table.matrix th img { width: 52px; margin: 0 auto 4px; }
td.monotone { background: var(--best); } td.right { background: var(--fair); } td.wrong { background: var(--bad); }
@media (max-width: 680px) {
  table.matrix th:first-child, table.matrix td:first-child { width: 104px; }
  body { font-size: 15px; } main { padding: 10px 10px 40px; } section { padding: 14px; border-radius: 8px; }
  .sides { grid-template-columns: 1fr; gap: 10px; } .pairs { grid-template-columns: 1fr 1fr; gap: 10px; }
  table.cards thead { display: none; }
  table.cards tr { display: flex; flex-wrap: wrap; column-gap: 14px; border-bottom: 1px solid var(--line);
    padding: 8px 0; }
  table.cards td { border: 0; padding: 1px 0; text-align: left; white-space: normal; }
  table.cards td:first-child { font-weight: 600; flex: 1 1 55%; }
  table.cards td:nth-child(2) { font-weight: 700; flex: 0 1 40%; text-align: right; }
  table.cards td:nth-child(n+3) { color: var(--soft); font-size: .85rem; }
  table.cards td:last-child { flex: 1 0 100%; }
  table.cards td:nth-child(n+3)::before { content: attr(data-label) ": "; }
  table.cards td.none { display: none; }
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e8ee; --soft: #9aa7b5; --line: #323c48; --paper: #1a2129; --tint: #12171d; --real: #6fb1e8;
    --fake: #f09a5b; --best: #1d3b2b; --fair: #2b3620; --bad: #4a2422; --warn: #f0b36b; }
}
"""


@dataclass(frozen=True)
class Picture:
    """An image and what is written under it."""

    image: np.ndarray  # uint8 (H, W, 3)
    caption: str = ""


@dataclass(frozen=True)
class Row:
    """Real and generated images that belong together: of one prompt, or of one class."""

    heading: str
    real: Sequence[Picture]
    fake: Sequence[Picture]
    label: str = "real"  # above the real ones


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole file. Titles are texts, the bodies of `sections` are HTML that the functions below made."""
    return webpage.page(title, lead, sections, STYLE)


def folded(value: str) -> str:
    """A prompt: long ones fold after their first words."""
    if len(value) <= SHOWN:
        return text(value)
    return f"<details><summary>{text(value[:SHOWN] + '…')}</summary>{text(value)}</details>"


# ------------------------------------------------------------------------------------------------------------- tables


def measures(results: table.Results) -> str:
    """One evaluation in full, with how intervals and floors were made below."""
    heads = ("value", "95% interval", "floor", "N real", "N fake", "protocol")
    lines = []
    for name, entry in results.items():
        value, between, floor, n_real, n_fake, protocol = table.cells(name, entry)
        flag = '<span class="flag" title="see the notes below"> !</span>' if entry.get("flag") else ""
        values = [f"{text(value)}{flag}", text(between), text(floor), text(n_real), text(n_fake), text(protocol)]
        tds = "".join(
            f'<td class="{"wrap" if head == "protocol" else ""}{" none" if cell == text("-") else ""}" '
            f'data-label="{head}">{cell}</td>'
            for head, cell in zip(heads, values)
        )
        lines.append(f"<tr><td>{text(table.headline(name))}</td>{tds}</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("metric", *heads))
    grid = f'<div class="scroll"><table class="cards"><thead><tr>{head}</tr></thead>{"".join(lines)}</table></div>'
    notes = [*table.flags(results), *table.methods(results)]
    return f'{grid}<div class="soft below">{bullets(notes)}</div>'


def comparison(runs: Mapping[str, table.Results]) -> str:
    """Several evaluations, one line each, the best of every column in bold."""
    names = table.ordered(runs)
    best = {name: table.best_of(name, runs) for name in names}
    head = "".join(f"<th>{text(table.headline(name))}</th>" for name in names)
    lines = []
    for run, results in runs.items():
        tds = []
        for name in names:
            value = table.number(name, results[name]["value"]) if name in results else "-"
            tds.append(
                f'<td class="best"><b>{text(value)}</b></td>' if run in best[name] else f"<td>{text(value)}</td>"
            )
        lines.append(f"<tr><td>{text(run)}</td>{''.join(tds)}</tr>")
    grid = f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>{"".join(lines)}</table></div>'
    return f'{grid}<div class="soft below">{bullets(table.caveats(runs))}</div>'


# ----------------------------------------------------------------------------------------------------------- pictures


def thumbnail(image: np.ndarray, side: int = THUMB) -> str:
    """An <img> with the picture inside, at most `side` pixels long."""
    return webpage.thumbnail(Image.fromarray(image), side)


def _figure(picture: Picture) -> str:
    caption = f"<figcaption>{text(picture.caption)}</figcaption>" if picture.caption else ""
    return f"<figure>{thumbnail(picture.image)}{caption}</figure>"


def side_by_side(rows: Sequence[Row]) -> str:
    """Real images to the left of generated ones, a line for each prompt or class."""
    out = []
    for row in rows:
        sides = []
        for name, label, pictures in (("real", row.label, row.real), ("fake", "generated", row.fake)):
            figures = "".join(map(_figure, pictures)) or '<span class="soft">none</span>'
            sides.append(f'<div><div class="side {name}">{text(label)}</div><div class="strip">{figures}</div></div>')
        out.append(f'<div class="row"><h3>{folded(row.heading)}</h3><div class="sides">{"".join(sides)}</div></div>')
    return "".join(out)


def pairs(found: Sequence[tuple[Picture, Picture, str, bool]]) -> str:
    """Generated images beside their nearest training images, what is said of the two, and whether one is a copy."""
    out = []
    for fake, real, note, copy in found:
        two = "".join(
            f'<div><div class="side {name}">{label}</div>{_figure(picture)}</div>'
            for name, label, picture in (("fake", "generated", fake), ("real", "training", real))
        )
        kind = "pair copy" if copy else "pair"
        out.append(f'<div class="{kind}"><div class="two">{two}</div><div class="legend">{text(note)}</div></div>')
    return f'<div class="pairs">{"".join(out)}</div>'


# ------------------------------------------------------------------------------------------------------------- charts

_COLOURS = ("var(--real)", "var(--fake)", "#6b7785")
_SMALL = "font-size:11px;fill:var(--soft)"


def histogram(title: str, series: Mapping[str, np.ndarray], low: float, high: float, unit: str = "") -> str:
    """Histograms over one range as an SVG drawing: {name: shares of equal bins between low and high}."""
    width, height, left, bottom, top = 360, 190, 8, 26, 10
    peak = max(max(float(np.max(values)) for values in series.values()), 1e-12)
    shapes = []
    for colour, values in zip(_COLOURS, series.values()):
        step = (width - 2 * left) / len(values)
        points = [f"{left},{height - bottom}"]
        for i, value in enumerate(values):
            y = height - bottom - (height - bottom - top) * float(value) / peak
            points += [f"{left + i * step:.1f},{y:.1f}", f"{left + (i + 1) * step:.1f},{y:.1f}"]
        points.append(f"{width - left},{height - bottom}")
        shapes.append(f'<polygon points="{" ".join(points)}" style="fill:{colour};fill-opacity:.18;stroke:{colour};'
                      f'stroke-width:1.4;stroke-linejoin:round"/>')  # fmt: skip
    ticks = []
    for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        x, value = left + share * (width - 2 * left), low + share * (high - low)
        ticks.append(f'<text x="{x:.0f}" y="{height - 8}" text-anchor="{anchor}" style="{_SMALL}">'
                     f"{value:.3g}{html.escape(unit if share == 1 else '')}</text>")  # fmt: skip
    base, right = height - bottom, width - left
    axis = f'<line x1="{left}" y1="{base}" x2="{right}" y2="{base}" style="stroke:var(--line)"/>'
    key = "".join(f'<b style="background:{colour}"></b>{text(name)}' for colour, name in zip(_COLOURS, series))
    drawing = f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}{axis}{"".join(ticks)}</svg>'
    return f'<div><h3>{text(title)}</h3>{drawing}<div class="legend">{key}</div></div>'


def curves(title: str, series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """Lines through points (x, y) between 0 and 1, in one square: {name: points}."""
    side, left, bottom, top = 260, 34, 34, 8
    wide, high = side - left - top, side - bottom - top
    grid, lines = "", ""
    for share in (0, 0.5, 1):
        x, y = left + share * wide, top + (1 - share) * high
        grid += f'<line x1="{left}" y1="{y:.1f}" x2="{left + wide}" y2="{y:.1f}" style="stroke:var(--line)"/>'
        grid += f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + high}" style="stroke:var(--line)"/>'
        grid += f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end" style="{_SMALL}">{share:g}</text>'
        grid += f'<text x="{x:.1f}" y="{top + high + 14}" text-anchor="middle" style="{_SMALL}">{share:g}</text>'
    for word, x, y, anchor in ((across, left + wide / 2, side - 4, "middle"), (up, left + 6, top + 14, "start")):
        grid += f'<text x="{x:.0f}" y="{y}" text-anchor="{anchor}" style="{_SMALL}">{html.escape(word)}</text>'
    for colour, points in zip(_COLOURS, series.values()):
        line = " ".join(f"{left + x * wide:.1f},{top + (1 - y) * high:.1f}" for x, y in points)
        lines += f'<polyline points="{line}" style="fill:none;stroke:{colour};stroke-width:2;stroke-linejoin:round"/>'
    key = "".join(f'<b style="background:{colour}"></b>{text(name)}' for colour, name in zip(_COLOURS, series))
    drawing = f'<svg viewBox="0 0 {side} {side}" role="img">{grid}{lines}</svg>'
    return f'<div><h3>{text(title)}</h3>{drawing}<div class="legend">{key}</div></div>'


def charts(drawings: Sequence[str]) -> str:
    """Drawings side by side."""
    return f'<div class="charts">{"".join(drawings)}</div>'


def binned(values: np.ndarray, low: float, high: float, bins: int = 32) -> np.ndarray:
    """Shares of values in equal bins of a range; what lies outside counts in the outermost ones."""
    counts, _ = np.histogram(np.clip(values, low, high), bins=bins, range=(low, high))
    return counts / max(counts.sum(), 1)


def verdict(line: str, alarm: bool) -> str:
    """A conclusion in one sentence, in the colour of good or bad news."""
    return f'<div class="verdict {"alarm" if alarm else "clear"}">{text(line)}</div>'
