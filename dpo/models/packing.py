"""Latents as the tokens of a transformer that has no patches of its own: squares of two by two, all channels in each."""

from __future__ import annotations

from torch import Tensor

SIDE = 2  # latents of a square


def packed(latents: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, h / 2 * w / 2, 4 C]: the squares row by row; in each its channels, of a channel its four."""
    rows, channels, high, wide = latents.shape
    squares = latents.view(rows, channels, high // SIDE, SIDE, wide // SIDE, SIDE)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * SIDE**2)


def unpacked(tokens: Tensor, high: int, wide: int) -> Tensor:
    """[N, S, 4 C] -> [N, C, high, wide], what `packed` made tokens of."""
    rows, _, channels = tokens.shape
    squares = tokens.view(rows, high // SIDE, wide // SIDE, channels // SIDE**2, SIDE, SIDE)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(rows, -1, high, wide)
