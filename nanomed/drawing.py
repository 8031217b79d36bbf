"""Prompts to PNGs, each exactly once: what sample.py does, and a training run at its end.

Row i of the prompts becomes OUT/0000i.png and depends on (seed, i) alone; --per_prompt 4 is as if every row stood
there four times. Rows are cut into fixed batches and ranks draw whole batches; one of which an image is missing is
drawn again as it was. So neither a stop, nor the number of ranks, nor what surrounds an image in its batch changes a
byte.

May import `weights` and `run`; the system is handed to it. Must not know training or metrics.
"""

import hashlib
import json
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from PIL import Image

from nanomed import weights
from nanomed.run import files
from nanomed.run.flags import UsageError
from nanomed.run.pictures import Picture, batches, images, remembering
from nanomed.run.progress import progress as counted
from nanomed.run.ranks import ALONE, Ranks

OWN = ("seed", "negative", "steps", "guidance", "size")  # what a row may decide for itself


@dataclass
class Drawing:
    """How prompts are drawn: flags of sample.py, too."""

    out: Annotated[str, "a folder to write"] = "samples"  # folder for the images and manifest.jsonl
    steps: Annotated[int | None, ">= 1"] = None  # solver steps; empty: the model's own
    sampler: Annotated[str, " | ddim | ddpm | dpmpp_2m | euler | pndm"] = ""  # in place of the model's own
    guidance: Annotated[float | None, "0 .. 1000"] = None  # guidance scale, 1 = none; empty: the model's own
    long_prompts: Annotated[str, "cut | refuse | chunk"] = "cut"  # where a text has more tokens than are read of one;
    # chunk: read in pieces, whose states are joined (systems that read CLIP alone)
    negative: str = ""  # what to guide away from, in place of the empty prompt
    batch: Annotated[int, "1 .. 65536"] = 16  # images at a time; other batch sizes change pixels by 1/255 at most
    per_prompt: Annotated[int, "1 .. 65536"] = 1  # images for each prompt
    seed: Annotated[int, "0 ..< 2^63"] = 0  # of all the images together
    size: Annotated[int | None, "1 .. 16384"] = None  # side in pixels; empty: the model's own
    tile: Annotated[int | None, "32 .. 16384"] = None  # decode larger images one by one, in tiles of such a side
    minmax: bool = False  # stretch every image to its own range, as MSDM's released code does
    precision: Annotated[str, "fp32 | bf16 | fp16"] = "fp32"  # of forward passes
    zip: bool = False  # also write OUT.zip


def draw(system, prompts: Sequence[str | dict], how: Drawing, ranks: Ranks = ALONE, progress: bool = False) -> None:
    """Write OUT/{row}.png for every prompt, and manifest.jsonl when all are there.

    prompts   texts, or rows of a prompts file (`read_rows`), whose entries decide in the place of `how`

    Raises UsageError where OUT holds images of another drawing, and for a size, a number of steps or a sampler that the
    system cannot take, and DataError for prompts that it cannot read; a drawing that fails before its first image
    leaves no trace in OUT.
    """
    if how.sampler and system.own_sampler:
        raise UsageError(f"--sampler {how.sampler}: {system.name} draws with a sampler of its own")
    system.eval()
    system.tile = how.tile
    if how.minmax:
        system.minmax = True
    pictures, names = ordered(prompts, how)
    for steps, size in dict.fromkeys((picture.steps, picture.size) for picture in pictures):
        system.check(steps, size)
    system.check_prompts([text for picture in pictures for text in (picture.prompt, picture.negative)])
    told: dict[str, str] = {}
    for row, prompt in enumerate(prompts):
        told.setdefault(prompt if isinstance(prompt, str) else prompt["prompt"], f"row {row}")
    for picture in pictures:
        told.setdefault(picture.negative, "negative")
    said, pieces = system.judge_lengths(told, how.long_prompts, getattr(how, "prompts", "") or "prompts")
    if ranks.first:
        print("\n".join(said), end="\n" if said else "")
    pictures = [replace(p, pieces=max(pieces.get(p.prompt, 1), pieces.get(p.negative, 1))) for p in pictures]
    out, settings = Path(how.out), _settings(system, pictures, names, how)
    archive = Path(f"{out.resolve()}.zip")
    if how.zip and ranks.first:
        files.expect_own(archive)
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    _claim(out, settings, ranks)
    try:
        _draw(system, pictures, names, how, ranks, progress)
    except BaseException:
        if ranks.first and not any(out.glob("*.png")):
            (out / "settings.json").unlink(missing_ok=True)
            for folder in new:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        raise
    if ranks.first:
        lines = []
        for row, (name, picture) in enumerate(zip(names, pictures)):
            own = {key: value for key, value in asdict(picture).items() if key in OWN and value is not None}
            line = {"file": name, "prompt": picture.prompt, "row": row, "sha256": files.sha256(out / name)}
            lines.append(line | settings["drawing"] | own)
        files.write_text(out / "manifest.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if how.zip:
            write_zip(archive, [out / name for name in names])
            files.mark_own(archive)


def _draw(system, pictures: list[Picture], names: list[str], how: Drawing, ranks: Ranks, progress: bool) -> None:
    """The images that are not there yet; every rank its share of the batches."""
    out = Path(how.out)
    todo = [rows for rows in batches(pictures, how.batch) if not all(whole(out / names[row]) for row in rows)]
    options = {"sampler": how.sampler} if how.sampler else {}
    with remembering(system):
        for rows in counted(ranks.share(todo), "drawing", "batch", shown=progress):
            drawn = images(system, [pictures[row] for row in rows], how.batch, how.precision, **options)
            for row, image in zip(rows, drawn):
                if not whole(out / names[row]):
                    files.write_png(out / names[row], image)
    ranks.barrier()


def ordered(prompts: Sequence[str | dict], how: Drawing) -> tuple[list[Picture], list[str]]:
    """What is to be drawn, `how.per_prompt` images for each prompt, and the names of the files.

    An image is number 0, 1, ... of the drawing's seed; where its row names a seed, it is number 0, 1, ... of that one,
    wherever in the file the row stands. Raises UsageError for a name that two images would have.
    """
    pictures, names = [], []
    for prompt in prompts:
        row = {"prompt": prompt} if isinstance(prompt, str) else prompt
        for i in range(how.per_prompt):
            number = len(pictures)
            seed, place = (row["seed"], i) if "seed" in row else (how.seed, number)
            own = {key: row.get(key, getattr(how, key)) for key in ("negative", "steps", "guidance", "size")}
            pictures.append(Picture(row["prompt"], seed, place, **own))
            name = row.get("file", f"{number:05d}")
            names.append(f"{name}-{i}.png" if "file" in row and how.per_prompt > 1 else f"{name}.png")
    taken: dict[str, int] = {}
    for number, name in enumerate(names):
        if (first := taken.setdefault(unicodedata.normalize("NFC", name).lower(), number)) != number:
            raise UsageError(f"images {first} and {number} would both be {name}: change the column file")
    return pictures, names


def write_zip(path: Path, images: list[Path]) -> None:
    """A zip of the images with fixed dates, so that the same images give the same bytes."""
    with files.atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for image in sorted(images):
            archive.writestr(zipfile.ZipInfo(image.name), image.read_bytes())


def whole(path: Path) -> bool:
    """Whether a PNG is there and complete (its checksums hold)."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
        return True
    except (OSError, SyntaxError, ValueError):
        return False


def _settings(system, pictures: list[Picture], names: list[str], how: Drawing) -> dict:
    """What decides the pixels: the drawing's settings (they go into the manifest) and the prompts, with what each row
    says for itself."""
    drawing = {
        "seed": how.seed,
        "steps": how.steps or system.steps,
        "guidance": system.guidance if how.guidance is None else how.guidance,
        "negative": how.negative,
        "size": how.size or system.size,
        "minmax": how.minmax,
        "precision": how.precision,
        "model": weights.fingerprint(system),
    } | {name: value for name, value in (("sampler", how.sampler), ("tile", how.tile)) if value}
    drawing |= {"lora": system.loras} if system.loras else {}
    if any(picture.pieces > 1 for picture in pictures):
        drawing["long_prompts"] = how.long_prompts
    texts = "\n".join(picture.prompt for picture in pictures)
    plain, usual = ordered([picture.prompt for picture in pictures], replace(how, per_prompt=1))
    if (pictures, names) != (plain, usual):
        texts = json.dumps([[name, *asdict(picture).values()] for name, picture in zip(names, pictures)])
    digest = hashlib.sha256(texts.encode()).hexdigest()
    return {"drawing": drawing, "batch": how.batch, "rows": len(pictures), "prompts": digest}


def _claim(out: Path, settings: dict, ranks: Ranks) -> None:
    """Make OUT this drawing's, or check that it is."""
    mark = out / "settings.json"
    if ranks.first:
        drawn = any(out.glob("*.png"))
        if mark.is_file():
            before = _read(mark)
            if drawn and before != settings:
                now, then = settings["drawing"], before["drawing"]
                different = [key for key in {**now, **then} if then.get(key) != now.get(key)]
                different += [key for key in ("batch", "rows", "prompts") if before.get(key) != settings[key]]
                raise UsageError(
                    f"{out} holds images drawn with other settings ({', '.join(different)}); "
                    f"choose another --out or remove it"
                )
        elif drawn or (out / "manifest.jsonl").exists():
            raise UsageError(f"{out} holds images that sample.py did not draw; choose another --out")
        files.write_json(mark, settings)
        files.sweep(out)
    ranks.barrier()


def _read(mark: Path) -> dict:
    """The settings.json of a drawing."""
    try:
        before = json.loads(mark.read_text(encoding="utf-8"))
        return before | {"drawing": dict(before["drawing"])}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{mark} is not of sample.py; choose another --out") from None
