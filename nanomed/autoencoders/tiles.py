"""Decoding what does not fit the memory: one image at a time, in tiles that overlap and are blended into each other."""

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25  # of a tile's side


def decode_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int, factor: int) -> Tensor:
    """Images (B, 3, factor h, factor w) of latents (B, C, h, w), at most tile x tile of them decoded at a time.

    In the quarter of a tile that two neighbours share, one goes over into the other linearly. It is an approximation:
    norms and attention of a decoder see a tile where they would see the image. Latents that fit one tile are decoded
    exactly.
    """
    if tile < 4:
        raise ValueError(f"tiles of {tile} x {tile} latents are too small to overlap")
    images = []
    for one in latents.split(1):
        image: Tensor | None = None
        for top, rows, down in spans(one.shape[2], tile, factor):
            for left, columns, across in spans(one.shape[3], tile, factor):
                piece = decode(one[:, :, top : top + rows, left : left + columns])
                if image is None:
                    image = piece.new_zeros(1, piece.shape[1], *(factor * side for side in one.shape[2:]))
                weight = (down[:, None] * across).to(piece)
                y, x = top * factor, left * factor
                image[:, :, y : y + piece.shape[2], x : x + piece.shape[3]] += weight * piece
        images.append(image)
    return torch.cat(images)


def spans(length: int, tile: int, factor: int) -> list[tuple[int, int, Tensor]]:
    """Start and length of the tiles along a side in latents, and each one's weights in pixels; they add up to 1."""
    shared = int(tile * OVERLAP)
    starts = [0]
    while starts[-1] + tile < length:
        starts.append(starts[-1] + tile - shared)
    found, ramp = [], torch.arange(shared * factor) / (shared * factor)
    for start in starts:
        long = min(tile, length - start)
        weight = torch.ones(long * factor)
        if start:
            weight[: len(ramp)] = ramp
        if start != starts[-1]:
            weight[-len(ramp) :] = 1 - ramp
        found.append((start, long, weight))
    return found
