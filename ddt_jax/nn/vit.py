"""Vision transformers: CLIP (arXiv 2103.00020), SigLIP (2303.15343) and EVA-CLIP (2303.15389) by options of one module.

Legend: B batch, N patches, P values of a patch, T rows (patches, and a class token before them), D width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import blocks, embeddings, layers, multihead, spans
from ddt_jax.nn.images import patchify

# Of the red, green and blue of images in [0, 1] (published with CLIP).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def check(c: settings.ViT, image_size: int, name: str) -> None:
    """Raises UserError unless patches divide the image and heads the width. name: of the settings."""
    if image_size % c.patch_size:
        raise UserError(
            f"config: {name}.patch_size={c.patch_size} does not divide data.image_size={image_size}; "
            "choose one of its divisors"
        )
    if c.width % c.heads:
        raise UserError(f"config: {name}.width={c.width} is not a multiple of {name}.heads={c.heads}")


def rows(c: settings.ViT, image_size: int) -> int:
    """How many rows it gives of an image, T."""
    return (image_size // c.patch_size) ** 2 + c.class_token


class Block(nn.Module):
    """Pre-norm self-attention and MLP, as `blocks.EncoderBlock` but in the forms of published transformers."""

    heads: int
    mlp_width: int
    biased: str = "qkv"
    gelu: str = "exact"
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BSD, spans):
        h_BSD = layers.LayerNorm(epsilon=self.epsilon, name="attention_norm")(x_BSD)
        x_BSD = x_BSD + multihead.Attention(self.heads, self.biased, self.dtype, name="attention")(h_BSD, spans)
        h_BSD = layers.LayerNorm(epsilon=self.epsilon, name="mlp_norm")(x_BSD)
        return x_BSD + multihead.MLP(self.mlp_width, self.gelu, self.dtype, name="mlp")(h_BSD)


class ViT(nn.Module):
    """Images in [-1, 1] → all rows of the last block [B, T, D], the class token first where there is one."""

    config: settings.ViT
    dtype: Any = None

    @nn.compact
    def __call__(self, images_BHWC):
        c = self.config
        if c.pixels == "clip":
            x = (images_BHWC + 1) / 2
            images_BHWC = (x - jnp.asarray(CLIP_MEAN, x.dtype)) / jnp.asarray(CLIP_DEVIATION, x.dtype)
        patches_BNP = patchify(images_BHWC, c.patch_size)
        embed = layers.Dense((c.width,), ("patch", "embed"), use_bias=c.patch_bias, dtype=self.dtype, name="embed")
        x_BTD = embed(patches_BNP)
        if c.class_token:
            class_1D = embeddings.learned(self, "class_token", 1, c.width).astype(x_BTD.dtype)
            x_BTD = jnp.concatenate([jnp.broadcast_to(class_1D, (len(x_BTD), *class_1D.shape)), x_BTD], axis=1)
        x_BTD = x_BTD + embeddings.learned(self, "positions", x_BTD.shape[1], c.width).astype(x_BTD.dtype)
        if c.pre_norm:
            x_BTD = layers.LayerNorm(epsilon=c.norm_epsilon, name="pre_norm")(x_BTD)
        biased = {"all": "qkv", "qv": "qv", "none": ""}[c.qkv_bias]
        make = functools.partial(Block, c.heads, c.mlp_width, biased, c.gelu, c.norm_epsilon, self.dtype)
        x_BTD = blocks.Stack(make, c.depth, c.scan_layers, c.remat, name="blocks")(x_BTD, spans.full(x_BTD.shape[1]))
        return layers.LayerNorm(epsilon=c.norm_epsilon, name="norm")(x_BTD) if c.final_norm else x_BTD
