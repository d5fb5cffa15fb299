"""Tokens of an image in the order of its square blocks, each block in one piece (ACDiT, arXiv 2412.07720 appendix B).

Blocks follow each other in raster order, and so do the tokens inside a block. Pure NumPy: the order is known before a
number exists.

Legend: L tokens.
"""

import math

import numpy as np


def sizes(side: int) -> list[int]:
    """How many tokens a block of an image of side x side tokens may have, from 1 to all of them."""
    return [n * n for n in range(1, side + 1) if side % n == 0]


def order(side: int, block_size: int) -> np.ndarray:
    """Which token, counted in raster order, stands at each place of the sequence; int32 [L].

    Raises:
      ValueError: for a size that is not one of `sizes`.
    """
    if block_size not in sizes(side):
        raise ValueError(f"{side} x {side} tokens have no square blocks of {block_size}; choose from {sizes(side)}")
    n = math.isqrt(block_size)
    raster = np.arange(side * side, dtype=np.int32).reshape(side // n, n, side // n, n)
    return raster.transpose(0, 2, 1, 3).reshape(-1)


def inverse(order_L: np.ndarray) -> np.ndarray:
    """Where in the sequence each token of the raster stands; int32 [L]."""
    return np.argsort(order_L).astype(np.int32)


def positions(side: int, block_size: int) -> np.ndarray:
    """Row and column in the image of the token at each place of the sequence; int32 [L, 2]."""
    return np.stack(np.divmod(order(side, block_size), side), axis=-1)
