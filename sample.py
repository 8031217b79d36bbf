"""Draw one image for every prompt of a file.

    python sample.py --prompts test.csv                        the newest finished run, else weights/msdm-tiny
    python sample.py --prompts test.csv --model runs/NAME --out samples
    torchrun --nproc-per-node 4 sample.py --prompts test.csv   ranks share the rows

Row i becomes OUT/0000i.png. It depends on (--seed, i) alone, so a run that was stopped goes on where it was, and any
number of ranks gives the same bytes.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from nanomed import files, runtime


@dataclass
class Config:
    prompts: str = ""  # CSV with a column prompt, Prompt or text (, or ; between columns), or a text file
    model: str = ""  # a run folder or a name under weights/; empty: the newest finished run, else weights/msdm-tiny
    out: str = "samples"  # folder for the images and manifest.jsonl
    steps: int | None = None  # solver steps; empty: the model's own
    guidance: float | None = None  # guidance scale, 1 = none; empty: the model's own
    negative: str = ""  # what to guide away from, in place of the empty prompt
    batch: int = 16  # images at a time; other batch sizes change pixels by 1/255 at most
    seed: int = 0  # of all the images together
    size: int | None = None  # side in pixels; empty: the model's own
    minmax: bool = False  # stretch every image to its own range, as MSDM's released code does
    precision: str = "fp32"  # fp32, bf16 or fp16
    weights: str = ""  # where published files are, besides weights/ and the Hugging Face cache
    runs: str = "runs"  # where runs are looked for
    zip: bool = False  # also write OUT.zip


def main() -> None:
    config = runtime.parse(Config, description=__doc__)
    if not config.prompts:
        raise runtime.UsageError("say which prompts: --prompts FILE.csv (an example is weights/msdm-tiny/test.csv)")
    from nanomed import runs, systems
    from nanomed.data.prompts import read_prompts

    prompts = read_prompts(config.prompts)
    rank, world, device = runtime.init()
    runtime.autocast(config.precision, device)  # refuses an unknown one before anything is drawn
    name = config.model or runs.newest(config.runs, status="done") or "weights/msdm-tiny"
    system = systems.load(name, config.weights or None, device=device)
    system.to(memory_format=torch.channels_last)  # convolutions are up to 1.5 times as fast
    if rank == 0:
        print(f"{len(prompts)} prompts, {len(set(prompts))} of them distinct; model {name}")
    draw(system, prompts, config, rank, world, device, progress=True)


@torch.inference_mode()
def draw(system, prompts: list[str], config: Config, rank: int, world: int, device, progress: bool = False) -> None:
    """Write OUT/{row}.png for every prompt, and manifest.jsonl when all are there.

    Rows are cut into fixed batches; a rank draws whole batches, and a batch of which one image is missing is drawn
    again as it was. So what surrounds an image in its batch never changes either.
    """
    from tqdm import tqdm

    from nanomed.cache import Remembered

    system.eval()
    if config.minmax:
        system.minmax = True
    out, settings = Path(config.out), _settings(system, prompts, config)
    _claim(out, settings, rank)
    names = [f"{row:05d}.png" for row in range(len(prompts))]
    batches = [range(start, min(start + config.batch, len(prompts))) for start in range(0, len(prompts), config.batch)]
    todo = [rows for rows in batches if not all(_whole(out / names[row]) for row in rows)]

    system.encode_text = Remembered(system.encode_text)  # every distinct prompt once
    mine = todo[rank::world]
    for rows in tqdm(mine, unit="batch", disable=not progress or rank > 0):
        padded = [*rows, *[rows[-1]] * (config.batch - len(rows))]  # a short batch is computed at full size
        noise = runtime.ImageNoise(config.seed, padded, device)
        texts = [prompts[row] for row in padded]
        with runtime.autocast(config.precision, device):
            images = system.sample(
                texts, noise, config.steps, config.guidance,
                negative_prompts=[config.negative] * len(texts) if config.negative else None,
                height=config.size, width=config.size,
            )  # fmt: skip
        for row, image in zip(rows, images):
            if not _whole(out / names[row]):
                files.write_png(out / names[row], files.to_bytes(image))
    runtime.barrier()
    if rank == 0:
        lines = [
            {"file": name, "prompt": prompt, "row": row, "sha256": files.sha256(out / name)} | settings["drawing"]
            for row, (name, prompt) in enumerate(zip(names, prompts))
        ]
        files.write_text(out / "manifest.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if config.zip:
            write_zip(out.with_suffix(".zip"), [out / name for name in names])


def write_zip(path: Path, images: list[Path]) -> None:
    """A zip of the images with fixed dates, so that the same images give the same bytes."""
    with files.atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for image in sorted(images):
            archive.writestr(zipfile.ZipInfo(image.name), image.read_bytes())


def _settings(system, prompts: list[str], config: Config) -> dict:
    """What decides the pixels: the drawing's settings (they go into the manifest) and the prompts."""
    import hashlib

    from nanomed import weights

    drawing = {
        "seed": config.seed,
        "steps": config.steps or system.steps,
        "guidance": system.guidance if config.guidance is None else config.guidance,
        "negative": config.negative,
        "size": config.size or system.size,
        "minmax": config.minmax,
        "precision": config.precision,
        "model": weights.fingerprint(system),
    }
    texts = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return {"drawing": drawing, "batch": config.batch, "rows": len(prompts), "prompts": texts}


def _claim(out: Path, settings: dict, rank: int) -> None:
    """Make OUT this drawing's, or check that it is."""
    mark = out / "settings.json"
    if rank == 0:
        if mark.is_file():
            before = json.loads(mark.read_text(encoding="utf-8"))
            if before != settings:
                different = [
                    key for key in settings["drawing"] if before["drawing"].get(key) != settings["drawing"][key]
                ]
                different += [key for key in ("batch", "rows", "prompts") if before.get(key) != settings[key]]
                raise runtime.UsageError(
                    f"{out} holds images drawn with other settings ({', '.join(different)}); "
                    f"choose another --out or remove it"
                )
        elif out.is_dir() and any(out.glob("*.png")):
            raise runtime.UsageError(f"{out} holds images that sample.py did not draw; choose another --out")
        files.write_json(mark, settings)
        files.sweep(out)
    runtime.barrier()


def _whole(path: Path) -> bool:
    """Whether a PNG is there and complete (its checksums hold)."""
    from PIL import Image

    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
        return True
    except (OSError, SyntaxError, ValueError):
        return False


if __name__ == "__main__":
    runtime.main(main)
