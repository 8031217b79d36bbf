"""Tokens a second of language models: here against transformers, the same weights, in turns.

    python tests/bench/bench_captions.py [--device cuda] [--width 1024] [--layers 8] [--prompt 1200] [--new 64]

A Llama with random weights in bfloat16 on a GPU, float32 on a CPU; prefill is one pass over the prompt, decode the
tokens behind it one by one, what both take less what prefill takes. The columns: seconds here, seconds there, how many
times as fast, largest difference. Then an image with a question, read by a LLaVA-NeXT with that Llama; four answers to
one prompt; layers that come from the host in turn, beside all on the device; and how many times as long as one prompt a
batch of 8 takes.

In prefill transformers computes all of the last layer, here that makes keys and values alone but for the last place: of
few layers that is much, so the last line says what it is of 32, by arithmetic.
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
from test_llava import picture, save_tokenizer  # noqa: E402

import nanomed.captions  # noqa: E402
from nanomed import weights  # noqa: E402
from nanomed.captions.generation import Prompts, generate  # noqa: E402
from nanomed.captions.memory import LayersInTurn  # noqa: E402
from nanomed.captions.networks.decoder import Decoder, DecoderConfig, load_decoder  # noqa: E402


def read_image(said: argparse.Namespace, text: transformers.LlamaConfig, dtype: torch.dtype) -> None:
    """Prefill of an image in five tiles, tower and all, with the words around it; preprocessing is ours alone."""
    tower = dict(hidden_size=said.width // 2, intermediate_size=2 * said.width, num_hidden_layers=said.layers,
                 num_attention_heads=said.width // 128, image_size=112, patch_size=14)  # fmt: skip
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**tower), text_config=text, image_token_index=258,
        image_grid_pinpoints=[[224, 224]])  # fmt: skip
    there = transformers.LlavaNextForConditionalGeneration(config).to(dtype).eval()
    with tempfile.TemporaryDirectory() as folder:
        there.save_pretrained(folder)
        save_tokenizer(Path(folder), image=True)
        here = nanomed.captions.load(folder, device=said.device)
    there.to(said.device)
    image, question = picture((240, 200)), "What is seen? <image>" + 20 * "Say it well. "
    pixels, (before, after) = here.network.tiles.cut(image)[None].to(said.device, dtype), here.pieces(question)
    ids = [*before, *[258] * here.network.tiles.tokens(image.size), *after]
    given = dict(input_ids=torch.tensor([ids], device=said.device), pixel_values=pixels,
                 image_sizes=torch.tensor([[200, 240]], device=said.device))  # fmt: skip

    def theirs():
        tokens = there.generate(**given, attention_mask=torch.ones_like(given["input_ids"]), max_new_tokens=1,
                                do_sample=False)  # fmt: skip
        return tokens[:, len(ids) :]

    compare(f"image, {len(ids)} tokens: prefill", lambda: generate(here.writer, *here.read([image], [question]), 1),
            theirs, said.repeats, said.device)  # fmt: skip


def share_of_last(network, prompt: int) -> float:
    """What the last layer saves of a prefill, by the multiplications of products and attention: once all layers of a
    network, and what is computed here."""
    c = network.config
    layer = sum(p.numel() for p in network.model.layers[0].parameters())
    kept = 2 * c.num_key_value_heads * c.head_dim * c.hidden_size
    mixing = prompt * c.num_attention_heads * c.head_dim  # of a place: scores and values, half of them masked
    return c.num_hidden_layers * (layer + mixing) / ((c.num_hidden_layers - 1) * (layer + mixing) + kept)


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
    read_image(said, config, dtype)

    def four() -> torch.Tensor:
        prompts = Prompts(here, ids[:1], mask[:1], said.new)  # noqa: B023
        prompts.choose([0] * 4)
        return prompts.write(said.new)

    compare("one prompt for four answers", four,
            lambda: generate(here, ids[:1].expand(4, -1), mask[:4], said.new), said.repeats, said.device)  # noqa: B023  # fmt: skip
    for name, network in (("layers in turn", turned), ("all on the device", here)):
        compare(f"{name}, batch 1", lambda: generate(network, ids[:1], mask[:1], said.new),  # noqa: B023
                lambda: generate(here, ids[:1], mask[:1], said.new), said.repeats, said.device)  # fmt: skip
    print(f"batch 8 takes {taken[8] / taken[1]:.2f} times as long as batch 1")
    full = weights.build(Decoder, DecoderConfig())
    print(f"the last layer alone: {share_of_last(here, said.prompt):.3f}x of these {said.layers} layers, "
          f"{share_of_last(full, 3000):.3f}x of the 32 of Llama 3 8B at 3,000 tokens")  # fmt: skip


if __name__ == "__main__":
    main()
