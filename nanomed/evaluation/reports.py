"""The pages of an evaluation: which pictures to show, and what to say beside them.

The drawing itself is webpage.py's business; this joins it to the sets of images.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from nanomed.data.table import DataError
from nanomed.evaluation import table, webpage
from nanomed.evaluation.imagesets import ImageSet
from nanomed.evaluation.measuring import Outcome
from nanomed.metrics.entries import Entries
from nanomed.run import files

ROWS, STRIP, PAIRS = 12, 4, 24  # lines of pictures, pictures on each side of a line, pairs of neighbours


def page(outcome: Outcome) -> str:
    """report.html."""
    sets = outcome.sets
    against = [f"{name} ({len(real):,})" for name, real in sets.reals.items()] + [f"{n} (?)" for n in sets.statistics]
    reals = ", ".join(against)
    lead = f"{len(sets.fake):,} generated images against {reals} real ones. Synthetic images are not for diagnosis."
    first = next(iter(sets.reals.values()), None)
    return webpage.page(
        f"{sets.fake.name} against {', '.join([*sets.reals, *sets.statistics])}",
        lead,
        [
            ("Measures", webpage.measures(outcome.results)),
            ("Notes", webpage.bullets([*outcome.notes, *(f"not measured: {line}" for line in lacking(outcome))])),
            ("Real and generated", webpage.side_by_side(list(_rows(first, sets.fake)) if first else [])),
            ("Nearest training images", _memorisation(outcome)),
            ("Precision and recall", _curves(outcome)),
            ("Colours", _colours(outcome)),
        ],
    )


def comparison(runs: Mapping[str, Entries], lines: Mapping[str, Entries]) -> str:
    """compare.html: the lines of the common table, then every run in full."""
    details = [(run, webpage.measures(results)) for run, results in runs.items()]
    return webpage.page(
        " against ".join(runs), "The best of every column is in bold.", [("All", webpage.comparison(lines)), *details]
    )


def read_results(where: str) -> Entries:
    """The results.json of a folder, or the file itself. Raises DataError for anything else."""
    path = Path(where)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"{path}: no such file; run evaluate.py with --out {where} first")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for name, entry in results.items():
            if not {"value", "protocol", "n_real", "n_fake"} <= entry.keys():
                raise ValueError(f"{name} has no value, protocol, n_real and n_fake")
            if not isinstance(entry["value"], (int, float, type(None))):
                raise ValueError(f"the value of {name} is no number")
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: not the results of evaluate.py ({error})") from None
    return results


def papers_tables(outcome: Outcome) -> str:
    """The terminal's short tables, in the papers' columns: one line for each real set, then the classifiers."""
    aside = ("colour", "saturation", "HLDF", "nearer", "copies", "classifier")
    runs = outcome.runs if len(outcome.runs) > 1 else {outcome.sets.fake.name: outcome.results}
    short = {run: {name: e for name, e in found.items() if not name.startswith(aside)} for run, found in runs.items()}
    classifiers = {name: e for name, e in outcome.shared.items() if name.startswith("classifier")}
    tables = [table.columns(found, mark=False) for found in (short, table.by_set("trained on", classifiers))]
    return "\n\n".join(filter(None, tables))


def nearest(outcome: Outcome) -> Iterator[dict]:
    """A line of nearest.jsonl for each of the closest pairs, the least likely by chance first."""
    for pair in outcome.nearest.closest:
        yield {
            "generated": outcome.sets.fake.title(pair.sample),
            "training": outcome.sets.train.title(pair.train),
            "space": pair.space,
            "distance": pair.distance,
            "p": pair.p,
            "flagged": pair.flagged,
        }


def _rows(real: ImageSet, fake: ImageSet) -> Iterator[webpage.Row]:
    """Real and generated images of the same class, else of the same prompt, else side by side as they come."""
    if real.labels and fake.labels:
        by_real, by_fake = _grouped([[x] for x in real.labels]), _grouped([[x] for x in fake.labels])
        chosen = [label for label in by_fake if label in by_real] or list(by_fake)
    elif fake.prompts and not real.prompts:
        by_fake = _grouped(fake.prompts)
        for i, (prompt, rows) in enumerate(list(by_fake.items())[:ROWS]):
            any_real = [row for row in range(i * STRIP, (i + 1) * STRIP) if row < len(real)]
            pictures = _pictures(real, any_real), _pictures(fake, rows)
            yield webpage.Row(prompt or "(no prompt)", *pictures, label="real, whose prompts are not known")
        return
    elif fake.prompts:
        by_real, by_fake = _grouped(real.prompts), _grouped(fake.prompts)
        chosen = sorted(by_fake, key=lambda prompt: prompt not in by_real)  # those with real images first
    else:
        for start in range(0, min(len(fake), ROWS // 2 * STRIP), STRIP):
            rows = range(start, start + STRIP)
            yield webpage.Row("", _pictures(real, [row for row in rows if row < len(real)]),
                             _pictures(fake, [row for row in rows if row < len(fake)]))  # fmt: skip
        return
    for name in chosen[:ROWS]:
        yield webpage.Row(name or "(no prompt)", _pictures(real, by_real.get(name, [])), _pictures(fake, by_fake[name]))


def _grouped(names) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, said in enumerate(names):
        for name in dict.fromkeys(said):
            rows.setdefault(name, []).append(row)
    return rows


def _pictures(images: ImageSet, rows: list[int]) -> list[webpage.Picture]:
    return [webpage.Picture(images.image(row), images.title(row)) for row in rows[:STRIP]]


def _memorisation(outcome: Outcome) -> str:
    found, sets = outcome.nearest, outcome.sets
    if found is None:
        return ""
    drawings = []
    for name, space in found.spaces.items():
        series = {"held-out to training" if sets.held_out else "training to other training": space.reference_relative,
                  "generated to training": space.relative}  # fmt: skip
        shares = {label: webpage.binned(values, 0, 1) for label, values in series.items()}
        title = f"Distance to the nearest training image in {name}, relative to a typical neighbour's"
        drawings.append(webpage.histogram(title, shares, 0, 1))
    pairs = []
    for pair in found.closest[:PAIRS]:
        fake = webpage.Picture(sets.fake.image(pair.sample), sets.fake.title(pair.sample))
        real = webpage.Picture(sets.train.image(pair.train), sets.train.title(pair.train))
        unit = "grey levels" if pair.space == "pixels" else f"in {pair.space}"
        said = f"{pair.distance:.3g} {unit}, p = {pair.p:.2g}{': a copy' if pair.flagged else ''}"
        pairs.append((fake, real, said, pair.flagged))
    return webpage.verdict(found.verdict, found.alarm) + webpage.charts(drawings) + webpage.pairs(pairs)


def _curves(outcome: Outcome) -> str:
    """The F-beta curves: precision over recall where F8 was measured, a drawing for each set and network, and
    beside it the curve between two disjoint sets of real images."""
    drawings = []
    for name, entry in outcome.results.items():
        if "curve" not in entry or not table.base(name).endswith("F8"):
            continue  # F1/8 has the same curve
        lines = {"real to generated": [(recall, precision) for precision, recall in entry["curve"]]}
        if "of_real" in entry:
            lines["real to real"] = [(recall, precision) for precision, recall in entry["of_real"]]
        title = f"{name.replace('F8', '').strip()} {entry['protocol'].split(',')[0]}".strip()
        drawings.append(webpage.curves(title, lines, "recall", "precision"))
    return webpage.charts(drawings) if drawings else ""


def _colours(outcome: Outcome) -> str:
    """Saturation and the three channels of the first real set and of the generated images."""
    named = {"real": next(iter(outcome.sets.reals), ""), "generated": outcome.sets.fake.name}
    sides = {label: outcome.colours[name] for label, name in named.items() if name}
    drawings = [webpage.histogram("Saturation", {label: c.saturation for label, c in sides.items()}, 0, 1)]
    for channel, colour in enumerate(("Red", "Green", "Blue")):
        shares = {label: c.channels[channel].reshape(64, 4).sum(1) for label, c in sides.items()}
        drawings.append(webpage.histogram(f"{colour}, share of grey levels", shares, 0, 255))
    means = {label: c.means.mean(1) for label, c in sides.items()}
    high = float(np.ceil(max(values.max() for values in means.values())))
    drawings.append(webpage.histogram("Mean brightness of an image", {
        label: webpage.binned(values, 0, max(high, 1.0)) for label, values in means.items()
    }, 0, max(high, 1.0)))  # fmt: skip
    return webpage.charts(drawings)


def lacking(outcome: Outcome) -> list[str]:
    """What could not be measured and why, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name, reason in outcome.lacking.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def publish(outcome: Outcome, out: str | Path) -> str:
    """Write results.json, report.html and, where training images were looked for, nearest.jsonl; return what belongs
    on the terminal."""
    out, written = Path(out), ["results.json", "report.html"]
    files.write_json(out / "results.json", outcome.results)
    files.write_text(out / "report.html", page(outcome))
    if outcome.nearest:
        written.append("nearest.jsonl")
        files.write_text(out / "nearest.jsonl", "".join(json.dumps(pair) + "\n" for pair in nearest(outcome)))
    else:
        (out / "nearest.jsonl").unlink(missing_ok=True)  # of an earlier evaluation
    files.mark_own(*(out / name for name in written))
    lines = [papers_tables(outcome), "", table.full(outcome.results), ""]
    lines += [f"memorisation: {outcome.nearest.verdict}"] if outcome.nearest else []
    lines += [f"note: {note}" for note in outcome.notes]
    lines += [f"not measured: {line}" for line in lacking(outcome)]
    return "\n".join([*lines, f"{out / 'results.json'}, {out / 'report.html'}"])
