"""Noising path of rectified flow: x_t = (1 - t) x0 + t noise. t = 1 is pure noise, everywhere in this package.

(Selftok's text counts the other way round, its code as here; SD3: arXiv 2403.03206.)
"""

import jax
import jax.numpy as jnp
import numpy as np


def uniform(key, count: int, dtype=jnp.float32):
    """Uniform numbers [count] in the open interval (-1, 1), that `to_normal` takes."""
    return jax.random.uniform(key, (count,), dtype, minval=np.nextafter(np.array(-1, dtype), np.array(0, dtype)))


def to_normal(uniform):
    """Standard normal numbers from uniform ones in (-1, 1); what `jax.random.normal` does inside."""
    return np.sqrt(2).astype(uniform.dtype) * jax.lax.erf_inv(uniform)


def over(t_B, x):
    """t_B, [B] or a scalar, shaped to broadcast against x [B, ...]."""
    return t_B.reshape(t_B.shape + (1,) * (x.ndim - t_B.ndim))


def interpolate(x0, noise, t_B):
    """x_t of the same shape as x0. t_B: noise level [B] or a scalar."""
    t = over(t_B, x0)
    return (1 - t) * x0 + t * noise
