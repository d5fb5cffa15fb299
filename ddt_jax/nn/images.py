"""Images as arrays: their values as numbers, and as a sequence of patches.

Legend: B batch, H height, W width, C channels, N patches, P values of a patch.
"""

import jax.numpy as jnp


def to_float(image):
    """uint8 → [-1, 1]; floats pass as they are (already in [-1, 1])."""
    return image / jnp.float32(127.5) - 1 if image.dtype == jnp.uint8 else image


def to_uint8(image):
    """[-1, 1] → uint8, rounded and clipped."""
    return jnp.round(jnp.clip((image + 1) * 127.5, 0, 255)).astype(jnp.uint8)


def patchify(x_BHWC, size: int):
    """[B, H, W, C] → [B, N, P], patches in raster order, values as (row, column, channel)."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // size) * (w // size), size * size * c)


def unpatchify(x_BNP, size: int, height: int):
    """The inverse of `patchify` for latents of this height."""
    b, n, p = x_BNP.shape
    rows = height // size
    x = x_BNP.reshape(b, rows, n // rows, size, size, p // (size * size)).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height, (n // rows) * size, p // (size * size))
