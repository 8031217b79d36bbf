"""Tokens from logits: greedy, or drawn at a temperature from the top k and the top p.

No random number is made here: `uniform(step) -> (B,)` in [0, 1) comes from the caller, who keys it by seed, image and
attempt, so that a caption depends on nothing else.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanomed.captions.networks.decoder import Cache, Decoder


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
    place = "cpu" if logits.device.type == "mps" else logits.device  # MPS has no float64
    sums = logits.to(place, torch.float64).softmax(-1).cumsum(-1)
    target = uniform.to(sums)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1).to(logits.device)


def generate(
    model: Decoder,
    prompt: Tensor,
    mask: Tensor,
    steps: int,
    ends: Sequence[int] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    uniform: Callable[[int], Tensor] | None = None,
    padding: int = 0,
) -> Tensor:
    """New tokens int64 (B, up to `steps`) after prompts: ids (B, L) or embeddings (B, L, D), padded on the left.

    A row that has met one of `ends` goes on with `padding`. Temperature 0 takes the likeliest token; otherwise
    `uniform(step)` gives the numbers that draw it.
    """
    if temperature > 0 and uniform is None:
        raise ValueError("sampling needs `uniform`, which gives the random numbers")
    cache, tokens = Cache(prompt.shape[1] + steps), []
    stops = torch.tensor(list(ends), dtype=torch.long, device=prompt.device)
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    read, mask = prompt, None if mask.bool().all() else mask.bool()
    for step in range(steps):
        logits = model(read, mask, cache=cache, last=True)[:, -1]  # (B, V)
        if temperature > 0:
            token = draw(filtered(logits, temperature, top_k, top_p), uniform(step))
        else:
            token = logits.argmax(-1)
        token = token.masked_fill(done, padding)
        tokens.append(token)
        if len(stops):
            done = done | torch.isin(token, stops)
            if done.all():  # waits for the device
                break
        read = token[:, None]
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(tokens, dim=1) if tokens else prompt.new_zeros(len(prompt), 0, dtype=torch.long)
