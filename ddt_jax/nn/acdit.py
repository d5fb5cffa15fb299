"""The network of ACDiT (arXiv 2412.07720 §4.2, §4.5, appendix B): clean blocks, then their noised copies.

A DiT with RMS norms. Noised tokens are modulated by the noise level of their block and by what the image is said to be
(adaLN-zero, with gates): a label, a caption as one vector, or both. Clean ones go the plain pre-norm way through the
same weights and are told nothing. So what a clean block gives to later ones depends on its pixels alone, and a cache of
it serves every noise level, label and caption. Blocks are those of an image or of a clip, whose frames are a third axis
of positions.

Legend: B batch, N blocks, R tokens of a block, L = N R tokens of an image or a clip, S rows, P values of a token,
D width, E head dimension.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import settings
from ddt_jax.mesh import constrain_batch
from ddt_jax.nn import kv_cache, rope_nd, spans, square_blocks
from ddt_jax.nn.attention import attend
from ddt_jax.nn.blocks import HeadMerge, HeadProjection, Modulation, Stack, modulate
from ddt_jax.nn.caption_encoder import CaptionEncoder
from ddt_jax.nn.embeddings import TimeEmbedding, learned
from ddt_jax.nn.layers import MLP, Dense, RMSNorm, compute_dtype, zeros_dense

_SINUSOIDS = 256
_STEP = 1e-3  # the published networks count their thousand noise levels from 0


class Block(nn.Module):
    """The carry is (x [B, S, D], number of the layer, Cache or None); the last rows of x are noised blocks.

    Attributes:
      block_size: R.
    """

    heads: int
    block_size: int
    mlp_ratio: int = 4
    dtype: Any = None

    @nn.compact
    def __call__(self, carry, condition_BND, rotation, visible):
        """condition_BND: one vector for each noised block; None: all rows are clean. rotation: of `rope_nd.tables`, a
        row for each of x. visible: spans, over the cache's slots if there is one."""
        x_BSD, layer, cache = carry
        d = x_BSD.shape[-1]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            [None] * 6 if condition_BND is None else Modulation(6, self.dtype, name="adaln")(condition_BND)
        )
        h_BSD = self._modulated(RMSNorm(axis="embed", name="attention_norm")(x_BSD), shift, scale)
        q, k, v = HeadProjection("qkv", self.heads, True, self.dtype, name="project")(h_BSD)
        q, k = rope_nd.rotate(q, *rotation), rope_nd.rotate(k, *rotation)
        if cache is not None:
            cache, k, v = cache.write(layer, k, v)
        out_BSD = HeadMerge(d, self.dtype, name="output")(attend(q, k.astype(q.dtype), v.astype(q.dtype), visible))
        x_BSD = x_BSD + self._gated(out_BSD, gate)
        h_BSD = self._modulated(RMSNorm(axis="embed", name="mlp_norm")(x_BSD), mlp_shift, mlp_scale)
        out_BSD = MLP(self.mlp_ratio * d, self.dtype, name="mlp")(h_BSD)
        return x_BSD + self._gated(out_BSD, mlp_gate), layer + 1, cache

    def _modulated(self, h_BSD, shift_BND, scale_BND):
        return on_noised(modulate, self.block_size, h_BSD, shift_BND, scale_BND)

    def _gated(self, out_BSD, gate_BND):
        return on_noised(jnp.multiply, self.block_size, out_BSD, gate_BND)


def on_noised(function: Callable, block_size: int, x_BSD, *vectors_BND):
    """x with a function of its noised rows, the last ones, and of vectors of their blocks; None: there are none."""
    if vectors_BND[0] is None:
        return x_BSD
    b, n, d = vectors_BND[0].shape
    clean, noised = jnp.split(x_BSD, [x_BSD.shape[1] - n * block_size], axis=1)
    noised = function(noised.reshape(b, n, block_size, d), *(vector[:, :, None] for vector in vectors_BND))
    return jnp.concatenate([clean, noised.reshape(b, n * block_size, d)], axis=1)


class Network(nn.Module):
    """All of it. Tokens come and go in the order of `square_blocks`.

    Attributes:
      config: sizes.
      side: tokens of a side of the image, or of a frame.
      values: P.
      frames: of a clip; 0: images.
    """

    config: settings.ACDiT
    side: int
    values: int
    frames: int = 0

    def setup(self):
        c, dtype = self.config, compute_dtype(self.config.dtype)
        self.into = Dense((c.width,), ("patch", "embed"), use_bias=False, dtype=dtype)
        self.time = TimeEmbedding(c.width, dtype, sinusoids=_SINUSOIDS)
        if c.places:
            self.place = learned(self, "place", self.side**2 * (self.frames or 1), c.width)
        if c.classes:
            self.labels = learned(self, "label", c.classes + 1, c.width)  # the last one: no label
        if c.caption_bytes:
            self.captions = CaptionEncoder(c.width, c.heads, c.caption_depth, dtype)
        make = functools.partial(Block, c.heads, c.block_size, c.mlp_ratio, dtype)
        self.stack = Stack(make, c.depth, c.scan_layers, c.remat)
        self.norm = RMSNorm(axis="embed")
        self.adaln = Modulation(2, dtype)
        self.out = zeros_dense((self.values,), ("embed", "patch"), dtype=dtype)

    def __call__(self, clean_BLP, noised_BLP, t_BN, label_B, text_BZ=None):
        """What is predicted of every noised block, beside the clean ones before it.

        Args:
          t_BN: noise level of each block.
          label_B, text_BZ: as in `told`.

        Returns:
          [B, L, P], at least fp32.
        """
        blocks = t_BN.shape[1]
        x_BSD = self._rows(jnp.concatenate([clean_BLP, noised_BLP.astype(clean_BLP.dtype)], axis=1))
        rotation = [jnp.concatenate([table, table]) for table in self._rotation(x_BSD.dtype)]
        condition_BND = self._condition(t_BN, self.told(label_B, text_BZ))
        visible = spans.skip_causal(blocks, self.config.block_size)
        h_BSD, _ = self._run(x_BSD, None, condition_BND, rotation, visible)
        return self._predicted(h_BSD[:, clean_BLP.shape[1] :], condition_BND)

    def told(self, label_B, text_BZ=None):
        """What images are said to be, as vectors [B, D]; None for a network that is told nothing.

        Args:
          label_B: int32 in [0, classes], `classes` for none; not looked at where there are no classes.
          text_BZ: captions, uint8, zeros for none; where there are captions.
        """
        c, parts = self.config, []
        if c.classes:
            parts.append(jnp.asarray(self.labels)[label_B])
        if c.caption_bytes:
            parts.append(self.captions(text_BZ))
        return sum(parts[1:], parts[0]) if parts else None

    def denoise(self, noised_BRP, t_B, told_BD, number, cache: kv_cache.Cache):
        """What is predicted of one noised block beside a cache of all clean ones before it, which stays as it is.

        Args:
          told_BD: of `told`.
          number: of the block, int32 scalar.

        Returns:
          [B, R, P], at least fp32.
        """
        beside = kv_cache.Beside(cache)
        before, own = jnp.reshape(number * self.config.block_size, (1, 1)), jnp.full((1, 1), beside.slots)
        visible = spans.Spans(jnp.zeros_like(before), before, own, own + self.config.block_size)
        condition_B1D = self._condition(t_B[:, None], told_BD)
        x_BRD = self._rows(noised_BRP, number * self.config.block_size)
        rotation = self._rotation(x_BRD.dtype, number * self.config.block_size, x_BRD.shape[1])
        h_BRD, _ = self._run(x_BRD, beside, condition_B1D, rotation, visible)
        return self._predicted(h_BRD, condition_B1D)

    def denoise_after(self, clean_BSP, noised_BRP, t_B, told_BD, number, cache: kv_cache.Cache):
        """The same in one pass with the clean blocks right before it, which the cache did not know.

        Args:
          clean_BSP: some whole blocks; what the cache holds of blocks from the first of them on is written anew.
          number: of the noised block.

        Returns:
          (what is predicted of the noised block [B, R, P], the cache with the clean ones).
        """
        r, s = self.config.block_size, clean_BSP.shape[1]
        start = jnp.int32(number * r - s)
        # Keys and values of the noised rows go behind those of the clean ones, where only they themselves see them; the
        # next block that is appended overwrites them. So one interval is enough for every row.
        end_S = (np.arange(s + r) // r + 1) * r
        visible = spans.Spans(jnp.zeros((1, 1), jnp.int32), start + jnp.asarray(end_S[None], jnp.int32))
        condition_B1D = self._condition(t_B[:, None], told_BD)
        x_BSD = self._rows(jnp.concatenate([clean_BSP, noised_BRP.astype(clean_BSP.dtype)], axis=1), start)
        rotation = self._rotation(x_BSD.dtype, start, s + r)
        h_BSD, cache = self._run(x_BSD, cache.replace(length=start), condition_B1D, rotation, visible)
        return self._predicted(h_BSD[:, s:], condition_B1D), cache.replace(length=start + s)

    def clean_rows(self, clean_BLP):
        """What the layers make of clean tokens [B, L, D], each block beside those before it."""
        x_BLD, r = self._rows(clean_BLP), self.config.block_size
        end_1L = (np.arange(x_BLD.shape[1], dtype=np.int32) // r + 1)[None] * r
        visible = spans.Spans(np.zeros((1, 1), np.int32), end_1L, reach=r - 1)
        return self._run(x_BLD, None, None, self._rotation(x_BLD.dtype), visible)[0]

    def _rows(self, tokens_BSP, start=None):
        """Tokens as rows [B, S, D]: all of an image or a clip, once or twice, or some from `start` on."""
        x_BSD = self.into(tokens_BSP)
        if not self.config.places:
            return x_BSD
        place_LD, rows = jnp.asarray(self.place).astype(x_BSD.dtype), x_BSD.shape[1]
        if start is not None:
            return x_BSD + jax.lax.dynamic_slice_in_dim(place_LD, start, rows)
        return x_BSD + jnp.tile(place_LD, (rows // len(place_LD), 1))

    def _run(self, x_BSD, cache, condition_BND, rotation, visible):
        first = jnp.int32(0) if self.config.scan_layers else 0
        x_BSD, _, cache = self.stack((constrain_batch(x_BSD), first, cache), condition_BND, tuple(rotation), visible)
        return x_BSD, None if cache is None else cache.advanced(x_BSD.shape[1])

    def _condition(self, t_BN, told_BD):
        condition_BND = self.time(t_BN - _STEP)
        return condition_BND if told_BD is None else condition_BND + told_BD[:, None].astype(condition_BND.dtype)

    def _predicted(self, h_BSD, condition_BND):
        h_BSD = on_noised(modulate, self.config.block_size, self.norm(h_BSD), *self.adaln(condition_BND))
        out_BSP = self.out(h_BSD)
        return out_BSP.astype(jnp.promote_types(out_BSP.dtype, jnp.float32))

    def _rotation(self, dtype, start=None, rows: int = 0):
        """(cos, sin) of all rows of an image or a clip [L, E], or of some from `start` on [rows, E]; at least fp32."""
        c = self.config
        at_LA = square_blocks.positions(self.side, c.block_size, self.frames)
        lengths = (self.frames, self.side, self.side) if self.frames else (self.side, self.side)
        tables = rope_nd.tables(at_LA, lengths, c.width // c.heads, c.rope)
        tables = [jnp.asarray(table, jnp.promote_types(dtype, jnp.float32)) for table in tables]
        return tables if start is None else [jax.lax.dynamic_slice_in_dim(t, start, rows) for t in tables]
