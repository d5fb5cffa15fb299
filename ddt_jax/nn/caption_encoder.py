"""A caption as one vector, for networks that are told of an image through their modulation.

The bytes of the text (UTF-8, 0 where there is none) through some encoder blocks, and the mean over them: no vocabulary
has to be kept with a run. No text at all has a learned vector of its own.

Legend: B batch, Z bytes, D width.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax.nn import spans
from ddt_jax.nn.blocks import EncoderBlock
from ddt_jax.nn.embeddings import learned
from ddt_jax.nn.layers import Dense, LayerNorm


class CaptionEncoder(nn.Module):
    """See the module's docstring."""

    width: int
    heads: int
    depth: int
    dtype: Any = None

    @nn.compact
    def __call__(self, text_BZ):
        """text_BZ: uint8, zeros behind the text. Returns [B, D]."""
        length_B = jnp.sum(text_BZ != 0, axis=1, dtype=jnp.int32)
        places = learned(self, "place", text_BZ.shape[1], self.width)
        x_BZD = jnp.asarray(learned(self, "byte", 256, self.width))[text_BZ] + places
        x_BZD = x_BZD if self.dtype is None else x_BZD.astype(self.dtype)
        visible = spans.key_prefix(length_B)
        for i in range(self.depth):
            x_BZD = EncoderBlock(self.heads, dtype=self.dtype, name=f"layer_{i}")(x_BZD, visible)
        there_BZ1 = (text_BZ != 0)[..., None]
        sum_BD = jnp.sum(jnp.where(there_BZ1, LayerNorm(name="norm")(x_BZD), 0), axis=1)
        mean_BD = sum_BD / jnp.maximum(length_B, 1)[:, None].astype(sum_BD.dtype)
        vector_BD = Dense((self.width,), ("embed", "embed_out"), dtype=self.dtype, name="out")(mean_BD)
        none_1D = jnp.asarray(learned(self, "none", 1, self.width), vector_BD.dtype)
        return jnp.where(length_B[:, None] > 0, vector_BD, none_1D)
