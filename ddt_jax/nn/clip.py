"""CLIP (arXiv 2103.00020): pictures and captions as unit vectors that point the same way where they belong together.

Legend: B batch, L ids of a caption, D width of the text, F features.
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn import blocks, embeddings, layers, multihead, spans, vit
from ddt_jax.nn.params import declare


@dataclass(frozen=True)
class Sizes:
    """Of both networks. image_size: pixels of a side; length: ids of a caption at most; features: F."""

    vision: settings.ViT
    image_size: int
    vocab_size: int
    length: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    gelu: str
    norm_epsilon: float
    features: int

    def __post_init__(self):
        assert self.vision.class_token and self.vision.final_norm and self.gelu in multihead.GELU


class Text(nn.Module):
    """Causal rows of captions, int32 [B, L], behind the last norm."""

    sizes: Sizes | settings.CLIPText
    dtype: Any = None

    @nn.compact
    def __call__(self, ids_BL, end_B=None):
        """[B, D] of the rows end_B, int32 [B], of which a caption is that of its end; None: all, [B, L, D]."""
        s = self.sizes
        table = declare(nn.initializers.normal(0.02), ("vocab", "embed"), decay=False)
        x_BLD = jnp.asarray(self.param("embed", table, (s.vocab_size, s.width)))[ids_BL]
        x_BLD = x_BLD + embeddings.learned(self, "positions", s.length, s.width)[: ids_BL.shape[1]]
        options = {"gelu": s.gelu, "epsilon": s.norm_epsilon, "dtype": self.dtype}
        make = functools.partial(vit.Block, s.heads, s.mlp_width, **options)
        x_BLD = blocks.Stack(make, s.depth, name="blocks")(x_BLD, spans.causal(ids_BL.shape[1]))
        if end_B is not None:
            x_BLD = jnp.take_along_axis(x_BLD, end_B[:, None, None], axis=1)[:, 0]
        return layers.LayerNorm(epsilon=s.norm_epsilon, name="norm")(x_BLD)


class Image(nn.Module):
    """Pictures [B, S, S, 3] in [-1, 1] → [B, F], as long as they come. features: F."""

    config: settings.ViT
    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, images_BHWC):
        seen_BD = vit.ViT(self.config, self.dtype, name="vision")(images_BHWC)[:, 0]
        return projection(self.features, "projection", self.dtype)(seen_BD)


class Clip(nn.Module):
    """Pictures [B, S, S, 3] in [-1, 1], ids int32 [B, L] and the places int32 [B] of their ends → two [B, F].

    What stands behind a caption's end has no effect.
    """

    sizes: Sizes

    @nn.compact
    def __call__(self, images_BHWC, ids_BL, end_B):
        s = self.sizes
        seen_BF = Image(s.vision, s.features, name="image")(images_BHWC)
        read_BF = projection(s.features, "text_projection")(Text(s, name="text")(ids_BL, end_B))
        return tuple(x_BF / jnp.linalg.norm(x_BF, axis=-1, keepdims=True) for x_BF in (seen_BF, read_BF))


def projection(features: int, name: str, dtype=None) -> layers.Dense:
    """The last map of either network."""
    return layers.Dense((features,), ("embed", None), use_bias=False, dtype=dtype, name=name)
