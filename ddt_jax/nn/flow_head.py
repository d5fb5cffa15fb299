"""A DiT (arXiv 2212.09748) that denoises patches beside features of the image it should draw.

Legend: B batch, N patches, P values of a patch, M features, D width, F their width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn import blocks, embeddings, layers, spans


class FlowHead(nn.Module):
    """Noised patches [B, N, P], noise level, features [B, M, F] → prediction [B, N, P], 0 at the start."""

    config: settings.FlowHead
    dtype: Any = None

    @nn.compact
    def __call__(self, patches_BNP, t_B, features_BMF, shown_B):
        """shown_B: bool; where False, the features have no effect at all."""
        c, (n, p), m = self.config, patches_BNP.shape[1:], features_BMF.shape[1]
        x_BND = layers.Dense((c.width,), ("patch", "embed"), dtype=self.dtype, name="embed")(patches_BNP)
        x_BND = x_BND + embeddings.learned(self, "positions", n, c.width).astype(x_BND.dtype)
        features_BMF = jnp.where(shown_B[:, None, None], features_BMF, 0)
        into = layers.Dense((c.width,), ("embed_out", "embed"), dtype=self.dtype, name="feature_embed")
        f_BMD = into(layers.LayerNorm(affine=False)(features_BMF))
        f_BMD = f_BMD + embeddings.learned(self, "feature_positions", m, c.width).astype(f_BMD.dtype)
        f_BMD = jnp.where(shown_B[:, None, None], f_BMD, 0)
        condition_BD = embeddings.TimeEmbedding(c.width, self.dtype, name="time")(t_B) + jnp.mean(f_BMD, axis=1)
        seen = spans.tokens_and_patches(0, jnp.where(shown_B, m, 0), m, n)
        make = functools.partial(blocks.CrossBlock, c.heads, c.mlp_ratio, dtype=self.dtype)
        x_BND = blocks.Stack(make, c.depth, name="blocks")(x_BND, f_BMD, condition_BD, seen)
        shift, scale = blocks.Modulation(2, self.dtype, name="final_adaln")(condition_BD)
        x_BND = blocks.modulate(layers.LayerNorm(affine=False)(x_BND), shift, scale)
        out_BNP = layers.zeros_dense((p,), ("embed", "patch"), dtype=self.dtype, name="final")(x_BND)
        return out_BNP.astype(jnp.promote_types(out_BNP.dtype, jnp.float32))
