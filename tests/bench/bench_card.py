"""What a card says of what the arithmetic and the CPU's tests say: run it on a machine with an NVIDIA GPU.

    python tests/bench/bench_card.py miniatures        every miniature trains in bf16, is stopped and resumed, and draws
    python tests/bench/bench_card.py waits             where a training step waits for the device, between log lines
    python tests/bench/bench_card.py fits              which card trains what, as --dry_run says it: needs no GPU
    python tests/bench/bench_card.py memory [NAME ...] peak memory of real steps at full size, beside --dry_run's count

Memory is PyTorch's largest allocation; the arithmetic adds 1 GB for CUDA itself, which is taken off here.
"""

import argparse
import collections
import re
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

MINIATURES = ("msdm-tiny", "kandinsky2-tiny", "kandinsky3-tiny", "sd-tiny", "medart-tiny", "hunyuan-tiny", "dit-tiny")
FULL = {
    "sd15 LoRA": "--model sd15 --rank 8",
    "sdxl LoRA": "--model sdxl --rank 8",
    "kandinsky3 LoRA, FLAN-UL2 away": "--model kandinsky3 --rank 8 --frozen cpu",
    "kandinsky2 decoder LoRA": "--model kandinsky2 --stage decoder --rank 8",
    "msdm whole": "--model msdm --stage unet --batch 4",
    "pixart LoRA": "--model pixart --rank 8",
    "medart, T5 frozen": "--model medart --text_adapter none --frozen cpu",
    "hunyuan LoRA": "--model hunyuan --rank 8",
    "dit-s8 whole": "--model dit-s8 --batch 32",
}
FITS = (  # what trains, and the flags
    ("sd15", "LoRA of rank 4", "--rank 4"),
    ("sd15", "LoRA of rank 64", "--rank 64"),
    ("sd15", "whole U-Net", "--rank 0"),
    ("sdxl", "LoRA of rank 4", "--rank 4"),
    ("sdxl", "LoRA of rank 64", "--rank 64"),
    ("sdxl", "whole U-Net", "--rank 0"),
    ("kandinsky2", "prior, LoRA of rank 64", "--stage prior --rank 64"),
    ("kandinsky2", "decoder, LoRA of rank 64", "--stage decoder --rank 64"),
    ("kandinsky3", "LoRA of rank 4", "--rank 4"),
    ("kandinsky3", "LoRA of rank 64", "--rank 64"),
    ("pixart", "LoRA of rank 8", "--rank 8"),
    ("pixart", "whole transformer", "--rank 0"),
    ("medart", "LoRA of rank 8 on transformer and T5, HLDF", "--rank 8"),
    ("medart", "LoRA of rank 8 on the transformer, HLDF", "--rank 8 --text_adapter none"),
    ("hunyuan", "LoRA of rank 64", "--rank 64"),
    ("msdm", "whole U-Net", "--stage unet"),
    ("msdm", "whole U-Net, batch 64", "--stage unet --batch 64"),
    ("dit-s8", "whole transformer, batch 32", "--batch 32"),
)


def command(*words: str) -> tuple[int, str, float]:
    """(exit code, what it said, seconds) of one of the project's commands."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, time.monotonic() - start


def miniature(model: str, folder: Path) -> str:
    """Train one in bf16 in half of its steps, on to all of them, and draw from it; a line that says how it went."""
    common = ["train.py", "--out", str(folder), "--precision", "bf16", "--save_every", "10"]
    first = [*common, "--model", model, "--data", "toy:200", "--steps", "10", "--test_prompts", "",
             "--cache", str(folder / "cache")]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "prompts.csv").write_text("Prompt\n" + 16 * "Generate an image containing a polyp.\n", encoding="utf-8")
    draw = ["sample.py", "--prompts", str(folder / "prompts.csv"), "--out", str(folder / "drawn")]
    seconds = []
    for words in (first, [*common, "--resume", "latest", "--steps", "20"], draw):
        if words is draw:
            (run,) = folder.glob(f"*-{model}")
            words = [*draw, "--model", str(run)]
        code, said, took = command(*words)
        seconds.append(f"{took:.0f}")
        if code:
            return f"{model:18} exit code {code} of {' '.join(words)}\n{said[-1500:]}"
    images = len(list((folder / "drawn").rglob("*.png")))
    return f"{model:18} trained, resumed, drawn in {' + '.join(seconds)} s; {images} images"


def miniatures() -> None:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        for line in pool.map(lambda model: miniature(model, Path(folder) / model), MINIATURES):
            print(line, flush=True)


def waits() -> None:
    """Train a miniature whose every synchronisation warns; those of steps 11 to 19 are counted by where they happen."""
    import torch

    import train
    from nanomed.training import optimizer

    seen: collections.Counter[str] = collections.Counter()
    steps, step = [0], optimizer.Descent.step

    def counted(self, *given):
        torch.cuda.set_sync_debug_mode("warn" if 11 <= steps[0] < 19 else "default")
        steps[0] += 1
        return step(self, *given)

    def remember(message, category, filename, lineno, *_):
        if "synchroniz" in str(message):
            seen[f"{filename}:{lineno}"] += 1

    optimizer.Descent.step, warnings.showwarning = counted, remember
    warnings.simplefilter("always")
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["train.py", *"--model msdm-tiny --stage vae --data toy:200 --steps 20 --log_every 10".split(),
                    "--save_every", "20", "--out", folder, "--cache", folder + "/cache"]  # fmt: skip
        train.main()
    torch.cuda.set_sync_debug_mode("default")
    print(f"synchronisations in 8 steps between log lines: {sum(seen.values())}")
    for place, count in seen.most_common():
        print(f"  {count:4} {place}")


def memory(names: list[str]) -> None:
    print(f"{'':32} {'measured':>9} {'on shapes':>11} {'ratio':>6}   step")
    for name in names or FULL:
        code, said, _ = command("train.py", *FULL[name].split(), "--precision", "bf16", "--dry_run")
        peak = max(map(float, re.findall(r"measured, .*? +([\d.]+) GB", said)), default=0.0)
        step = re.search(r"one step +([\d.]+) s", said)
        sums = re.search(r"in all  +([\d.]+) GB", said)
        if code or not (peak and sums and step):
            print(f"{name:32} exit code {code}\n{said[-1500:]}", flush=True)
            continue
        measured, summed = peak, float(sums[1]) - 1.0
        print(f"{name:32} {measured:6.1f} GB {summed:8.1f} GB {summed / measured:6.2f}   {step[1]} s", flush=True)


def fits() -> None:
    """A table in Markdown: GB by arithmetic, and the smallest card, for the frozen parts in each place."""
    print("| system | what trains | frozen parts on the card | `--frozen cpu` | `--frozen share`, two cards |")
    print("|---|---|---|---|---|")
    for model, what, flags in FITS:
        batch = [] if "--batch" in flags else ["--batch", "1"]
        words = ["--model", model, *flags.split(), *batch, "--precision", "bf16", "--dry_run"]
        code, said, _ = command("train.py", *words)
        found = re.findall(r"in all.*? ([\d.]+) GB .*? fits a card of (\d+ GB|none)", said)
        cells = [f"{float(gb):.1f} GB: {card}" for gb, card in found] or [f"exit code {code}"]
        print(f"| `{model}` | {what} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("miniatures", "waits", "memory", "fits"))
    parser.add_argument("names", nargs="*", choices=[*FULL, []], help="of memory: which; all by default")
    args = parser.parse_args()
    {"miniatures": miniatures, "waits": waits, "fits": fits, "memory": lambda: memory(args.names)}[args.what]()


if __name__ == "__main__":
    main()
