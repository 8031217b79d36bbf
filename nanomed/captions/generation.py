"""Tokens from logits: greedy, or drawn at a temperature from the top k and the top p.

No random number is made here: `uniform(step) -> (B,)` in [0, 1) comes from the caller, who keys it by seed, image and
attempt, so that a caption depends on nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanomed.captions.networks.decoder import Cache, Decoder
from nanomed.layers.devices import wide


@dataclass(frozen=True)
class Writing:
    """Which token comes next, at temperature 0 the likeliest, else one that is drawn; and which ends a text."""

    ends: Sequence[int] = ()  # behind its end a row goes on with the first of them
    temperature: float = 0.0
    top_k: int = 0  # of the likeliest k; 0: of all
    top_p: float = 1.0  # ... and of the fewest of them that together have this probability
    uniform: Callable[[int], Tensor] | None = None  # step -> (B,) in [0, 1), the numbers that draw

    def __post_init__(self) -> None:
        if self.temperature > 0 and self.uniform is None:
            raise ValueError("sampling needs `uniform`, which gives the random numbers")

    def next(self, logits: Tensor, step: int) -> Tensor:
        """The tokens (B,) of a step, of logits (B, V)."""
        if self.temperature > 0:
            return draw(filtered(logits, self.temperature, self.top_k, self.top_p), self.uniform(step))
        return logits.argmax(-1)


def filtered(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B, V) over the temperature; -inf outside the k largest, then outside the fewest that together have
    probability `top_p` (Holtzman et al. 2020), in this order. 0 and 1 switch the two off."""
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort()
        out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        out[:, -1] = False  # the likeliest stays
        logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token (B,) at which the summed probabilities, in the order of the vocabulary, pass `uniform` (B,)."""
    sums = logits.to(wide(logits.device), torch.float64).softmax(-1).cumsum(-1)
    target = uniform.to(sums)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1).to(logits.device)


class Prompts:
    """Prompts that a model has read: any number of texts go on from them, and they are read once.

    prompt, mask   ids (N, L) or embeddings (N, L, D), and bool (N, L), padded on the left
    steps          tokens that are expected behind them
    """

    def __init__(self, model: Decoder, prompt: Tensor, mask: Tensor, steps: int):
        self.model, self.length, self.cache = model, prompt.shape[1], Cache(prompt.shape[1] + steps)
        self.mask = None if mask.bool().all() else mask.bool()
        self.logits = model(prompt, self.mask, cache=self.cache, last=True)[:, -1]  # (N, V)

    def choose(self, rows: Sequence[int]) -> None:
        """Keep these, in this order; one that is named several times stands there as often."""
        if list(rows) != list(range(len(self.logits))):
            chosen = torch.tensor(list(rows), device=self.logits.device)
            self.logits, self.mask = self.logits[chosen], None if self.mask is None else self.mask[chosen]
            self.cache.reorder(chosen)

    def write(self, steps: int, how: Writing = Writing()) -> Tensor:
        """New tokens int64 (N, up to `steps`) behind each. What was written before is written over."""
        self.cache.length, logits, mask, tokens = self.length, self.logits, self.mask, []
        stops = torch.tensor(list(how.ends), dtype=torch.long, device=logits.device)
        done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        while len(tokens) < steps and not (how.ends and done.all()):  # the second waits for the device
            if tokens:
                mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                logits = self.model(tokens[-1][:, None], mask, cache=self.cache, last=True)[:, -1]  # (N, V)
            token = how.next(logits, len(tokens))
            if how.ends:
                token = token.masked_fill(done, how.ends[0])
                done = done | torch.isin(token, stops)
            tokens.append(token)
        return torch.stack(tokens, dim=1) if tokens else stops.new_zeros(len(logits), 0)


def generate(model: Decoder, prompt: Tensor, mask: Tensor, steps: int, how: Writing = Writing()) -> Tensor:
    """New tokens int64 (B, up to `steps`), one text behind each of the prompts of `Prompts`."""
    return Prompts(model, prompt, mask, steps).write(steps, how)
