"""Attention over spans. The only place that turns spans into a kernel call.

Legend: B batch, H heads, G heads of keys and values, R = H / G heads of queries that share one of them, S queries,
T keys, E head dimension.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ddt_jax.mesh import position_parts
from ddt_jax.nn import spans as spans_lib
from ddt_jax.nn.attention_chunked import SAVED, attend_chunked
from ddt_jax.nn.attention_dense import attend_dense
from ddt_jax.nn.attention_mesh import spread
from ddt_jax.nn.spans import Spans

Method = Literal["auto", "dense", "chunked", "splash", "blocks"]

# From so many pairs of a query and a key on, "auto" is chunked: below, one product of matrices is faster.
CHUNKED_FROM = 1024 * 1024

# "auto" takes skip-causal rows block by block where blocks have so many rows at least, and are so many at most: the
# program grows with their number.
BLOCK_FROM, BLOCKS_MOST = 16, 16


def attend(q_BHSE, k_BGTE, v_BGTE, spans: Spans, *, soft_cap: float = 0.0, method: Method = "auto"):
    """Softmax attention; a row that sees no key gives zeros.

    Heads come before rows because batched matrix products in this layout are about twice as fast on CPU, forwards and
    backwards, as with heads behind rows.

    Args:
      q_BHSE, k_BGTE, v_BGTE: float. Where G < H, consecutive heads of queries share a head of keys and values.
      spans: which keys each query sees.
      soft_cap: c > 0 bends logits x to c tanh(x / c).
      method: "dense" holds S x T logits, "chunked" a tile of them, "splash" is a TPU's kernel, "blocks" gives each
        block of `spans.skip_causal` the keys that it sees and no others. "auto" decides by spans, S, T and whether
        this program is for TPUs: the devices of the mesh that is set, be they abstract ones, else those at hand.

    Returns:
      [B, H, S, E] in the type of v. Logits and softmax are at least fp32. The content of a key that a row does not see
      has exactly no effect on it, as long as it is finite.
    """
    b, h, s, e = q_BHSE.shape
    g, t = k_BGTE.shape[1:3]
    if h % g:
        raise ValueError(f"{h} heads of queries cannot share {g} heads of keys and values evenly")
    q_BHSE = q_BHSE * e**-0.5
    parts = position_parts(s, t)
    long = s > 1 and s // parts * t >= CHUNKED_FROM
    on_tpu = method == "auto" and long and _platform() == "tpu"
    if method == "splash" or on_tpu:
        from ddt_jax.nn import attention_tpu  # Pallas takes a second to import

        if method == "splash" or attention_tpu.fits(s // parts, t, spans):
            return attention_tpu.attend_splash(q_BHSE, k_BGTE, v_BGTE, spans, soft_cap)
    n, size = spans.blocks or (0, 0)
    if method == "blocks" and not n:
        raise ValueError("attention: method='blocks' takes the spans of skip_causal alone")
    if method == "blocks" or (method == "auto" and size >= BLOCK_FROM and n <= BLOCKS_MOST):
        out = _attend_blocks(q_BHSE.reshape(b, g, h // g, s, e), k_BGTE, v_BGTE, n, size, soft_cap)
        return checkpoint_name(out.reshape(q_BHSE.shape), SAVED)
    chunked = method == "chunked" or (method == "auto" and long)
    covers = spans.covers(t)

    def run(q_BHSE, k_BGTE, v_BGTE, spans, _):
        b, h, s, e = q_BHSE.shape
        q_BGRSE = q_BHSE.reshape(b, k_BGTE.shape[1], -1, s, e)
        if chunked:
            return attend_chunked(q_BGRSE, k_BGTE, v_BGTE, spans, soft_cap).reshape(q_BHSE.shape)
        out = attend_dense(q_BGRSE, k_BGTE, v_BGTE, None if covers else visible(spans, t), soft_cap)
        return checkpoint_name(out.reshape(q_BHSE.shape), SAVED)

    return run(q_BHSE, k_BGTE, v_BGTE, spans, None) if parts == 1 else spread(run, q_BHSE, k_BGTE, v_BGTE, spans)


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _attend_blocks(q_BGRSE, k_BGTE, v_BGTE, blocks, size, soft_cap):
    """Rows and keys of `spans.skip_causal`: (N + 1) / 4 N of the logits, and no mask."""

    def one(query, keys):
        """Rows of one block, and slices of the keys they see, of which there may be two."""
        k, v = (jnp.concatenate([x[:, :, s] for s in keys], axis=2) for x in (k_BGTE, v_BGTE))
        if size * k.shape[2] >= CHUNKED_FROM:
            return attend_chunked(q_BGRSE[:, :, :, query], k, v, spans_lib.full(k.shape[2]), soft_cap)
        return attend_dense(q_BGRSE[:, :, :, query], k, v, None, soft_cap)

    at = [slice(i * size, (i + 1) * size) for i in range(2 * blocks)]
    clean = [one(at[i], [slice(0, at[i].stop)]) for i in range(blocks)]
    noised = [one(at[blocks + i], [slice(0, at[i].start), at[blocks + i]]) for i in range(blocks)]
    return jnp.concatenate([*clean, *noised], axis=3)


def visible(spans: Spans, num_keys: int):
    """Dense mask bool [B or 1, S or 1, T]."""
    keys_T = jnp.arange(num_keys, dtype=jnp.int32)

    def inside(start, end):
        return (start[..., None] <= keys_T) & (keys_T < end[..., None])

    mask = inside(spans.start, spans.end)
    return mask if spans.start2 is None else mask | inside(spans.start2, spans.end2)
