"""Tokens a second of language models: here against transformers, the same weights, in turns.

    python tests/bench/bench_captions.py [--device cuda] [--width 1024] [--layers 8] [--prompt 1200] [--new 64]

A Llama with random weights in bfloat16 on a GPU, float32 on a CPU; prefill is one pass over the prompt, decode the
tokens behind it one by one, what both take less what prefill takes. The columns: seconds here, seconds there, how many
times as fast, largest difference. Then layers that come from the host in turn, beside all on the device; and how many
times as long as one prompt a batch of 8 takes.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import conftest  # noqa: E402, F401  # torchvision's operators, which transformers asks for
import transformers  # noqa: E402
from interleaved import compare  # noqa: E402

from nanomed.captions.generation import generate  # noqa: E402
from nanomed.captions.memory import LayersInTurn  # noqa: E402
from nanomed.captions.networks.decoder import load_decoder  # noqa: E402


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in dict(width=512, layers=6, prompt=600, new=48, repeats=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    said = parser.parse_args()
    dtype = torch.bfloat16 if said.device.startswith("cuda") else torch.float32
    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=said.width, intermediate_size=said.width * 7 // 2,
                                      num_hidden_layers=said.layers, num_attention_heads=said.width // 64,
                                      num_key_value_heads=max(said.width // 256, 1), eos_token_id=None,
                                      pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    there = transformers.LlamaForCausalLM(config).to(dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        there.save_pretrained(folder)
        here, turned = load_decoder(folder).to(said.device), load_decoder(folder)
    LayersInTurn(turned, said.device)
    there.to(said.device)
    taken = {}
    for batch in (1, 8):
        ids = torch.randint(1, 32000, (batch, said.prompt), device=said.device)
        mask = torch.ones_like(ids)

        def ours(new: int, ids=ids, mask=mask):
            return generate(here, ids, mask, new)

        def theirs(new: int, ids=ids, mask=mask):
            tokens = there.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            return tokens[:, said.prompt :]

        first = compare(f"batch {batch}: prefill", lambda: ours(1), lambda: theirs(1), said.repeats, said.device)  # noqa: B023
        name = f"batch {batch}: prefill + {said.new}"
        whole = compare(name, lambda: ours(said.new), lambda: theirs(said.new), said.repeats, said.device)  # noqa: B023
        decode = [a - b for a, b in zip(whole, first)]
        print(f"{f'batch {batch}: decode':28} {decode[0]:>8.3f}s {decode[1]:>9.3f}s {decode[1] / decode[0]:>6.3f}x   "
              f"{batch * (said.new - 1) / decode[0]:,.0f} tokens a second here")  # fmt: skip
        taken[batch] = whole[0]
    for name, network in (("layers in turn", turned), ("all on the device", here)):
        compare(f"{name}, batch 1", lambda: generate(network, ids[:1], mask[:1], said.new),  # noqa: B023
                lambda: generate(here, ids[:1], mask[:1], said.new), said.repeats, said.device)  # fmt: skip
    print(f"batch 8 takes {taken[8] / taken[1]:.2f} times as long as batch 1")


if __name__ == "__main__":
    main()
