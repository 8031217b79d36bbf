"""Does a toy model draw what it is told? Fresh prompts about box, polyps, places and instruments, over several seeds.

python tests/bench/bench_faithfulness.py --model weights/msdm-tiny --prompts 500 --seeds 1
python tests/bench/bench_faithfulness.py --write weights/msdm-tiny/test.csv --prompts 200
"""

import argparse
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import nanomed
from nanomed.data import grammar, toy
from nanomed.run import cache, files
from nanomed.run.randomness import ImageNoise

KINDS = {"box": "box", "polyp": "polyp", "abnormality_at": "positions", "instrument": "instrument"}
FIRST = 30_000_000  # scenes that neither training nor evaluation uses


def prompts(count: int) -> list[str]:
    """`count` prompts in equal parts of the four kinds, with the frequencies that scenes give each kind."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    number = FIRST
    while min(map(len, found.values())) < count:
        for prompt in toy.prompts(toy.scene(number)):
            kind = next((kind for kind in KINDS if kind in grammar.parse(prompt)), None)
            if kind:
                found[kind].append(prompt)
        number += 1
    rng = random.Random(count)
    chosen = [prompt for kind in KINDS for prompt in rng.sample(found[kind], -(-count // len(KINDS)))][:count]
    rng.shuffle(chosen)
    return chosen


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="weights/msdm-tiny")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--write", help="write the prompts to this CSV and stop")
    config = parser.parse_args()
    texts = prompts(config.prompts)
    if config.write:
        files.write_text(config.write, "prompt\n" + "".join(f'"{text}"\n' for text in texts))
        return
    system = nanomed.load(config.model)
    system.encode_text = cache.Remembered(system.encode_text)
    totals = {kind: [0, 0] for kind in KINDS}
    for seed in range(config.seeds):
        for start in range(0, len(texts), 50):
            batch = texts[start : start + 50]
            noise = ImageNoise(seed, range(start, start + len(batch)))
            drawn = files.to_bytes(system.sample(batch, noise, config.steps, config.guidance)).numpy()
            for image, text in zip(drawn, batch):
                said, seen = grammar.parse(text), toy.read(image)
                for kind, key in KINDS.items():
                    if kind in said:
                        totals[kind][0] += said[kind] == seen[key]
                        totals[kind][1] += 1
    for kind, (right, count) in totals.items():
        print(f"{kind:16} {right / count:7.1%}  of {count}")


if __name__ == "__main__":
    main()
