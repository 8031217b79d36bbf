"""A table as it is printed: the paper's numbers beside the measured ones, each with N, protocol, interval and floor.

`gathered` makes one object of plain values, which is table.json; Markdown and the page are written from it alone.
"""

import html
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from nanomed import data
from nanomed.data.images import open_rgb
from nanomed.data.prompts import WORDS, read_prompts
from nanomed.evaluation import reports, webpage
from nanomed.evaluation.table import number
from nanomed.run import files
from nanomed.tables import steps
from nanomed.tables.rows import PARAMETERS, UNKNOWN, Column, Table
from nanomed.tables.running import Outcome
from nanomed.tables.steps import How

TOYS = "Toy stand-ins: shows the machinery, not the paper's result."
PICTURES = 6  # prompts whose images the page shows
KEPT = ("value", "interval", "floor", "n_real", "n_fake", "protocol", "network", "flag")  # of an entry


def gathered(table: Table, outcomes: list[Outcome], how: How) -> dict:
    """Everything that is printed, as plain values."""
    rows = []
    for outcome in outcomes:
        row, folder = outcome.row, steps.measuring(table, outcome.row, how).folder
        results = reports.read_results(str(folder)) if outcome.finished else {}
        rows.append({
            "name": row.name,
            "label": row.label,
            "state": "done" if outcome.finished else "failed" if outcome.error else "not run to its end",
            "error": outcome.error,
            "follows": row.follows,
            "measured": {column.heading: _measured(column, results, outcome.parameters) for column in table.columns},
            "paper": {heading: vars(found) for heading, found in row.paper.items()},
            "minutes": {what: round(seconds / 60, 2) for what, seconds in outcome.seconds.items()},
            "commands": outcome.commands,
        })  # fmt: skip
    return {"table": table.name, "title": table.title, "note": table.note, "toy stand-ins": how.tiny,
            "data": steps.data_of(table, how), "seed": how.seed,
            "columns": [column.heading for column in table.columns], "rows": rows}  # fmt: skip


def _measured(column: Column, results: Mapping, parameters: int | None) -> dict | None:
    if column.heading == PARAMETERS:
        return None if parameters is None else {"metric": PARAMETERS, "value": parameters}
    name = next((name for name in column.metrics if name in results), None)
    return None if name is None else {"metric": name} | {k: results[name][k] for k in KEPT if k in results[name]}


# ----------------------------------------------------------------------------------------------------------- as text


def value(found: Mapping | None) -> str:
    """A measured number with its interval; "-" where there is none."""
    if found is None:
        return "-"
    if found["metric"] == PARAMETERS:
        return f"{found['value']:,}"
    between = found.get("interval")
    ends = f" ({' to '.join(number(found['metric'], between[end]) for end in ('low', 'high'))})" if between else ""
    return number(found["metric"], found["value"]) + ends


def papers(row: Mapping, heading: str) -> str:
    """The paper's number; "-" where it is not known here."""
    if heading not in row["paper"]:
        return "-"
    printed = row["paper"][heading]["value"]
    return f"{printed:,}" if isinstance(printed, int) and printed > 999 else f"{printed:g}"


def lines_of(found: Mapping) -> list[list[str]]:
    """The table's cells, line by line, the headings first. A column that the paper's numbers are known of is two."""
    known = {heading for row in found["rows"] for heading in row["paper"]}
    heads = ["row"]
    for heading in found["columns"]:
        heads += [heading, f"{heading}, paper"] if heading in known else [heading]
    lines = [[*heads, "minutes"]]
    for row in found["rows"]:
        cells = [row["label"] + (f" ({row['state']})" if row["state"] != "done" else "")]
        for heading in found["columns"]:
            cells.append(value(row["measured"][heading]))
            cells += [papers(row, heading)] if heading in known else []
        lines.append([*cells, f"{sum(row['minutes'].values()):.1f}"])
    return lines


def protocols(found: Mapping) -> list[list[str]]:
    """How each number was measured: metric, N, protocol, floor, and of which rows where they are not all."""
    ways: dict[tuple[str, ...], list[str]] = {}
    for row in found["rows"]:
        for heading, entry in row["measured"].items():
            if entry and "protocol" in entry:
                floor = entry.get("floor")
                way = (heading, entry["metric"], f"{entry['n_real']:,}" if entry["n_real"] else "-",
                       f"{entry['n_fake']:,}", entry["protocol"], number(entry["metric"], floor["value"])
                       if floor else "-")  # fmt: skip
                ways.setdefault(way, []).append(row["name"])
    every = sum(row["state"] == "done" for row in found["rows"])
    lines = [[*way, "all" if len(names) == every else ", ".join(names)] for way, names in ways.items()]
    return [["column", "metric", "N real", "N fake", "protocol", "floor", "rows"], *lines]


def notes(found: Mapping) -> list[str]:
    """What must be known to read the table."""
    said = [TOYS] if found["toy stand-ins"] else []
    said.append(found["note"])
    missing = [heading for heading in found["columns"] if not all(heading in row["paper"] for row in found["rows"])]
    if missing:
        said.append(f"The paper's numbers that are not beside ours, of {', '.join(missing)}: {UNKNOWN}.")
    told: dict[str, list[str]] = {}  # of which rows the same is to be said
    for row in found["rows"]:
        if row["follows"]:
            told.setdefault(f"follows: {row['follows']}", []).append(row["name"])
        for heading, printed in row["paper"].items():
            told.setdefault(f"the paper's {heading}: {printed['source']}", []).append(row["name"])
    said += [f"{', '.join(names)}: {what}" for what, names in told.items()]
    said += [f"{row['name']} failed: {row['error']}" for row in found["rows"] if row["error"]]
    flags = {entry["flag"] for row in found["rows"] for entry in row["measured"].values() if entry and "flag" in entry}
    said += sorted(flags)
    said.append("In brackets the 95% interval; the floor is what two disjoint sets of real images score at this N.")
    return said


def _grid(lines: list[list[str]]) -> str:
    head, *rest = ([cell.replace("|", "/") for cell in line] for line in lines)
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rest)])


def markdown(found: Mapping) -> str:
    """table.md, which is also what the terminal shows."""
    title = f"# {found['table']}: {found['title']}"
    told = "\n".join(f"- {line}" for line in notes(found))
    grids = [_grid(lines) for lines in (lines_of(found), protocols(found)) if len(lines) > 1]
    return "\n\n".join([title, *grids, told, f"Data: {found['data']}, seed {found['seed']}."]) + "\n"


# ----------------------------------------------------------------------------------------------------------- as a page


def _html(lines: list[list[str]]) -> str:
    head, *rest = lines
    said = "".join(f"<th>{webpage.text(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{webpage.text(cell)}</td>" for cell in line) + "</tr>" for line in rest)
    return f'<div class="scroll"><table><thead><tr>{said}</tr></thead>{body}</table></div>'


def page(found: Mapping, pictures: list[webpage.Row]) -> str:
    """table.html: the table, how it was measured, the rows' images of the same prompts, and the commands."""
    commands = "".join(
        f'<h3>{webpage.text(row["label"])}</h3><pre class="scroll">{html.escape(chr(10).join(row["commands"]))}</pre>'
        for row in found["rows"]
    )
    lead = (f"{TOYS} " if found["toy stand-ins"] else "") + "Synthetic images are not for diagnosis."
    return webpage.page(f"{found['table']}: {found['title']}", lead, [
        ("The table", _html(lines_of(found))),
        ("How it was measured", _html(protocols(found)) if len(protocols(found)) > 1 else ""),
        ("Notes", webpage.bullets(notes(found))),
        ("Real images, and each row's", webpage.side_by_side(pictures)),
        ("Commands", commands),
    ])  # fmt: skip


def pictures(table: Table, outcomes: list[Outcome], how: How) -> Iterator[webpage.Row]:
    """For each of the first distinct prompts, its real images and the one that every row drew of it. Rows that were
    asked for other words show what they drew at the same place."""
    done = [outcome.row for outcome in outcomes if outcome.finished]
    if not done:
        return
    plain = next((row for row in done if not row.captions), done[0])
    prompts = read_prompts(steps.prompts(table, plain, how).folder / "prompts.csv", WORDS)
    real: dict[str, list[Path]] = {}
    for row in data.load(steps.data_of(table, how), _cache(how)).rows:
        for prompt in row.prompts:
            real.setdefault(prompt, []).append(row.file)
    for prompt in list(dict.fromkeys(prompts))[:PICTURES]:
        place = prompts.index(prompt)
        drawn = [(row, _images(steps.drawing(table, row, how, "").folder)[place]) for row in done]
        fakes = [webpage.Picture(_pixels(path), row.label) for row, path in drawn]
        yield webpage.Row(prompt or "(no prompt)", [webpage.Picture(_pixels(f)) for f in real.get(prompt, ())[:4]],
                          fakes)  # fmt: skip


def _images(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(open_rgb(path))


def _cache(how: How) -> str:
    return how.places[how.places.index("--cache") + 1] if "--cache" in how.places else "runs/cache"


def publish(table: Table, outcomes: list[Outcome], how: How) -> str:
    """Write table.json, table.md and table.html; return what belongs on the terminal."""
    found, folder = gathered(table, outcomes, how), how.out / table.name
    said = markdown(found)
    files.write_json(folder / "table.json", found)
    files.write_text(folder / "table.md", said)
    files.write_text(folder / "table.html", page(found, list(pictures(table, outcomes, how))))
    return said
