"""What is done to images so that a classifier does not learn them by heart: random erasing and mixup.

Everything about a row follows from the row's own key, so it depends on neither mesh nor number of hosts. Both work on
what a network is given, latents of about unit scale (pixels in [-1, 1] where those are the latents), so that latents
that were kept (`data/latents.py`) serve as well as images do.

Legend: B batch, T frames of a clip, h, w, c a latent, K classes.
"""

import math

import jax
import jax.numpy as jnp

_LEAST_AREA, _MOST_AREA = 0.02, 1 / 3  # of the image, as in timm, which most train with; arXiv 1708.04896: up to 0.4
_LEAST_ASPECT = 0.3  # height over width, up to its inverse (arXiv 1708.04896 table 4)


def erased(latents, keys_B, probability: float):
    """Latents [B, h, w, c], or of clips [B, T, h, w, c], some with a rectangle of normal noise in them (random erasing,
    arXiv 1708.04896); in a clip it lies in the same place in all frames.

    Area and logarithm of the aspect are uniform; what is longer than the image is cut to it (the paper draws again).

    Args:
      probability: of each row to get one; static, 0: none.
    """
    if not probability:
        return latents

    def one(x, key):
        which, where, noise = jax.random.split(key, 3)
        hole_hw1 = rectangle(where, *x.shape[-3:-1])[..., None] & (jax.random.uniform(which) < probability)
        return jnp.where(hole_hw1, jax.random.normal(noise, x.shape, x.dtype), x)

    return jax.vmap(one)(latents, keys_B)


def rectangle(key, height: int, width: int):
    """A random rectangle as bool [h, w], of one row and column at least."""
    area, aspect, top, left = jax.random.uniform(key, (4,))
    area = (_LEAST_AREA + (_MOST_AREA - _LEAST_AREA) * area) * height * width
    ratio = jnp.exp((2 * aspect - 1) * math.log(_LEAST_ASPECT))

    def inside(length, whole, start):
        """Which of so many rows lie in it, wherever it fits with equal probability."""
        length = jnp.clip(jnp.round(length), 1, whole)
        start = jnp.floor(start * (whole - length + 1))
        at = jnp.arange(whole)
        return (at >= start) & (at < start + length)

    rows_h, columns_w = inside(jnp.sqrt(area * ratio), height, top), inside(jnp.sqrt(area / ratio), width, left)
    return rows_h[:, None] & columns_w


def mixed(latents, target_BK, keys_B, alpha: float):
    """Each row with the row before it in the batch, in the same parts as its target (mixup, arXiv 1710.09412).

    It looks at the whole batch at once. A row that has no target, or meets one without, stays as it is.

    Args:
      target_BK: probabilities of classes; zeros for a row without a label.
      alpha: the row's own part is drawn from Beta(alpha, alpha); static, 0: nothing is mixed.

    Returns:
      (latents, target_BK).
    """
    if not alpha:
        return latents, target_BK
    before, target_before_BK = (jnp.roll(x, 1, axis=0) for x in (latents, target_BK))
    own_B = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys_B)
    both_B = jnp.any(target_BK > 0, axis=1) & jnp.any(target_before_BK > 0, axis=1)
    own_B = jnp.where(both_B, own_B, 1)

    def mix(x, y):
        own = own_B.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)
        return own * x + (1 - own) * y

    return mix(latents, before), mix(target_BK, target_before_BK)
