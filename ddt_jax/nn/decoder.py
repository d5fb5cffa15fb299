"""The decoder block of LLaMA-3 (arXiv 2407.21783): RMS norms, rotary grouped-query attention, SwiGLU, no biases.

Legend: B batch, S sequence, R of its rows, D width, H heads, G heads of keys and values, E head dimension.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn.attention import attend
from ddt_jax.nn.layers import Dense, RMSNorm
from ddt_jax.nn.rope import rotate

_TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
_UPDATES = 1 << 20  # numbers of keys of what low-rank updates read, behind those of the residual stream


def head_dim(c: settings.Transformer) -> int:
    return c.head_dim or c.width // c.heads


class DecoderBlock(nn.Module):
    """The carry is (x [B, S, D], number of the layer, Cache or None). Given rows, it leaves x [B, R, D] of them."""

    config: settings.Transformer
    dtype: Any = None

    @nn.compact
    def __call__(self, carry, rotation, spans, keys_B, rows_BR=None):
        """Args:
        rotation: of `rope.rotation`.
        spans: over the cache's slots if there is one.
        keys_B: for dropout, or None.
        rows_BR: int32, rows whose outputs are wanted, the others being there to be seen; None: all.
        """
        c = self.config
        x_BSD, layer, cache = carry
        e = head_dim(c)
        norm = self._norm("attention_norm", "embed")
        h_BSD = wanted_BSD = norm(x_BSD)
        wanted = rotation
        if rows_BR is not None:
            x_BSD, spans = jnp.take_along_axis(x_BSD, rows_BR[..., None], axis=1), spans.of_rows(rows_BR)
            wanted_BSD = norm(x_BSD)
            wanted = [jnp.take_along_axis(part, rows_BR[:, None, :, None], axis=2) for part in rotation]
        into = {"matrix": ((-3,), (-2, -1)), "dropping": (keys_B, layer)}
        q = self._linear("query", wanted_BSD, (c.heads, e), ("embed", "heads", "head_dim"), **into).swapaxes(1, 2)
        k = self._linear("key", h_BSD, (c.kv_heads, e), ("embed", "kv_heads", "head_dim"), **into).swapaxes(1, 2)
        v = self._linear("value", h_BSD, (c.kv_heads, e), ("embed", "kv_heads", "head_dim"), **into).swapaxes(1, 2)
        if c.qk_norm:
            q, k = self._norm("query_norm", "head_dim")(q), self._norm("key_norm", "head_dim")(k)
        q, k = rotate(q, wanted), rotate(k, rotation)
        if cache is not None:
            cache, k, v = cache.write(layer, k, v)
        y_BHSE = attend(
            q, k.astype(q.dtype), v.astype(q.dtype), spans, soft_cap=c.attention_soft_cap, method=c.attention
        )
        out = {"inputs": 2, "matrix": ((-3, -2), (-1,)), "kernel_init": self._small(2), "dropping": (keys_B, layer)}
        y_BSHE = y_BHSE.swapaxes(1, 2)
        y_BSD = self._linear("output", y_BSHE, (c.width,), ("heads", "head_dim", "embed"), **out)
        x_BSD = x_BSD + self._dropped(y_BSD, keys_B, 2 * layer)

        h_BSD = self._norm("mlp_norm", "embed")(x_BSD)
        flat = {"matrix": ((-2,), (-1,)), "dropping": (keys_B, layer)}
        gate = self._linear("gate", h_BSD, (c.mlp_width,), ("embed", "mlp"), **flat)
        h = nn.silu(gate) * self._linear("up", h_BSD, (c.mlp_width,), ("embed", "mlp"), **flat)
        y_BSD = self._linear("down", h, (c.width,), ("mlp", "embed"), kernel_init=self._small(1), **flat)
        return x_BSD + self._dropped(y_BSD, keys_B, 2 * layer + 1), layer + 1, cache

    def _linear(self, name, x, features, axes, dropping, **how):
        """dropping: (keys [B] or None, number of the layer), for what an update reads."""
        lora = self.config.lora if name in self.config.lora.targets else None
        keys_B, layer = dropping
        updated = None
        if lora and lora.rank and lora.dropout and keys_B is not None:
            number = _UPDATES + layer * len(_TARGETS) + _TARGETS.index(name)
            updated = _without_some(x, keys_B, number, lora.dropout)
        return Dense(features, axes, use_bias=False, dtype=self.dtype, lora=lora, name=name, **how)(x, updated)

    def _norm(self, name, axis):
        return RMSNorm(axis=axis, epsilon=self.config.norm_epsilon, name=name)

    def _small(self, inputs):
        """What is added to the residual stream starts so small that its variance does not grow with depth (GPT-2)."""
        return nn.initializers.variance_scaling(
            0.5 / self.config.depth, "fan_in", "truncated_normal", in_axis=tuple(range(inputs)), out_axis=-1
        )

    def _dropped(self, y_BSD, keys_B, part):
        rate = self.config.dropout
        return y_BSD if keys_B is None or not rate else _without_some(y_BSD, keys_B, part, rate)


def _without_some(x, keys_B, number, rate: float):
    """x [B, ...] without a random share of its elements, the others so much larger. number: of this place's key."""

    def keep(key):
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys_B), x / (1 - rate), 0)
