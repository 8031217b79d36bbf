"""A folder to something that writes: the network that its `config.json` names, its tokenizer, its special tokens.

    model = load("weights/lmms-lab/llama3-llava-next-8b", dtype=torch.bfloat16, device="cuda")
    model.generate([image], [chat.llava_llama3("What is seen?")], max_new_tokens=150)   # a list of strings

LLaVA-NeXT and Ovis (networks/llava.py, ovis.py) and plain Llama 3, Mistral, Qwen 2 and 2.5, and Gemma 2
(networks/decoder.py). The text is the whole prompt as the model reads it, with `<image>` in the image's place; chat.py
makes such prompts.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from nanomed import weights
from nanomed.captions import chat
from nanomed.captions.generation import Prompts, Writing
from nanomed.captions.memory import LayersInTurn, Shares, to_int8, writer_of
from nanomed.captions.networks import decoder, llava, ovis
from nanomed.captions.networks.decoder import Decoder
from nanomed.captions.networks.llava import LlavaNext
from nanomed.captions.networks.ovis import Ovis
from nanomed.run.randomness import seed_of
from nanomed.run.ranks import ALONE, Ranks
from nanomed.weights import WeightsError

IMAGE = "<image>"
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")  # Llama 3, Qwen, Gemma: some configurations forget theirs


class Model:
    """A network with its tokenizer; a network with a `writer` has eyes: it `see`s images, and its writer reads them."""

    def __init__(self, network: nn.Module, tokenizer: Tokenizer, ends: Sequence[int], prompt: str = "",
                 shares: Shares | None = None):  # fmt: skip
        self.network, self.tokenizer, self.ends, self.shares = network, tokenizer, tuple(ends), shares
        self.prompt = prompt  # the only one that it knows, where it was trained on one
        self.writer: Decoder = writer_of(network)

    @property
    def device(self) -> torch.device:
        """Where tokens come in: of the layers, others may be elsewhere (memory.py)."""
        return next(self.network.parameters()).device

    def ask(self, question: str) -> str:
        """The prompt that asks a question about an image, in the conversation that this model was trained on."""
        if self.prompt:
            return self.prompt
        if self.network is self.writer:
            raise WeightsError("this model reads text alone, so it cannot be asked about an image")
        family = self.writer.config.model_type
        if isinstance(self.network, Ovis):
            return chat.ovis_gemma2(question) if family == "gemma2" else chat.ovis_qwen2(question)
        if family == "mistral":
            return chat.llava_mistral(question)
        own = self.network.config.image_token is None
        return chat.llava_llama3(question) if own else chat.llava_llama3_hf(question)

    def say(self, question: str, system: str = "") -> str:
        """The prompt that asks something in words, in the conversation of this family's Instruct models. Where no
        system is given, it is the one that the family's template has for that, if any."""
        family, tokenizer = self.writer.config.model_type, self.tokenizer
        asked = chat.template(family, lambda mark: tokenizer.token_to_id(mark) is not None)
        return asked([question], system) if system else asked([question])

    def finish(self) -> None:
        """To be called when there is nothing left to write: where processes share the layers, the others may need
        this one's."""
        if self.shares is not None:
            self.shares.finish()

    def logits(self, image: Image.Image | None, text: str) -> Tensor:
        """What follows each place of the prompt, (1, L, vocabulary); the image stands in many places."""
        embedded, mask = self.read([image], [text])
        return self.writer(embedded, mask)

    def generate(
        self, images: Sequence[Image.Image | None] | None, texts: Sequence[str], max_new_tokens: int = 150,
        seed: int = 0, keys: Sequence | None = None, known: dict | None = None, **how: float,
    ) -> list[str]:  # fmt: skip
        """What the model writes after each prompt, without special tokens.

        keys    a tuple of words and numbers for each text (its image, its attempt; default: its row). With `seed` it
                makes the text's random numbers, so the others of the batch change nothing
        known   a dict of the caller's, empty at first: where the next call is about the same prompts (the same image
                objects), or some of them, they are not read again. It holds their keys and values
        how     temperature, top_k and top_p as in `generation.Writing`: by default the likeliest token is taken

        A prompt that stands there several times, with the same image object, is read once.
        """
        images = list(images or [None] * len(texts))
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images for {len(texts)} texts")
        if not texts:
            return []
        known = {} if known is None else known
        asked = [(id(image), text) for image, text in zip(images, texts)]
        if not set(asked) <= set(known.get("asked", ())):
            known.clear()  # before there is more
            first = [asked.index(one) for one in dict.fromkeys(asked)]
            embedded, mask = self.read([images[i] for i in first], [texts[i] for i in first])
            known["prompts"] = Prompts(self.writer, embedded, mask, max_new_tokens)
            known["asked"] = [asked[i] for i in first]
        known["prompts"].choose([known["asked"].index(one) for one in asked])
        known["asked"], known["images"] = asked, images  # an image that is kept shares its id with no other
        keys = keys if keys is not None else [(i,) for i in range(len(texts))]
        draws = [torch.Generator().manual_seed(seed_of("caption", seed, *key)) for key in keys]

        def uniform(step: int) -> Tensor:
            return torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in draws])

        new = known["prompts"].write(max_new_tokens, Writing(self.ends, **how, uniform=uniform))
        return [self.tokenizer.decode(self._until_end(row)) for row in new.tolist()]

    def read(self, images: Sequence[Image.Image | None], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts with their images -> embeddings (B, L, D) and mask bool (B, L), padded on the left."""
        given = [image.convert("RGB") for image in images if image is not None]
        seen = iter(())
        if given:
            if self.network is self.writer:
                raise ValueError("this model reads text alone, and was given an image")
            seen = iter(self.network.see(given))
        rows = []
        for image, text in zip(images, texts):
            parts = self.pieces(text)
            if len(parts) - 1 != (image is not None):
                raise ValueError(f"a prompt with {len(parts) - 1} {IMAGE} for {int(image is not None)} image: {text!r}")
            embedded = [self.writer.embed(torch.tensor(ids, dtype=torch.long, device=self.device)) for ids in parts]
            rows.append(torch.cat([embedded[0], next(seen), embedded[1]]) if image is not None else embedded[0])
        length = max(len(row) for row in rows)
        mask = torch.tensor([[place >= length - len(row) for place in range(length)] for row in rows])
        padded = [torch.cat([row.new_zeros(length - len(row), row.shape[1]), row]) for row in rows]
        return torch.stack(padded), mask.to(self.device)

    def pieces(self, text: str) -> list[list[int]]:
        """The tokens before `<image>` and those behind it; of a text without, all of them.

        Where `<image>` is a token, the text is tokenized whole (`-hf`). Else its parts are, one by one, and the mark at
        the beginning that a tokenizer puts before each of them is kept once (LLaVA's own code), or never (Ovis). A
        prompt that says that mark itself has it twice with LLaVA's own code, as there.
        """
        if isinstance(self.network, Ovis):
            return [self.tokenizer.encode(part, add_special_tokens=False).ids for part in text.split(IMAGE)]
        token = self.network.config.image_token if isinstance(self.network, LlavaNext) else None
        if token is not None:
            ids = self.tokenizer.encode(text).ids
            at = [i for i, found in enumerate(ids) if found == token]
            return [ids[a + 1 : b] for a, b in zip([-1, *at], [*at, len(ids)])]
        parts = text.split(IMAGE) if isinstance(self.network, LlavaNext) else [text]
        first, *others = [self.tokenizer.encode(part).ids for part in parts]
        added = self.tokenizer.encode("").ids[:1]  # the mark, where this tokenizer has one
        return [first, *(ids[len(added) :] for ids in others)]

    def count(self, text: str) -> int:
        """Tokens of a text, without those that stand around it."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in self.ends), len(ids))]


def load(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", int8: bool = False,
    place: str = "device", ranks: Ranks = ALONE,
) -> Model:  # fmt: skip
    """The model of a folder, or of a repository that `weights.find` finds: its family is told by `config.json`.

    dtype   convert to it while reading; None keeps the file's
    int8    keep the language model's products in whole numbers, row by row: 8 billion weights in 10 GB
    place   of the language model's layers: "device"; "cpu": they come to the device one by one; "share": each of
            `ranks` holds a share, and all must call the model's `finish` when they have nothing left to write

    `memory.compiled(model.writer)` lets torch.compile fuse what it can. Its parameters do not train. Raises
    WeightsError.
    """
    if int8 and place == "share":
        raise ValueError("shares are of weights as they are, not of whole numbers: int8 or place share, not both")
    path = weights.find(path)
    said = weights.settings(path, "a language model")
    network = family(said)[1](path, dtype)
    if int8:
        to_int8(writer_of(network))
    network.requires_grad_(False)
    shares = None
    if place == "cpu":
        LayersInTurn(network, device)
    elif place == "share" and ranks.world > 1:
        shares = Shares(network, ranks)
    else:
        network.to(device)
    tokenizer = read_tokenizer(path)
    return Model(network, tokenizer, ends_of(path, said, tokenizer), said.get("prompt", ""), shares)


def family(said: dict) -> tuple[Callable, Callable]:
    """What makes the network that a `config.json` describes, on the meta device, and what reads it."""
    kind = str(said.get("model_type", ""))
    if kind.startswith("llava"):
        return llava.sketch, llava.load_llava
    return (ovis.sketch, ovis.load_ovis) if kind.startswith("ovis") else (decoder.sketch, decoder.load_decoder)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder's `tokenizer.json`. Raises WeightsError."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise WeightsError(f"{file} is missing: a language model needs it")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # of tokenizers, which knows no other
        raise WeightsError(f"{file}: not a tokenizer ({str(error).partition(chr(10))[0]})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def ends_of(path: Path, said: dict, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text: those of `generation_config.json`, else of `config.json`, and the mark that ends a
    turn where the tokenizer has one."""
    stated = None
    if (path / "generation_config.json").is_file():
        stated = weights.settings(path / "generation_config.json", "how a model writes").get("eos_token_id")
    if stated is None:
        parts = (said, said.get("text_config") or {}, said.get("llm_config") or {})
        stated = next((part["eos_token_id"] for part in parts if part.get("eos_token_id") is not None), None)
    ends = stated if isinstance(stated, list) else [stated]
    ends = [*ends, *(tokenizer.token_to_id(word) for word in TURN_ENDS)]
    return list(dict.fromkeys(int(token) for token in ends if token is not None))
