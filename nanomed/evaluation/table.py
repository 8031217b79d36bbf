"""Results as text: one evaluation in full, several side by side with the best in bold.

An entry is what results.json holds under a metric's name: `value`, `protocol`, `n_real`, `n_fake` and, where there are
any, `interval` {low, high, level, method}, `floor` {value, method, n}, `network` (SHA-256 of its weights), `real` (hash
of the real images), `flag` (why to be careful), `deviation`, `p`. A name may end in the set it was measured against:
"FID [single]".
"""

import re
from collections.abc import Iterable, Mapping

Results = Mapping[str, Mapping]

# What must be equal for two values to be one quantity.
DECISIVE = {"protocol": "protocol", "network": "network", "real": "real images"}

_DECIMALS = {"FID": 4, "KID": 5, "IS": 3, "KFD": 4, "HFD": 4}  # the papers' digits or more; others have 4
_LOWER = ("FID", "KID", "KFD", "HFD", "FD-DINOv2", "CMMD", "SwAV-FD", "FBD", "FRD", "distance", "copies")
_HIGHER = ("IS", "CLIPScore", "BiomedCLIP score", "precision", "recall", "F1", "F8", "F1/8", "density", "coverage",
           "classifier", "faithfulness", "yes/no", "position", "MEDVQA-GI fidelity", "MEDVQA-GI agreement")  # fmt: skip


def base(name: str) -> str:
    """The metric's name without the set it was measured against."""
    return re.sub(r" \[[^\]]*\]$", "", name)


def direction(name: str) -> int:
    """-1 where a lower value is better, 1 where a higher one is, 0 where neither can be said."""
    words = base(name)
    if words == "IS std":
        return 0
    if any(words == key or words.endswith(key) or words.startswith(f"{key} ") for key in _LOWER):
        return -1
    if any(words == key or words.endswith(key) or words.startswith(f"{key} ") for key in _HIGHER):
        return 1
    return 0


def number(name: str, value: float | None) -> str:
    """A value with the digits that the papers print."""
    if value is None:
        return "undefined"
    digits = _DECIMALS.get(base(name).split()[0], 4)
    return f"{value:.{digits if abs(value) < 100 else 2}f}"


def headline(name: str) -> str:
    """A metric's name with the arrow that says which way is better."""
    return f"{name} {('', '↑', '↓')[direction(name)]}".rstrip()


def columns(runs: Mapping[str, Results], bold: bool = False, mark: bool = True, width: int = 120) -> str:
    """One line a run, one column a metric, as the papers print their tables; below each other where `width` ends.

    The best of every column is marked, in bold where the terminal can (`bold`), else by a star: among values of one
    protocol, one network and the same real images. With `mark` off none is.
    """
    if not ordered(runs):
        return ""
    label, blocks = max(map(len, runs)), [[]]
    for name in ordered(runs):
        used = label + sum(2 + _width(other) for other in blocks[-1])
        if blocks[-1] and used + 2 + _width(name) > width:
            blocks.append([])
        blocks[-1].append(name)
    return "\n\n".join(_block(names, runs, bold, mark, label) for names in blocks)


def _width(name: str) -> int:
    return max(len(headline(name)), 9)


def _block(names: list[str], runs: Mapping[str, Results], bold: bool, mark: bool, label: int) -> str:
    lines = [" " * label + "".join(f"  {headline(name):>{_width(name)}}" for name in names)]
    best = {name: best_of(name, runs) if mark else set() for name in names}
    for run, results in runs.items():
        if not any(name in results for name in names):
            continue
        line = f"{run:{label}}"
        for name in names:
            text = number(name, results[name]["value"]) if name in results else "-"
            if run in best[name] and not bold:
                text = f"*{text}"
            padded = f"{text:>{_width(name)}}"
            line += f"  \033[1m{padded}\033[0m" if run in best[name] and bold else f"  {padded}"
        lines.append(line)
    return "\n".join(lines)


def by_set(label: str, results: Results) -> dict[str, Results]:
    """Results whose metrics name sets as one line for each: {"label [single]": {"FID": ...}, ...}."""
    rows: dict[str, dict] = {}
    for name, entry in results.items():
        rows.setdefault(label + name[len(base(name)) :], {})[base(name)] = entry
    return rows


def ordered(runs: Mapping[str, Results]) -> list[str]:
    """Every metric that some run has, in the order of first appearance."""
    return list(dict.fromkeys(name for results in runs.values() for name in results))


def best_of(name: str, runs: Mapping[str, Results]) -> set[str]:
    """The runs with the best value of a metric among those they can be compared with; none that stands alone."""
    way, best = direction(name), set()
    for alike in comparable(name, runs).values():
        values = {run: entry["value"] for run, entry in alike.items() if entry["value"] is not None}
        if way and len(values) > 1:
            highest = max(way * value for value in values.values())
            best |= {run for run, value in values.items() if way * value == highest}
    return best


def comparable(name: str, runs: Mapping[str, Results]) -> dict[tuple, dict[str, Mapping]]:
    """The runs that have a metric, {run: entry}, by what must be equal for its values to be one quantity."""
    groups: dict[tuple, dict[str, Mapping]] = {}
    for run, results in runs.items():
        if name in results:
            groups.setdefault(tuple(results[name].get(what) for what in DECISIVE), {})[run] = results[name]
    return groups


def caveats(runs: Mapping[str, Results]) -> list[str]:
    """What a reader of several runs side by side must know."""
    reasons: dict[str, list[str]] = {}
    for name in ordered(runs):
        groups = comparable(name, runs)
        if differ := [what for i, what in enumerate(DECISIVE) if len({key[i] for key in groups}) > 1]:
            said = " and ".join(DECISIVE[what] for what in differ)
            reasons.setdefault(f"the runs differ in {said}; the best is marked among equals", []).append(name)
        sizes = {min(e["n_real"] or e["n_fake"], e["n_fake"]) for alike in groups.values() for e in alike.values()}
        if direction(name) < 0 and len(sizes) > 1:
            counts = ", ".join(f"{size:,}" for size in sorted(sizes))
            reasons.setdefault(f"computed at different N ({counts}), on which the bias depends", []).append(name)
    return [f"{one_line(names)}: {reason}" for reason, names in reasons.items()]


def full(results: Results) -> str:
    """Every entry of one evaluation: value, interval, floor, N, protocol and network; then what to be careful with."""
    rows = [("metric", "value", "interval", "floor", "N real", "N fake", "protocol")]
    for name, entry in results.items():
        rows.append((headline(name), *cells(name, entry)))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for row in rows:
        left, rest = f"{row[0]:{widths[0]}}", "  ".join(f"{row[i]:>{widths[i]}}" for i in range(1, 6))
        lines.append(f"{left}  {rest}  {row[6]}".rstrip())
    return "\n".join([*lines, *methods(results), *flags(results)])


def cells(name: str, entry: Mapping) -> tuple[str, ...]:
    """(value, interval, floor, n_real, n_fake, protocol with network) of an entry, as text."""
    value = number(name, entry["value"])
    if entry.get("deviation") is not None:
        value += f" ± {number(name, entry['deviation'])}"
    interval, floor = entry.get("interval"), entry.get("floor")
    between = f"{number(name, interval['low'])} to {number(name, interval['high'])}" if interval else "-"
    counts = [f"{entry[side]:,}" if entry[side] else "-" for side in ("n_real", "n_fake")]
    network = f" [{entry['network'][:8]}]" if entry.get("network") else ""
    protocol = entry["protocol"] + (f", p = {entry['p']:.2g}" if "p" in entry else "") + network
    return value, between, number(name, floor["value"]) if floor else "-", *counts, protocol


def methods(results: Results) -> list[str]:
    """How intervals and floors were made, each way once, with the metrics it holds for."""
    ways: dict[str, list[str]] = {}
    for name, entry in results.items():
        if interval := entry.get("interval"):
            ways.setdefault(f"{interval['level']:.0%} intervals by {interval['method']}", []).append(name)
        if floor := entry.get("floor"):
            ways.setdefault(f"floor: {floor['method']}", []).append(name)
    return [f"{way} ({one_line(names, 4)})" for way, names in ways.items()]


def flags(results: Results) -> list[str]:
    """What to be careful with, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name, entry in results.items():
        if entry.get("flag"):
            reasons.setdefault(entry["flag"], []).append(name)
    return [f"! {one_line(names, 4)}: {reason}" for reason, names in reasons.items()]


def one_line(names: Iterable[str], most: int = 5) -> str:
    """The first few of many names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
