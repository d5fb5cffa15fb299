"""A bidirectional transformer that reads a caption as one vector: that of a class token before it.

Legend: B batch, L tokens of a caption at most, D width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import blocks, embeddings, layers, spans, vit
from ddt_jax.nn.params import declare


def check(c: settings.TextTower, name: str) -> None:
    """Raises UserError for sizes that do not go together. name: of the settings."""
    if c.width % c.heads:
        raise UserError(f"config: {name}.width={c.width} is not a multiple of {name}.heads={c.heads}")
    if c.length < 1 or c.vocab_size < 1:
        raise UserError(f"config: {name}.length={c.length} and {name}.vocab_size={c.vocab_size} must be at least 1")


class TextTower(nn.Module):
    """Ids int32 [B, L], settings.NO_TOKEN behind a caption's end → [B, D]. What stands behind the end has no effect."""

    config: settings.TextTower
    dtype: Any = None

    @nn.compact
    def __call__(self, ids_BL):
        c = self.config
        table = declare(nn.initializers.normal(0.02), ("vocab", "embed"), decay=False)
        # NumPy cannot be indexed by what is traced.
        x_BLD = jnp.asarray(self.param("embed", table, (c.vocab_size, c.width)))[jnp.maximum(ids_BL, 0)]
        class_1D = embeddings.learned(self, "class_token", 1, c.width)
        x_BSD = jnp.concatenate([jnp.broadcast_to(class_1D, (len(x_BLD), 1, c.width)), x_BLD], axis=1)
        x_BSD = x_BSD + embeddings.learned(self, "positions", c.length + 1, c.width)[: x_BSD.shape[1]]
        seen = spans.key_prefix(1 + jnp.sum(ids_BL != settings.NO_TOKEN, axis=1, dtype=jnp.int32))
        make = functools.partial(vit.Block, c.heads, c.mlp_width, dtype=self.dtype)
        x_BSD = blocks.Stack(make, c.depth, name="blocks")(x_BSD.astype(self.dtype or x_BSD.dtype), seen)
        return layers.LayerNorm(name="norm")(x_BSD[:, 0])
