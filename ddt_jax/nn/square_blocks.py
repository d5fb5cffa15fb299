"""Tokens of an image or a clip in the order of its blocks, each in one piece (ACDiT, arXiv 2412.07720 appendix B).

A block is a square of an image or of one frame of a clip, or it is some whole frames. Blocks follow each other frame by
frame and in raster order, and so do the tokens inside a block. Pure NumPy: the order is known before a
number exists.

Legend: L tokens.
"""

import math

import numpy as np


def sizes(side: int, frames: int = 1) -> list[int]:
    """How many tokens a block may have where frames have side x side tokens, from 1 to all of them."""
    squares = [n * n for n in range(1, side + 1) if side % n == 0]
    return squares + [n * side * side for n in range(2, frames + 1) if frames % n == 0]


def order(side: int, block_size: int, frames: int = 1) -> np.ndarray:
    """Which token, counted frame by frame in raster order, stands at each place of the sequence; int32 [L].

    Raises:
      ValueError: for a size that is not one of `sizes`.
    """
    if block_size not in sizes(side, frames):
        known = sizes(side, frames)
        raise ValueError(f"{side} x {side} tokens have no square blocks of {block_size}; choose from {known}")
    n = math.isqrt(min(block_size, side * side))  # whole frames are in raster order already
    raster = np.arange(frames * side * side, dtype=np.int32).reshape(frames, side // n, n, side // n, n)
    return raster.transpose(0, 1, 3, 2, 4).reshape(-1)


def inverse(order_L: np.ndarray) -> np.ndarray:
    """Where in the sequence each token of the raster stands; int32 [L]."""
    return np.argsort(order_L).astype(np.int32)


def positions(side: int, block_size: int, frames: int = 0) -> np.ndarray:
    """Where the token at each place of the sequence is: row and column, int32 [L, 2]; of a clip also the frame, [L, 3],
    which comes first."""
    order_L = order(side, block_size, frames or 1)
    axes = np.unravel_index(order_L, (frames, side, side) if frames else (side, side))
    return np.stack(axes, axis=-1).astype(np.int32)
