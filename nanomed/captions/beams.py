"""Beam search as transformers' `generate` has it, batched: of the sequences kept, the `beams` likeliest go on.

At every step twice as many continuations as beams are looked at, so that `beams` are left to go on even where all of
the best have ended. One that ends among the best `beams` competes with those that ended before by
log probability / (its length without the start token) ^ length_penalty.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = -1e9  # "no score", in float32 as in transformers


@dataclass(frozen=True)
class Search:
    """How beams are searched, in the names of transformers' `generate`."""

    beams: int = 4
    min_length: int = 0  # tokens, the start token included, as in the next
    max_length: int = 20
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # when a text is done. True: as soon as `beams` sequences of it have ended;
    # False: when none that goes on can become better at its present length; "never": ... at the one best for it


def beam_search(
    step: Callable[[Tensor, Tensor | None], Tensor], start: Tensor, end: int, how: Search = Search()
) -> tuple[Tensor, Tensor]:
    """The best sequence of every text, ids (N, L) that begin with `start` (N), and its score (N). Behind the end there
    are more of it: transformers means to pad, and takes T5's padding, which is 0, for none.

    step   (last tokens (N * beams, 1), the rows (N * beams) that they continue, None at first) -> logits
    end    the token that ends a sequence
    """
    n, device, beams, max_length = len(start), start.device, how.beams, how.max_length
    first = torch.arange(n, device=device)[:, None] * beams  # a text's first row
    going = torch.full((n, beams, max_length), end, device=device)  # sequences that go on
    going[:, :, 0] = start[:, None]
    scores = torch.full((n, beams), LOWEST, device=device)
    scores[:, 0] = 0  # all beams are the same at first: one counts
    ended, ended_scores = going.clone(), torch.full((n, beams), LOWEST, device=device)
    has_ended = torch.zeros(n, beams, dtype=torch.bool, device=device)
    hope = torch.ones(n, 1, dtype=torch.bool, device=device)  # can one that goes on still be the best?
    rows, length = None, 1

    while length < max_length:
        logits = step(going[:, :, length - 1].reshape(-1, 1), rows)
        logs = logits.float().log_softmax(-1)  # (N * beams, V)
        if length < how.min_length:
            logs[:, end] = -torch.inf
        vocabulary = logs.shape[-1]
        logs = (logs.unflatten(0, (n, beams)) + scores[..., None]).flatten(1)  # (N, beams * V)
        best, where = logs.topk(2 * beams)  # the likeliest first
        from_beam, token = where // vocabulary, where % vocabulary
        longer = going.gather(1, from_beam[..., None].expand(-1, -1, max_length))
        longer[:, :, length] = token
        stops = (token == end) | (length + 1 >= max_length)

        scores, chosen = (best + stops * LOWEST).topk(beams)
        going = longer.gather(1, chosen[..., None].expand(-1, -1, max_length))
        rows = (first + from_beam.gather(1, chosen)).flatten()

        new_end = stops.clone()
        new_end[:, beams:] = False  # only the best `beams` count as ended
        full = has_ended.all(1, keepdim=True) & (how.early_stopping is True)
        value = best / length**how.length_penalty  # `length` tokens behind the start
        value = value + full * LOWEST + ~hope * LOWEST + ~new_end * LOWEST
        ended_scores, chosen = torch.cat([ended_scores, value], 1).topk(beams)
        ended = torch.cat([ended, longer], 1).gather(1, chosen[..., None].expand(-1, -1, max_length))
        has_ended = torch.cat([has_ended, new_end], 1).gather(1, chosen)

        length += 1
        at = max_length - 1 if how.early_stopping == "never" and how.length_penalty > 0 else length - 1
        worst = torch.where(has_ended, ended_scores.amin(1, keepdim=True), LOWEST)
        hope = hope & (scores[:, :1] / at**how.length_penalty > worst).any(1, keepdim=True)
        if not hope.any() or (how.early_stopping is True and has_ended.all()) or stops.all():
            break
    found, value = ended[:, 0], ended_scores[:, 0]
    # what was written before a text ended stands in its sequence only; the longest decides how many columns there are
    used = (found == end).long().argmax(1) + 1
    used = used.where((found == end).any(1), torch.tensor(length, device=device))
    return found[:, : int(used.max())], value
