"""Measure generated images against real ones, whichever program made them.

    python evaluate.py --real DIR --fake DIR --out results        numbers, results.json and report.html
    python evaluate.py --real toy --fake samples                  the toy world: also prompt faithfulness
    python evaluate.py --real single=A,multi=B,both=A+B --fake DIR --protocol imageclef2024
    python evaluate.py --paper mmcp --real clef:DIR               which prompts to draw; then again with --fake
    python evaluate.py --compare results/a results/b              several results in one table, the best in bold
    torchrun --nproc-per-node 4 evaluate.py ...                   ranks share the images

Every number carries N, its protocol, an interval, what real images score against each other at this N, and the hash of
the network. A set is a folder of images, of class folders, or a data set as train.py takes it (clef:DIR, toy:N, ...).
"""

import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from nanomed import data
from nanomed.data import ranges
from nanomed.run import files, flags
from nanomed.run.flags import UsageError
from nanomed.run.ranks import Ranks

PROTOCOLS = "tf | pytorch-fid | clean | torchmetrics | torchmetrics>=1.8 | imageclef2024"


@dataclass
class Config:
    real: str = ""  # real images: a set, or several by comma, NAME=SET, A+B as one; toy; FILE.npz or cached features
    fake: str = ""  # generated images; with the manifest.jsonl of sample.py their prompts are known
    train: str = ""  # what the model was trained on, for memorisation and classify; empty: the real images
    prompts: str = ""  # file of prompts, row i for the i-th image by name; a column label gives classes
    out: Annotated[str, "a folder to write"] = "results"  # folder for results.json and report.html
    metrics: str = ""  # such as fid,kid,pr,dino,cmmd (a name that is none lists them), or all; empty: the usual ones
    protocol: Annotated[str, PROTOCOLS] = "tf"  # tf: the papers' own; of torchmetrics the versions from 1.8 on
    paper: Annotated[str, " | mmcp | medart"] = ""  # the paper's own choice of prompts and real images
    captions: str = ""  # with --paper: in place of the data's own prompts, as train.py takes them
    compare: str = ""  # results to put side by side: folders or NAME=FOLDER
    inception: str = ""  # the Inception file; empty: weights/inception/
    classifier: str = ""  # what classify starts from: a folder, or tiny; empty: google/vit-base-patch16-224-in21k
    weights: str = ""  # where weights are, besides weights/ and the Hugging Face cache
    cache: Annotated[str, "a folder to write"] = "runs/cache"  # where features are kept
    range: str = ""  # auto | BITS | LOW:HIGH: black and white of images with more than 8 bits; empty: 0 and 2^16 - 1
    intervals: bool = True  # with intervals and floors: a dozen times the arithmetic, no more passes of a network
    skip_bad: bool = False  # leave damaged images out, counted and named, instead of stopping
    limit: Annotated[int, ">= 0"] = 0  # use the first images of every set only; 0 = all
    batch: Annotated[int, "1 .. 65536"] = 32  # images at a time in a network
    device: str = ""  # cuda, cuda:1 or cpu; empty: the best there is
    k: Annotated[int, ">= 1"] = 3  # neighbours of precision and recall
    seed: Annotated[int, "0 ..< 2^32"] = 2204  # of splits (train.py's default), rows, subsets, groups and classifiers
    stand_in: Annotated[str, "a file to write"] = ""  # train the toy world's classifier, write it to this file and stop


def main() -> None:
    config = flags.parse(Config, gathered(sys.argv[1:]), description=__doc__)
    flags.check_place(f"--out {config.out}", config.out, folder=True)
    if config.stand_in:
        from nanomed.evaluation import toyworld

        files.expect_own(config.stand_in)
        print(f"right on held-out scenes: {toyworld.train_stand_in(config.stand_in):.4f}")
        files.mark_own(config.stand_in)
        return
    if config.compare:
        return compare(config)
    asked = chosen(config)
    ranges.judge(config.range)
    if config.fake:
        files.expect_own(*(Path(config.out) / name for name in ("results.json", "report.html", "nearest.jsonl")))
    ranks = Ranks.join(config.device, float64=True)
    sets = find_sets(config)
    if sets is None:  # the prompts of a paper's set-up were asked for, and are written
        return
    import torch

    from nanomed.evaluation import measuring, reports

    measuring.exactly()
    settings = measuring.Settings(**{field.name: getattr(config, field.name) for field in fields(measuring.Settings)})
    with torch.inference_mode():
        outcome = measuring.measure(sets, asked, settings, ranks)
    if outcome is None:  # only the first rank computes
        return
    if "classify" in asked or (measuring.EVERYTHING in asked and "classify" not in outcome.lacking):
        try:
            outcome.shared |= measuring.classify(outcome.sets, settings, ranks.device)
        except FileNotFoundError as error:  # of the network that it starts from
            if "classify" in asked:
                raise
            outcome.lacking["classify"] = measuring.download(error)
    print(reports.publish(outcome, config.out))


def gathered(words: list[str]) -> list[str]:
    """Command-line words, with those after --compare joined to one."""
    if "--compare" not in words:
        return words
    start = words.index("--compare") + 1
    stop = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))
    return [*words[:start], ",".join(words[start:stop]), *words[stop:]]


def chosen(config: Config) -> tuple[str, ...]:
    """The metrics to measure."""
    from nanomed.evaluation.measuring import EVERYTHING, FOREIGN, METRICS, ORGANISERS

    config.protocol = "torchmetrics" if config.protocol == "torchmetrics>=1.8" else config.protocol
    asked = tuple(name.strip() for name in config.metrics.split(",") if name.strip())
    if unknown := [name for name in asked if name not in (*METRICS, EVERYTHING)]:
        raise UsageError(f"--metrics {unknown[0]}: choose among {', '.join(METRICS)}, or all")
    if config.protocol == ORGANISERS and (foreign := set(FOREIGN) & set(asked)):
        raise UsageError(f"--metrics {min(foreign)}: the protocol imageclef2024 has fid and is alone")
    return asked


# ---------------------------------------------------------------------------------------------------------- the sets


def find_sets(config: Config):
    """The sets (measuring.Sets) that the command line names; None when it asks for a paper's prompts, now written."""
    from nanomed.evaluation import imagesets, measuring, papers, statistics

    setup = None
    if config.captions and not config.paper:
        raise UsageError(f"--captions {config.captions}: they are of the set-up of a --paper, which is not said")
    if config.paper:
        if not config.real:
            raise UsageError(f"--paper {config.paper}: say the paper's data, such as --real clef:DIR")
        setup = papers.find(config.paper, config.real, config.cache, config.seed, config.captions, config.range)
        setup = setup.first(config.limit) if config.limit else setup
        if not config.fake:
            return write_prompts(setup, config)
    if not config.real or not config.fake:
        raise UsageError("say which images: --real DIR --fake DIR")
    folder = Path(config.fake)
    folder = folder / "test" if (folder / "test" / "manifest.jsonl").is_file() else folder  # a run of train.py
    fake = imagesets.find(str(folder), limit=config.limit, span=config.range)
    fake = imagesets.with_prompts(fake, str(folder), config.prompts)
    if setup:
        return measuring.Sets(
            {"real": setup.real}, setup.drawn(fake, config.fake), setup.train, setup.train is not setup.real,
            config.real.startswith("toy"), tuple(setup.metrics.split(",")), [setup.note],
        )  # fmt: skip

    reals, found, known = {}, {}, {}
    for name, specs in named(config.real).items():
        if len(specs) == 1 and statistics.holds(specs[0]):
            known[name] = statistics.read(specs[0])
            continue
        if together := [spec for spec in specs if statistics.holds(spec)]:
            raise UsageError(f"--real {'+'.join(specs)}: {together[0]} holds statistics, which join with nothing")
        for spec in specs:
            if spec == "toy":
                found[spec] = imagesets.fresh_scenes(len(fake), imagesets.side_of(fake))
            elif spec not in found:
                found[spec] = imagesets.find(spec, limit=config.limit, cache=config.cache, span=config.range)
        parts = [found[spec] for spec in specs]
        reals[name] = parts[0] if len(parts) == 1 else imagesets.union(name, parts)
    if config.train:
        train = imagesets.find(config.train, limit=config.limit, cache=config.cache, span=config.range)
    else:  # fresh scenes were never trained on
        distinct = [images for spec, images in found.items() if spec != "toy"]
        train = imagesets.union("real", distinct) if len(distinct) > 1 else distinct[0] if distinct else None
    toy_world = any(spec.startswith("toy") for spec in found)
    notes = imagesets.suspicions(found, config.fake, fake)
    return measuring.Sets(reals, fake, train, bool(config.train), toy_world, notes=notes, statistics=known)


def named(spec: str) -> dict[str, list[str]]:
    """{name: sets} of a --real: "A", "A,B", "one=A,two=B,both=A+B"."""
    if Path(spec).exists():
        return {spec: [spec]}
    sets: dict[str, list[str]] = {}
    for item in filter(None, (item.strip() for item in spec.split(","))):
        name, equals, where = item.partition("=")
        if not equals or Path(item).exists():
            name = where = item
        if not name.strip() or not all(part.strip() for part in where.split("+")):
            raise UsageError(f"--real {spec}: {item} names no set; say DIR, NAME=DIR or NAME=DIR+DIR")
        if name in sets:
            raise UsageError(f"--real {spec}: two sets are called {name}")
        sets[name] = [where] if Path(where).exists() or data.there(where) else where.split("+")
    if not sets:
        raise UsageError(f"--real {spec}: it names no set")
    return sets


def write_prompts(setup, config: Config) -> None:
    """Write the prompts of a paper's set-up and say what to do with them."""
    path, fake = Path(config.out) / "prompts.csv", Path(config.out) / "fake"
    files.expect_own(path)
    setup.write(path)
    files.mark_own(path)
    print(f"{setup.note}\n{path}: the prompts. Draw them, then measure what was drawn:")
    print(f"python sample.py --prompts {path} --out {fake}{setup.drawing}")
    same = f"--captions {shlex.quote(config.captions)} " if config.captions else ""
    same += f"--limit {config.limit} " if config.limit else ""
    same += f"--range {config.range} " if config.range else ""
    print(f"python evaluate.py --paper {setup.name} --real {config.real} --seed {config.seed} {same}--fake {fake} "
          f"--out {config.out}")  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the results


def compare(config: Config) -> None:
    """Several results in one table, on the terminal and in compare.html; the best of every column in bold."""
    from nanomed.evaluation import reports, table

    runs: dict[str, dict] = {}
    for item in filter(None, (item.strip() for item in config.compare.split(","))):
        name, equals, where = item.partition("=")
        if not equals or Path(item).exists():
            name = where = item
        if name in runs:
            raise UsageError(f"--compare {config.compare}: two results are called {name}; say NAME=FOLDER")
        runs[name] = reports.read_results(where)
    lines = {line: found for name, results in runs.items() for line, found in table.by_set(name, results).items()}
    if len(lines) < 2:
        raise UsageError("--compare needs two results or more: --compare A B, or NAME=FOLDER for each")
    print(table.columns(lines, bold=sys.stdout.isatty()))
    for caveat in table.caveats(lines):
        print(f"! {caveat}")
    path = Path(config.out) / "compare.html"
    files.expect_own(path)
    files.write_text(path, reports.comparison(runs, lines))
    files.mark_own(path)
    print(path)


if __name__ == "__main__":
    flags.main(main)
