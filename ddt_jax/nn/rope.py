"""Rotary positions (arXiv 2104.09864) as LLaMA's published weights expect them: pair i is (x[i], x[i + E / 2]).

Legend: B batch, H heads, S sequence, E head dimension, F = E / 2 pairs.
"""

import jax.numpy as jnp
import numpy as np

from ddt_jax import settings


def frequencies(head_dim: int, theta: float, scaling: settings.RopeScaling) -> np.ndarray:
    """Radians per position of each pair, float32 [F]."""
    frequency_F = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling.kind == "linear":
        frequency_F = frequency_F / scaling.factor
    elif scaling.kind == "llama3":
        # Slow pairs, which turn less than low_freq_factor times in the original context, are stretched, fast ones stay.
        turns_F = scaling.original_context * frequency_F / (2 * np.pi)
        share_F = (turns_F - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share_F = np.clip(share_F, 0, 1)
        frequency_F = share_F * frequency_F + (1 - share_F) * frequency_F / scaling.factor
    return frequency_F.astype(np.float32)


def rotation(positions_BS, frequency_F):
    """(cos, sin) of each row's angles, at least fp32 [B, 1, S, F]; the same for all layers."""
    angle_BSF = positions_BS[..., None].astype(jnp.float32) * frequency_F
    return jnp.cos(angle_BSF)[:, None], jnp.sin(angle_BSF)[:, None]


def rotate(x_BHSE, rotation):
    """x with its pairs turned, in its type."""
    cos, sin = rotation
    first, second = jnp.split(x_BHSE, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BHSE.dtype)
