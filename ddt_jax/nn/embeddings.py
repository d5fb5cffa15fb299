"""Embeddings of time and position.

Legend: B batch, D width, N patches, F sinusoids.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ddt_jax.nn.layers import Dense
from ddt_jax.nn.params import declare


def sinusoidal(position, width: int, max_period: float = 10_000.0):
    """cos then sin of a position at geometrically spaced frequencies, as in DiT. position [...] → [..., width]."""
    half = width // 2
    frequency = jnp.exp(-np.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.asarray(position, jnp.promote_types(jnp.result_type(position), jnp.float32))[..., None] * frequency
    embedding = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return jnp.pad(embedding, [(0, 0)] * (embedding.ndim - 1) + [(0, width % 2)])


def released_sinusoids(position, width: int = 256, max_period: float = 10_000.0):
    """`sinusoidal` with frequencies that are rounded once, from fp64 to fp32; for published weights.

    Positions go beyond 5000, where one unit in the last place of a frequency moves the angle by 3e-4: an exponential
    that depends on the compiler would move what the networks put out. NumPy positions give a NumPy table.
    """
    half = width // 2
    frequency_F = np.exp(-np.log(max_period) * np.arange(half) / half).astype(np.float32)
    if isinstance(position, np.ndarray):
        angle = (position[..., None].astype(np.float32) * frequency_F).astype(np.float64)
        return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
    angle = position[..., None] * frequency_F
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def sincos_1d(position, width: int):
    """Fixed table of DiT and MAE: sin then cos, fp64 inside. position NumPy [...] → float32 [..., width]."""
    frequency = 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    angle = np.asarray(position, np.float64)[..., None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


def sincos_2d(side: int, width: int):
    """Fixed table float32 [side, side, width] (row, column): the first half of a vector tells the column (DiT)."""
    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    return np.concatenate([sincos_1d(column, width // 2), sincos_1d(row, width // 2)], axis=-1)


def centre_crop(table, rows: int, columns: int):
    """The middle [rows, columns] of a table [side, side, D]; the smaller half of what is left lies in front."""
    side = table.shape[0]
    if max(rows, columns) > side:
        raise ValueError(f"{rows} x {columns} patches do not fit a table of positions with side {side}")
    top, left = (side - rows) // 2, (side - columns) // 2
    return table[top : top + rows, left : left + columns]


class TimeEmbedding(nn.Module):
    """Noise level in [0, 1] → vector: sinusoids of 1000 t through an MLP with SiLU.

    Attributes:
      sinusoids: how many; 0 = as many as the vector is wide.
    """

    width: int
    dtype: Any = None
    sinusoids: int = 0

    @nn.compact
    def __call__(self, t_B):
        h = sinusoidal(1000 * t_B, self.sinusoids or self.width)
        h = Dense((self.width,), ("embed", "embed_out"), dtype=self.dtype, name="up")(h)
        return Dense((self.width,), ("embed", "embed_out"), dtype=self.dtype, name="down")(nn.silu(h))


def learned(module: nn.Module, name: str, rows: int, width: int, axis: str | None = None):
    """A table [rows, width] of learned vectors, N(0, 0.02), declared in `module`. axis: logical axis of the rows."""
    return module.param(name, declare(nn.initializers.normal(0.02), (axis, "embed"), decay=False), (rows, width))
