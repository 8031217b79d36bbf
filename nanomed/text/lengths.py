"""Prompts that are longer than what a text encoder reads of one: which they are, and what is lost of them."""

import bisect
from collections.abc import Callable, Iterable, Mapping

from nanomed.run.flags import UsageError


def too_long(
    prompts: Iterable[str], limit: int, lengths: Callable[[list[str]], list[int]]
) -> dict[str, tuple[int, str]]:
    """Those of some prompts that have more than `limit` tokens: {prompt: (its tokens, the words behind the last one
    that is read whole)}. `lengths` counts the tokens of prompts, special ones included."""
    distinct, found = list(dict.fromkeys(prompts)), {}
    for prompt, length in zip(distinct, lengths(distinct) if distinct else []):
        if length > limit:
            words = prompt.split()
            counts = range(1, len(words) + 1)
            fits = bisect.bisect_right(counts, limit, key=lambda n: lengths([" ".join(words[:n])])[0])
            found[prompt] = length, " ".join(words[fits:])
    return found


def judge(
    long: dict[str, tuple[int, str]], told: Mapping[str, str], how: str, source: str, limit: int
) -> tuple[list[str], dict[str, int]]:
    """What `too_long` has found, as `how` has it treated: "cut", "refuse" or "chunk".

    told     {prompt: where it stands first}, of all prompts
    source   the file or data set that they are from

    Returns lines that say it, and in how many pieces each of these prompts is read. Raises UsageError for "refuse".
    """
    first = [f"{told[prompt]}: {length} tokens, {len(rest.split())} words {'over' if how == 'chunk' else 'cut'}: "
             f"{rest[:80]!r}{' ...' if len(rest) > 80 else ''}"
             for prompt, (length, rest) in long.items()]  # fmt: skip
    said = f"{source}: {len(long)} of {len(told)} distinct prompts have more than the {limit} tokens that are read"
    if how == "refuse":
        raise UsageError(f"{said} (--long_prompts refuse). {first[0]}")
    more = [f"... and {len(first) - 5} more"] if len(first) > 5 else []
    pieces = {prompt: -(-(length - 2) // (limit - 2)) for prompt, (length, _) in long.items()} if how == "chunk" else {}
    instead = f"read in up to {max(pieces.values())} pieces of {limit - 2}" if pieces else \
        "the rest is cut (--long_prompts refuse, chunk)"  # fmt: skip
    return [f"{said}: {instead}", *(f"  {line}" for line in [*first[:5], *more])], pieces
