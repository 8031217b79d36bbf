"""Draw one image for every prompt of a file.

    python sample.py --prompts test.csv                        the newest finished run, else weights/msdm-tiny
    python sample.py --prompts test.csv --model runs/NAME --out samples
    torchrun --nproc-per-node 4 sample.py --prompts test.csv   ranks share the rows

Row i becomes OUT/0000i.png. It depends on (--seed, i) alone, so a run that was stopped goes on where it was, and any
number of ranks gives the same bytes. Columns seed, guidance, negative, steps, size and file of a CSV, where there are
any, decide for their row; an empty cell leaves it to the flags.
"""

from dataclasses import dataclass

from nanomed.drawing import Drawing, draw
from nanomed.run import flags
from nanomed.run.flags import UsageError
from nanomed.run.progress import working
from nanomed.run.ranks import Ranks


@dataclass
class Config(Drawing):
    prompts: str = ""  # CSV with a column prompt, text, label or category (, or ; between columns), or a text file
    model: str = ""  # a run folder or a name under weights/; empty: the newest finished run, else weights/msdm-tiny
    lora: str = ""  # adapters to fold in: FILE_OR_FOLDER, with a weight FILE=0.8, several by comma
    weights: str = ""  # where published files are, besides weights/ and the Hugging Face cache
    runs: str = "runs"  # where runs are looked for
    device: str = ""  # cuda, cuda:1, mps or cpu; empty: the best there is


def main() -> None:
    config = flags.parse(Config, description=__doc__)
    if not config.prompts:
        raise UsageError("say which prompts: --prompts FILE.csv (an example is weights/msdm-tiny/test.csv)")
    import torch

    from nanomed import systems
    from nanomed.data.prompts import read_rows
    from nanomed.run import runs

    read_rows(config.prompts)  # what is wrong with it is said before a model is read
    ranks = Ranks.join(config.device)
    name = config.model or runs.newest(config.runs, status="done") or "weights/msdm-tiny"
    with working(f"reading {name}"):
        system = systems.load(name, config.weights or None, device=ranks.device, lora=config.lora)
    system.to(memory_format=torch.channels_last)  # convolutions are up to 1.5 times as fast
    rows = read_rows(config.prompts, system.columns)
    if ranks.first:
        print(f"{len(rows)} prompts, {len({row['prompt'] for row in rows})} of them distinct; model {name}")
    draw(system, rows, config, ranks, progress=True)


if __name__ == "__main__":
    flags.main(main)
