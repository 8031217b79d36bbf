"""Prompts to PNGs, each exactly once: what sample.py does, and a training run at its end.

Row i of the prompts becomes OUT/0000i.png and depends on (seed, i) alone. Rows are cut into fixed batches and ranks
draw whole batches; one of which an image is missing is drawn again as it was. So neither a stop, nor the number of
ranks, nor what surrounds an image in its batch changes a byte.

May import `weights` and `run`; the system is handed to it. Must not know training or metrics.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from PIL import Image
from tqdm import tqdm

from nanomed import weights
from nanomed.run import files
from nanomed.run.cache import Remembered
from nanomed.run.flags import UsageError
from nanomed.run.hardware import autocast
from nanomed.run.randomness import ImageNoise
from nanomed.run.ranks import ALONE, Ranks


@dataclass
class Drawing:
    """How prompts are drawn: flags of sample.py, too."""

    out: Annotated[str, "a folder to write"] = "samples"  # folder for the images and manifest.jsonl
    steps: Annotated[int | None, ">= 1"] = None  # solver steps; empty: the model's own
    sampler: Annotated[str, " | ddim | ddpm | dpmpp_2m | euler | pndm"] = ""  # in place of the model's own
    guidance: Annotated[float | None, "0 .. 1000"] = None  # guidance scale, 1 = none; empty: the model's own
    negative: str = ""  # what to guide away from, in place of the empty prompt
    batch: Annotated[int, "1 .. 65536"] = 16  # images at a time; other batch sizes change pixels by 1/255 at most
    seed: Annotated[int, "0 ..< 2^63"] = 0  # of all the images together
    size: Annotated[int | None, "1 .. 16384"] = None  # side in pixels; empty: the model's own
    tile: Annotated[int | None, "32 .. 16384"] = None  # decode larger images one by one, in tiles of such a side
    minmax: bool = False  # stretch every image to its own range, as MSDM's released code does
    precision: Annotated[str, "fp32 | bf16 | fp16"] = "fp32"  # of forward passes
    zip: bool = False  # also write OUT.zip


@torch.inference_mode()
def draw(system, prompts: list[str], how: Drawing, ranks: Ranks = ALONE, progress: bool = False) -> None:
    """Write OUT/{row}.png for every prompt, and manifest.jsonl when all are there.

    Raises UsageError where OUT holds images of another drawing, and for a size, a number of steps or a sampler that the
    system cannot take, and DataError for prompts that it cannot read; a drawing that fails before its first image
    leaves no trace in OUT.
    """
    if how.sampler and system.own_sampler:
        raise UsageError(f"--sampler {how.sampler}: {system.name} draws with a sampler of its own")
    system.check(how.steps, how.size)
    system.check_prompts([*prompts, how.negative])
    system.eval()
    system.tile = how.tile
    if how.minmax:
        system.minmax = True
    out, settings = Path(how.out), _settings(system, prompts, how)
    names = [f"{row:05d}.png" for row in range(len(prompts))]
    batches = [range(start, min(start + how.batch, len(prompts))) for start in range(0, len(prompts), how.batch)]
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    _claim(out, settings, ranks)
    try:
        _draw(system, prompts, how, ranks, names, batches, progress)
    except BaseException:
        if ranks.first and not any(out.glob("*.png")):
            (out / "settings.json").unlink(missing_ok=True)
            for folder in new:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        raise
    if ranks.first:
        lines = [
            {"file": name, "prompt": prompt, "row": row, "sha256": files.sha256(out / name)} | settings["drawing"]
            for row, (name, prompt) in enumerate(zip(names, prompts))
        ]
        files.write_text(out / "manifest.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if how.zip:
            write_zip(Path(f"{out.resolve()}.zip"), [out / name for name in names])


def _draw(system, prompts: list[str], how: Drawing, ranks: Ranks, names: list[str], batches: list[range], progress):
    """The images that are not there yet; every rank its share of the batches."""
    out = Path(how.out)
    todo = [rows for rows in batches if not all(whole(out / names[row]) for row in rows)]

    system.encode_text = Remembered(system.encode_text)  # every distinct prompt once
    for rows in tqdm(ranks.share(todo), unit="batch", disable=not progress or not ranks.first):
        padded = [*rows, *[rows[-1]] * (how.batch - len(rows))]  # a short batch is computed at full size
        noise = ImageNoise(how.seed, padded, ranks.device)
        texts = [prompts[row] for row in padded]
        with autocast(how.precision, ranks.device):
            images = system.sample(
                texts, noise, how.steps, how.guidance,
                negative_prompts=[how.negative] * len(texts) if how.negative else None,
                height=how.size, width=how.size, **({"sampler": how.sampler} if how.sampler else {}),
            )  # fmt: skip
        for row, image in zip(rows, images):
            if not whole(out / names[row]):
                files.write_png(out / names[row], files.to_bytes(image))
    ranks.barrier()


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


def _settings(system, prompts: list[str], how: Drawing) -> dict:
    """What decides the pixels: the drawing's settings (they go into the manifest) and the prompts."""
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
    texts = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return {"drawing": drawing, "batch": how.batch, "rows": len(prompts), "prompts": texts}


def _claim(out: Path, settings: dict, ranks: Ranks) -> None:
    """Make OUT this drawing's, or check that it is."""
    mark = out / "settings.json"
    if ranks.first:
        drawn = any(out.glob("*.png"))
        if mark.is_file() and drawn:
            before = _read(mark)
            if before != settings:
                now, then = settings["drawing"], before["drawing"]
                different = [key for key in {**now, **then} if then.get(key) != now.get(key)]
                different += [key for key in ("batch", "rows", "prompts") if before.get(key) != settings[key]]
                raise UsageError(
                    f"{out} holds images drawn with other settings ({', '.join(different)}); "
                    f"choose another --out or remove it"
                )
        elif drawn:
            raise UsageError(f"{out} holds images that sample.py did not draw; choose another --out")
        files.write_json(mark, settings)
        files.sweep(out)
    ranks.barrier()


def _read(mark: Path) -> dict:
    """The settings in a mark; of one that is none, nothing is known."""
    try:
        before = json.loads(mark.read_text(encoding="utf-8"))
        return before if isinstance(before["drawing"], dict) else {"drawing": {}}
    except (ValueError, KeyError, TypeError):
        return {"drawing": {}}
