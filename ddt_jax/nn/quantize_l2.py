"""Vector quantization as SEED published it: a codebook that gradients move, by squared distance, without revival.

Nearest code by Euclidean distance, no norms, U(-1/V, 1/V) at the start, straight-through gradients (arXiv 2307.08041;
sizes and losses are those of its code). There the two weights of VQ-VAE's loss (arXiv 1711.00937) stand the other way
round: commitment 1, codebook 0.25. Nothing brings back a code that no feature is near; `nn/quantize.py` is the default.

Legend: B batch, K tokens, D code dimension, V codes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax.nn.params import declare
from ddt_jax.nn.quantize import at_least_f32, nearest

CODEBOOK_WEIGHT = 0.25


class Codebook(nn.Module):
    """() → vectors of the codes [V, D]."""

    codebook_size: int
    code_dim: int

    @nn.compact
    def __call__(self):
        v = self.codebook_size

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -1 / v, 1 / v)

        return self.param("vectors", declare(uniform, ("codes", "code")), (v, self.code_dim))


def encode(codes_VD, z_BKD):
    """Index int32 [B, K] of the nearest code; ties go to the lowest index."""
    z_BKD, codes_VD = at_least_f32(z_BKD), at_least_f32(codes_VD)
    b, k, d = z_BKD.shape
    # |z - e|² is smallest where z e - |e|² / 2 is largest.
    rows = jnp.concatenate([z_BKD.reshape(b * k, d), jnp.ones((b * k, 1), z_BKD.dtype)], axis=1)
    half_V = jnp.sum(jnp.square(codes_VD), axis=1, keepdims=True) / 2
    return nearest(rows, jnp.concatenate([codes_VD, -half_V], axis=1), examples=b).reshape(b, k)


def quantize(codes_VD, z_BKD):
    """Training.

    Returns:
      (vectors of the codes with straight-through gradients [B, K, D], codes int32 [B, K], loss [B, K, D] with gradients
      to features and codes).
    """
    z_BKD = at_least_f32(z_BKD)
    codes_BK = encode(jax.lax.stop_gradient(codes_VD), jax.lax.stop_gradient(z_BKD))
    chosen_BKD = codes_VD[codes_BK].astype(z_BKD.dtype)
    fixed_z, fixed_chosen = jax.lax.stop_gradient((z_BKD, chosen_BKD))
    loss = jnp.square(z_BKD - fixed_chosen) + CODEBOOK_WEIGHT * jnp.square(chosen_BKD - fixed_z)
    return z_BKD + jax.lax.stop_gradient(chosen_BKD - z_BKD), codes_BK, loss
