"""Draw one image for every prompt of a file.

    python sample.py --prompts test.csv                        the newest finished run, else weights/msdm-tiny
    python sample.py --prompts test.csv --model runs/NAME --out samples
    torchrun --nproc-per-node 4 sample.py --prompts test.csv   ranks share the rows

Row i becomes OUT/0000i.png. It depends on (--seed, i) alone, so a run that was stopped goes on where it was, and any
number of ranks gives the same bytes.
"""

from dataclasses import dataclass, fields

import torch

from nanomed.run import flags
from nanomed.run.flags import UsageError
from nanomed.run.hardware import autocast
from nanomed.run.ranks import Ranks


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
    config = flags.parse(Config, description=__doc__)
    if not config.prompts:
        raise UsageError("say which prompts: --prompts FILE.csv (an example is weights/msdm-tiny/test.csv)")
    from nanomed import systems
    from nanomed.data.prompts import read_prompts
    from nanomed.drawing import Drawing, draw
    from nanomed.run import runs

    prompts = read_prompts(config.prompts)
    ranks = Ranks.join()
    autocast(config.precision, ranks.device)  # refuses an unknown one before anything is drawn
    name = config.model or runs.newest(config.runs, status="done") or "weights/msdm-tiny"
    system = systems.load(name, config.weights or None, device=ranks.device)
    system.to(memory_format=torch.channels_last)  # convolutions are up to 1.5 times as fast
    if ranks.first:
        print(f"{len(prompts)} prompts, {len(set(prompts))} of them distinct; model {name}")
    how = Drawing(**{field.name: getattr(config, field.name) for field in fields(Drawing)})
    draw(system, prompts, how, ranks, progress=True)


if __name__ == "__main__":
    flags.main(main)
