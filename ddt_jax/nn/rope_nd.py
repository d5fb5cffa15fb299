"""Rotary positions of several axes: RoPE-ND (ACDiT, arXiv 2412.07720 §4.3).

A head's dimensions are shared out among the axes; pair (x[i], x[i + E / 2]) turns by the position on the axis that it
belongs to. Each axis has a base that grows with its length.

The released code builds cos and sin of each axis over its own run of dimensions, and then pairs the dimensions over the
whole head. So the two numbers of a pair are turned by different angles, which is no rotation: norms are not kept, and
products of queries and keys depend on more than the distance. It also spaces frequencies up to 1 / base itself, where
the paper stops one step earlier. Its checkpoints need that, so it is `kind="released"`.

Legend: B batch, H heads, S sequence, L positions, A axes, E head dimension.
"""

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

Kind = Literal["nd", "released"]

SHARES = {1: (1,), 2: (1, 1), 3: (2, 3, 3)}  # of the axes in a head: rows, columns; time, rows, columns


def base(length: int) -> int:
    """Of an axis with so many positions: 8 L / π, rounded up to a multiple of 100 (§4.3)."""
    return 100 * math.ceil(8 * length / (100 * math.pi))


def split(head_dim: int, axes: int) -> tuple[int, ...]:
    """Dimensions of a head that belong to each axis. Raises ValueError if they do not divide."""
    shares = SHARES[axes]
    if head_dim % (2 * sum(shares)):
        raise ValueError(
            f"a head of {head_dim} does not divide among {axes} axes; take a multiple of {2 * sum(shares)}"
        )
    return tuple(head_dim * share // sum(shares) for share in shares)


def tables(positions_LA: np.ndarray, lengths: tuple[int, ...], head_dim: int, kind: Kind = "nd"):
    """(cos, sin) for `rotate`, each float64 [L, E].

    Args:
      positions_LA: integers.
      lengths: how many positions each axis has; they decide the bases.
    """
    angles = []
    for position_L, length, d in zip(positions_LA.T, lengths, split(head_dim, len(lengths)), strict=True):
        half = d // 2
        exponent = np.linspace(0, 1, half) if kind == "released" else np.arange(half) / half
        angles.append(position_L[:, None] * float(base(length)) ** -exponent)
    if kind == "released":
        angle_LE = np.concatenate([x for angle in angles for x in (angle, angle)], axis=1)
    else:
        angle_LE = np.tile(np.concatenate(angles, axis=1), 2)
    return np.cos(angle_LE), np.sin(angle_LE)


def rotate(x_BHSE, cos_SE, sin_SE):
    """x turned by `tables`, in its type; at least fp32 inside."""
    wide = x_BHSE.astype(jnp.promote_types(x_BHSE.dtype, jnp.float32))
    first, second = jnp.split(wide, 2, axis=-1)
    across = jnp.concatenate([-second, first], axis=-1)
    turned = wide * jnp.asarray(cos_SE, wide.dtype) + across * jnp.asarray(sin_SE, wide.dtype)
    return turned.astype(x_BHSE.dtype)
