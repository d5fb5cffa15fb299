"""Losses that bring an image and its caption together, among those of the whole batch.

Rows are those of the global batch: under jit over a mesh every image is compared with every caption, on whichever
device they are, and the gradient flows through both. A part of the batch alone would give another loss.

Legend: B batch, d dimensions of the space in which images and captions are compared.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.mesh import constrain_batch
from ddt_jax.nn.params import declare

_LARGEST = 100.0  # of 1 / temperature, as in CLIP


class Scale(nn.Module):
    """The learned numbers of the loss: () → (factor on cosines, summand)."""

    config: settings.Contrast

    @nn.compact
    def __call__(self):
        c = self.config

        def number(name, value):
            return self.param(name, declare(nn.initializers.constant(value), (), decay=False), ())

        # Its logarithm is learned, so that the temperature stays positive.
        scale = jnp.minimum(jnp.exp(number("log_scale", -math.log(c.temperature))), _LARGEST)
        return scale, number("bias", c.bias) if c.kind == "sigmoid" else jnp.zeros(())


def loss(c: settings.Contrast, image_Bd, text_Bd, scale, bias):
    """Loss of each row [B], and how often an image's own caption is the nearest of the batch [B].

    Args:
      image_Bd, text_Bd: unit vectors; row i of one belongs to row i of the other.
      scale, bias: of `Scale`.
    """
    fixed_image, fixed_text = image_Bd, text_Bd
    if c.gradient == "published":  # what the devices gather from each other carries none there
        fixed_image, fixed_text = jax.lax.stop_gradient((image_Bd, text_Bd))
    to_text_BB = constrain_batch(scale * (image_Bd @ fixed_text.T) + bias)
    to_image_BB = constrain_batch(scale * (text_Bd @ fixed_image.T) + bias)
    b = len(image_Bd)
    nearest_B = jnp.argmax(to_text_BB, axis=1) == jnp.arange(b)
    if c.kind == "sigmoid":
        sign_BB = 2 * jnp.eye(b, dtype=to_text_BB.dtype) - 1
        pairs = (to_text_BB, to_image_BB) if c.gradient == "published" else (to_text_BB, to_text_BB)
        return -sum(jnp.sum(jax.nn.log_sigmoid(sign_BB * x), axis=1) for x in pairs) / 2, nearest_B
    return (_smoothed(to_text_BB, c.label_smoothing) + _smoothed(to_image_BB, c.label_smoothing)) / 2, nearest_B


def _smoothed(logits_BB, smoothing: float):
    """Cross-entropy of each row with 1 - s of the label on the diagonal and s shared out over all columns."""
    log_BB = jax.nn.log_softmax(logits_BB)
    return -(1 - smoothing) * jnp.diagonal(log_BB) - smoothing * jnp.mean(log_BB, axis=1)
