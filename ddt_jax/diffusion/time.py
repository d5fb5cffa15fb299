"""Which noise levels are trained and sampled.

Two times appear. u in [0, 1] is what samplers draw and what the token schedule looks at; t = shift(u) is the noise
level of the path. Both are 1 at pure noise. (Selftok's code computes k(t) before the shift in the same way.)

Legend: B batch.
"""

import jax
import numpy as np

from ddt_jax import settings
from ddt_jax.diffusion import paths


def sample(flow: settings.Flow | settings.DDPM | settings.RectifiedFlow, uniform_B, slot_B=None, batch_size: int = 0):
    """Unshifted times u [B] in [0, 1].

    Args:
      flow: of which `time` and what belongs to it are read.
      uniform_B: one number in (-1, 1) per example, from the example's own key (`paths.uniform`).
      slot_B: int32 row of each example in the global batch; "stratified" draws from the slot's own share of [0, 1), so
        that every step covers the whole range however the batch is cut.
      batch_size: rows of the global batch. Only "stratified" looks at this and slot_B.
    """
    if flow.time == "logit_normal":
        return jax.nn.sigmoid(flow.logit_mean + flow.logit_std * paths.to_normal(uniform_B))
    uniform_B = (1 + uniform_B) / 2
    return (slot_B + uniform_B) / batch_size if flow.time == "stratified" else uniform_B


def shift(u, factor: float):
    """Noise level t for u: factor > 1 spends more of [0, 1] at high noise (SD3, arXiv 2403.03206 eq. 23)."""
    return factor * u / (1 + (factor - 1) * u)


def grid(steps: int) -> np.ndarray:
    """Times u from 1 to 0, f32 [steps + 1], rounded as torch.linspace(1, 0, steps + 1) does.

    The rounding matters: 1000 u is truncated by the piecewise token schedule, and Selftok's published visible counts
    come from 459 and 399 where exact arithmetic gives 460 and 400.
    """
    step = np.float32(1) / np.float32(steps)
    index = np.arange(steps + 1)
    down = np.float32(1) - step * index.astype(np.float32)
    up = step * (steps - index).astype(np.float32)
    return np.where(index < (steps + 1) // 2, down, up).astype(np.float32)
