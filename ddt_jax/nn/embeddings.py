"""Embeddings of time and position.

Legend: B batch, D width, N patches.
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


class TimeEmbedding(nn.Module):
    """Noise level in [0, 1] → vector: sinusoids of 1000 t through an MLP with SiLU."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, t_B):
        h = sinusoidal(1000 * t_B, self.width)
        h = Dense((self.width,), ("embed", "embed_out"), dtype=self.dtype, name="up")(h)
        return Dense((self.width,), ("embed", "embed_out"), dtype=self.dtype, name="down")(nn.silu(h))


def learned(module: nn.Module, name: str, rows: int, width: int, axis: str | None = None):
    """A table [rows, width] of learned vectors, N(0, 0.02), declared in `module`. axis: logical axis of the rows."""
    return module.param(name, declare(nn.initializers.normal(0.02), (axis, "embed"), decay=False), (rows, width))
