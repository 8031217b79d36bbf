"""Prompts in other words, by a language model: what the MMCP paper had GPT write (section 3), ten for each prompt.

    python -m nanomed.captions paraphrase prompt-gt.csv --model weights/Qwen/Qwen2.5-7B-Instruct --out paraphrases.csv

An answer is kept if it says the same, in about as many words, and not yet. Otherwise it is listed with its reason:

empty, same, double   nothing; the prompt's own words; those of one that is kept (case and punctuation aside)
short, long           less than half of the prompt's words, more than twice as many and three
meaning               a prompt of the organisers' grammar: what it states is not what the prompt states (reading.py)
agreement             another prompt: the frozen text encoder's embeddings of the two have too small a cosine
nearer                ... or a cosine with another prompt of the file that is larger

Every answer depends on (seed, prompt, attempt) alone. What became of a prompt is a line of OUT.jsonl (journal.py).
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nanomed import weights
from nanomed.captions.journal import Journal
from nanomed.captions.reading import facts, facts_of
from nanomed.data import grammar
from nanomed.run import files
from nanomed.text.clip import load_clip_text
from nanomed.text.t5 import load_t5
from nanomed.text.tokenizers import ClipTokenizer
from nanomed.text.unigram import T5Tokenizer

JUDGE = "openai/clip-vit-large-patch14"  # the paper's frozen text encoder
SYSTEM = "You reword requests for medical images. You answer with the new wording alone, in one sentence."
REQUEST = (
    "Say this request in other words. Keep all that it states, numbers, places, colours, sizes and names, and add "
    "nothing: {}"
)
SAMPLING = dict(temperature=0.9, top_k=0, top_p=0.95)
CHATTER = re.compile(r"^(?:sure|certainly|of course|here(?: is|'s)|okay|ok)\b[^:\n]*[:!]\s*", re.I)


@dataclass(frozen=True)
class Rules:
    """How an answer about a prompt is judged. `agree(prompt, texts)` gives for each text its cosine with the prompt and
    the largest with another prompt; None: only prompts of the grammar can be judged."""

    agree: Callable[[str, Sequence[str]], list[tuple[float, float]]] | None = None
    least: float = 0.8  # cosine

    def judge(self, prompt: str, answer: str, kept: Iterable[str]) -> tuple[str, str]:
        """(the wording, why it is refused or "")."""
        text = cleaned(answer)
        if not plain(text):
            return text, "empty"
        if plain(text) == plain(prompt):
            return text, "same"
        if plain(text) in {plain(other) for other in kept}:
            return text, "double"
        given, said = len(prompt.split()), len(text.split())
        if 2 * said < given:
            return text, "short"
        if said > 2 * given + 3:
            return text, "long"
        if in_grammar(prompt):
            colors = grammar.parse(prompt).get("colors", ())
            return text, "" if facts(text, colors) == facts_of(prompt) else "meaning"
        if self.agree is None:
            raise ValueError(f"{prompt!r} is not of the grammar, and there is no text encoder to judge by")
        own, other = self.agree(prompt, [text])[0]
        return text, f"agreement {own:.2f}" if own < self.least else "nearer" if other > own else ""


def in_grammar(prompt: str) -> bool:
    """Whether a prompt is one of the organisers' grammar."""
    try:
        grammar.parse(prompt)
    except ValueError:
        return False
    return True


def plain(text: str) -> str:
    """A text's words, in lower case, without signs."""
    return " ".join(re.findall(r"[\w<>]+", text.lower()))


def cleaned(answer: str) -> str:
    """The wording in an answer: its first paragraph with words, without chatter, a number or quotation marks."""
    lines = [" ".join(line.split()) for line in CHATTER.sub("", answer.strip()).split("\n")]
    text = next((line for line in lines if re.search(r"\w", line)), "")
    text = re.sub(r"^(?:\d+[.)]|[-*\u2022])\s+", "", text)
    return text.strip("\"'`\u201c\u201d\u2018\u2019* ")


class Writer(Protocol):
    """What `nanomed.captions.load` gives, of an Instruct model."""

    def say(self, question: str, system: str = "") -> str:
        """The whole prompt of a question, in the family's template."""
        ...

    def generate(self, images: None, texts: list[str], max_new_tokens: int, **how) -> list[str]:
        """What it writes behind each prompt."""
        ...


class Encoder:
    """A frozen text encoder as a judge of agreement: CLIP's state at the end of a text, or the mean of T5's."""

    def __init__(self, folder: str | Path, prompts: Sequence[str], device: torch.device | str = "cpu"):
        path = weights.find(folder)
        said = weights.settings(path, "a text encoder")
        self.t5 = "t5" in str(said.get("model_type", ""))
        self.network = (load_t5(path) if self.t5 else load_clip_text(path)).requires_grad_(False).to(device)
        places = (path / "tokenizer", path.parent / "tokenizer")  # of a repository, and beside its text_encoder
        inner = next((place for place in places if place.is_dir()), path)
        self.tokenizer = T5Tokenizer.from_folder(inner) if self.t5 else ClipTokenizer.from_folder(inner)
        self.device = device
        self.prompts = list(dict.fromkeys(prompts))
        self.known = torch.cat([self.embed(self.prompts[i : i + 64]) for i in range(0, len(self.prompts), 64)])

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(N, D), of length 1."""
        ids, mask = (tensor.to(self.device) for tensor in self.tokenizer(list(texts), 120 if self.t5 else 77))
        if self.t5:
            states = self.network(ids, mask) * mask[..., None]
            return torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)
        return torch.nn.functional.normalize(self.network.features(ids).pooled, dim=-1)

    def agree(self, prompt: str, texts: Sequence[str]) -> list[tuple[float, float]]:
        """For each text, its cosine with the prompt, and the largest with another (-1 where there is none)."""
        cosines = self.embed(texts) @ self.known.T
        own = self.prompts.index(prompt)
        others = cosines.clone()
        others[:, own] = -1
        return list(zip(cosines[:, own].tolist(), others.amax(1).tolist()))


@dataclass(frozen=True)
class Effort:
    """What is wanted of a prompt, and what may be spent on it."""

    count: int = 10  # wordings
    attempts: int = 40  # answers drawn at most
    batch: int = 10  # of them together
    seed: int = 0  # of all of them


def reword(model: Writer, prompt: str, rules: Rules, effort: Effort) -> dict:
    """The journal's record of a prompt: its wordings, and the refused answers with their reasons.

    Answers are judged in their order, whatever the batch, and those behind the last that is needed do not count.
    """
    known: dict = {}
    kept: list[str] = []
    refused: list[dict] = []
    asked, longest = 0, 4 * len(prompt.split()) + 40
    text = model.say(REQUEST.format(prompt), SYSTEM)
    while len(kept) < effort.count and asked < effort.attempts:
        now = range(asked + 1, 1 + min(asked + min(effort.batch, effort.count - len(kept)), effort.attempts))
        answers = model.generate(None, [text] * len(now), max_new_tokens=longest, seed=effort.seed,
                                 keys=[("paraphrase", prompt, attempt) for attempt in now], known=known,
                                 **SAMPLING)  # fmt: skip
        for attempt, answer in zip(now, answers):
            wording, why = rules.judge(prompt, answer, kept)
            kept += [] if why else [wording]
            refused += [{"attempt": attempt, "why": why, "text": wording}] if why else []
        asked += len(now)
    return {"prompt": prompt, "texts": kept, "attempts": asked, "refused": refused}


def write_csv(journal: Journal, prompts: Sequence[str]) -> None:
    """OUT: `Prompt,Paraphrase`, for train.py --paraphrases; a prompt without a wording trains under its own words."""
    found, out = journal.records(), io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["Prompt", "Paraphrase"])
    for prompt in prompts:
        if prompt in found:
            writer.writerows((prompt, text) for text in found[prompt]["texts"] or [prompt])
    files.write_text(journal.out, out.getvalue())


def statistics(records: Sequence[dict], count: int) -> str:
    """What a run has come to, in a few lines."""
    texts, asked = sum(len(r["texts"]) for r in records), sum(r["attempts"] for r in records)
    why = Counter(refusal["why"].split()[0] for r in records for refusal in r["refused"])
    said = [f"{texts:,} paraphrases of {len(records):,} prompts, of {asked:,} answers"]
    if why:
        said.append("refused              " + ", ".join(f"{name}: {n:,}" for name, n in why.most_common()))
    short = [r for r in records if len(r["texts"]) < count]
    if short:
        said.append(f"fewer than {count:<10} {len(short):,}; without any, a prompt trains under its own words")
        said += [f"                     {len(r['texts'])} of {r['prompt']!r}" for r in short[:5]]
    return "\n".join(said)
