"""The network of ACDiT (arXiv 2412.07720 §4.2, §4.5, appendix B): clean blocks of an image, then their noised copies.

A DiT with RMS norms. Noised tokens are modulated by the noise level of their block and the label (adaLN-zero, with
gates); clean ones go the plain pre-norm way through the same weights and are told neither. So what a clean block gives
to later ones depends on its pixels alone, and a cache of it serves every noise level and label.

Legend: B batch, N blocks, R tokens of a block, L = N R tokens of an image, S rows, P values of a token, D width,
E head dimension.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.mesh import constrain_batch
from ddt_jax.nn import kv_cache, rope_nd, spans, square_blocks
from ddt_jax.nn.attention import attend
from ddt_jax.nn.blocks import HeadMerge, HeadProjection, Modulation, Stack, modulate
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
      side: tokens of a side of the image.
      values: P.
    """

    config: settings.ACDiT
    side: int
    values: int

    def setup(self):
        c, dtype = self.config, compute_dtype(self.config.dtype)
        self.into = Dense((c.width,), ("patch", "embed"), use_bias=False, dtype=dtype)
        self.time = TimeEmbedding(c.width, dtype, sinusoids=_SINUSOIDS)
        if c.classes:
            self.labels = learned(self, "label", c.classes + 1, c.width)  # the last one: no label
        make = functools.partial(Block, c.heads, c.block_size, c.mlp_ratio, dtype)
        self.stack = Stack(make, c.depth, c.scan_layers, c.remat)
        self.norm = RMSNorm(axis="embed")
        self.adaln = Modulation(2, dtype)
        self.out = zeros_dense((self.values,), ("embed", "patch"), dtype=dtype)

    def __call__(self, clean_BLP, noised_BLP, t_BN, label_B):
        """What is predicted of every noised block, beside the clean ones before it.

        Args:
          t_BN: noise level of each block.
          label_B: int32 in [0, classes], `classes` for none; not looked at where there are no classes.

        Returns:
          [B, L, P], at least fp32.
        """
        blocks = t_BN.shape[1]
        x_BSD = self.into(jnp.concatenate([clean_BLP, noised_BLP.astype(clean_BLP.dtype)], axis=1))
        rotation = [jnp.concatenate([table, table]) for table in self._rotation(x_BSD.dtype)]
        condition_BND = self._condition(t_BN, label_B)
        visible = spans.skip_causal(blocks, self.config.block_size)
        h_BSD, _ = self._run(x_BSD, None, condition_BND, rotation, visible)
        return self._predicted(h_BSD[:, clean_BLP.shape[1] :], condition_BND)

    def denoise(self, noised_BRP, t_B, label_B, number, cache: kv_cache.Cache):
        """What is predicted of one noised block beside a cache of all clean ones before it, which stays as it is.

        Args:
          number: of the block, int32 scalar.

        Returns:
          [B, R, P], at least fp32.
        """
        beside = kv_cache.Beside(cache)
        before, own = jnp.reshape(number * self.config.block_size, (1, 1)), jnp.full((1, 1), beside.slots)
        visible = spans.Spans(jnp.zeros_like(before), before, own, own + self.config.block_size)
        condition_B1D = self._condition(t_B[:, None], label_B)
        x_BRD = self.into(noised_BRP)
        h_BRD, _ = self._run(x_BRD, beside, condition_B1D, self._rotation(x_BRD.dtype, number), visible)
        return self._predicted(h_BRD, condition_B1D)

    def commit(self, clean_BRP, number, cache: kv_cache.Cache) -> kv_cache.Cache:
        """The cache with one more clean block, whose number says where it lies."""
        start = jnp.int32(number * self.config.block_size)
        visible = spans.Spans(jnp.zeros((1, 1), jnp.int32), jnp.reshape(start + self.config.block_size, (1, 1)))
        x_BRD = self.into(clean_BRP)
        cache = cache.replace(length=start)
        return self._run(x_BRD, cache, None, self._rotation(x_BRD.dtype, number), visible)[1]

    def _run(self, x_BSD, cache, condition_BND, rotation, visible):
        first = jnp.int32(0) if self.config.scan_layers else 0
        x_BSD, _, cache = self.stack((constrain_batch(x_BSD), first, cache), condition_BND, tuple(rotation), visible)
        return x_BSD, None if cache is None else cache.advanced(x_BSD.shape[1])

    def _condition(self, t_BN, label_B):
        condition_BND = self.time(t_BN - _STEP)
        if not self.config.classes:
            return condition_BND
        return condition_BND + jnp.asarray(self.labels)[label_B][:, None].astype(condition_BND.dtype)

    def _predicted(self, h_BSD, condition_BND):
        h_BSD = on_noised(modulate, self.config.block_size, self.norm(h_BSD), *self.adaln(condition_BND))
        out_BSP = self.out(h_BSD)
        return out_BSP.astype(jnp.promote_types(out_BSP.dtype, jnp.float32))

    def _rotation(self, dtype, number=None):
        """(cos, sin) of the rows of an image [L, E], or of one block [R, E]; at least fp32."""
        c = self.config
        at_L2 = square_blocks.positions(self.side, c.block_size)
        tables = rope_nd.tables(at_L2, (self.side, self.side), c.width // c.heads, c.rope)
        tables = [jnp.asarray(table, jnp.promote_types(dtype, jnp.float32)) for table in tables]
        if number is None:
            return tables
        return [jax.lax.dynamic_slice_in_dim(t, number * c.block_size, c.block_size) for t in tables]
