"""T5's tokenizer against transformers' on the same prompts, in turns.

    python tests/bench/bench_tokenizer.py FOLDER       a folder with T5's spiece.model
"""

import sys
from pathlib import Path

import torch
import transformers

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from interleaved import compare  # noqa: E402

from nanomed.text.unigram import T5Tokenizer  # noqa: E402

PROMPTS = [f"An endoscopic image of a polyp in the left part, shiny and wet, number {i}." for i in range(2000)]


def main() -> None:
    ours, theirs = T5Tokenizer.from_folder(sys.argv[1]), transformers.T5Tokenizer.from_pretrained(sys.argv[1])
    print(f"{'':28} {'here':>9} {'there':>10} {'ratio':>7}   largest difference of ids")

    def there() -> torch.Tensor:
        return theirs(PROMPTS, padding="max_length", max_length=120, truncation=True, return_tensors="pt").input_ids

    compare("2,000 prompts", lambda: ours(PROMPTS, 120)[0], there, 5, "cpu")


if __name__ == "__main__":
    main()
