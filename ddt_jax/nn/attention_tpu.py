"""Attention over spans on a TPU, by JAX's splash kernel.

The kernel computes its mask from one integer per row, `q_sequence`, which may be data. Two numbers of a row's spans go
into it, 16 bits each:

    one interval     (start, end)
    two intervals    (end, start2), where `Spans.second` says how long the second one is; `start` becomes a segment id

What the kernel plans ahead is a static superset of all masks: exact where the spans are known at trace time, else all
keys up to `Spans.reach` behind a row's own. Inside that it looks at every tile.

Legend: B batch, H heads, G heads of keys and values, S queries, T keys, E head dimension.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from ddt_jax import mesh as meshes
from ddt_jax.nn.attention_chunked import SAVED
from ddt_jax.nn.attention_mesh import spread
from ddt_jax.nn.spans import Spans

_LIMIT = 2**15 - 1  # keys; a field of 16 bits in a signed number
_LANES = 128


def fits(num_queries: int, num_keys: int, spans: Spans) -> bool:
    """Whether the kernel can compute this attention."""
    whole = num_queries % _LANES == 0 and num_keys % _LANES == 0 and num_keys <= _LIMIT
    return whole and (spans.start2 is None or (spans.second is not None and num_queries == num_keys))


def planned_share(num_queries: int, num_keys: int, reach: int, parts: int = 1) -> float:
    """Share of all pairs of a row and a key in whose tiles the kernel looks, where no row q sees behind q + reach.

    Args:
      parts: on as many devices are the queries.
    """
    bq, bk = _block(num_queries // parts), _block(num_keys)
    tiles = (min(-(-(end + reach) // bk), num_keys // bk) for end in range(bq, num_queries + 1, bq))
    return sum(tiles) / (num_queries // bq * (num_keys // bk))


def attend_splash(q_BHSE, k_BGTE, v_BGTE, spans: Spans, soft_cap: float, *, interpret: bool = False):
    """As `attention.attend`, with scaled queries. interpret: run without a TPU, for tests."""
    s, t = q_BHSE.shape[2], k_BGTE.shape[2]
    parts = meshes.position_parts(s, t)
    if not fits(s // parts, t, spans):
        raise ValueError(
            f"splash attention needs multiples of {_LANES} rows, at most {_LIMIT} keys and second intervals of one "
            f"known length; got {s // parts} queries and {t} keys"
        )
    bq, bk = _block(s // parts), _block(t)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([_Mask(spans, s, t)]),  # of all heads
        block_sizes=splash.BlockSizes(
            block_q=bq,
            block_kv=bk,
            block_q_dkv=bq,
            block_kv_dkv=bk,
            block_q_dq=bq,
            block_kv_dq=bk,
        ),
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=soft_cap or None,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    planned, settings = kernel.tree_flatten()
    planned = [info._replace(q_sequence=None) for info in planned]
    rows = _encoded(spans, q_BHSE.shape[0], s, t)
    return spread(functools.partial(_run, settings=settings), q_BHSE, k_BGTE, v_BGTE, rows, planned)


def _encoded(spans, b, s, t):
    """int32 [B, S] for the kernel, and the segment of each row [B, S] or None."""
    start, end = (jnp.clip(jnp.asarray(x), 0, t) for x in (spans.start, spans.end))
    if spans.start2 is None:
        code, segments = (start << 16) | end, None
    else:
        own = jnp.where(jnp.asarray(spans.end2) > spans.start2, spans.start2, _LIMIT)
        code, segments = (own << 16) | end, jnp.broadcast_to(start, (b, s))
    return jnp.broadcast_to(code, (b, s)).astype(jnp.int32), segments


class _Mask(masks.Mask):
    """A superset of the mask for planning, with the function for the kernel."""

    def __init__(self, spans, s, t):
        self._shape = (s, t)
        self._spans = spans
        self.q_sequence = np.arange(s, dtype=np.int32)  # in its place come the rows' codes
        self.mask_function = functools.partial(_seen, second=spans.second)

    @property
    def shape(self):
        return self._shape

    def __getitem__(self, index):
        rows, keys = (np.arange(n)[i] for n, i in zip(self._shape, index, strict=True))
        bounds = [self._spans.start, self._spans.end, self._spans.start2, self._spans.end2]
        if all(x is None or isinstance(x, np.ndarray) for x in bounds):
            start, end, *second = (
                np.broadcast_to(x, (x.shape[0], self._shape[0]))[:, rows, None] for x in bounds if x is not None
            )
            seen = (start <= keys) & (keys < end)
            return (seen | (second[0] <= keys) & (keys < second[1]) if second else seen).any(0)
        reach = self._shape[1] if self._spans.reach is None else self._spans.reach
        return keys <= rows[:, None] + reach


def _seen(code, keys, second):
    high, low = code >> 16, code & 0xFFFF
    if second is None:
        return (high <= keys) & (keys < low)
    return (keys < low) | ((high <= keys) & (keys < high + second))


def _block(n):
    return next(size for size in (512, 256, _LANES) if n % size == 0)


def _run(q_BHSE, k_BGTE, v_BGTE, rows, planned, *, settings):
    def one(q, k, v, code, segment):
        infos = (info._replace(q_sequence=code) for info in planned)
        ids = None if segment is None else splash.SegmentIds(segment, segment)
        return splash.SplashAttentionKernel(*infos, **settings)(q, k, v, ids)

    code_BS, segments = rows
    out_BHSE = jax.vmap(one)(q_BHSE, k_BGTE, v_BGTE, code_BS, segments)
    # Of a row that sees nothing the kernel makes an average of what it looked at.
    high, low = code_BS >> 16, code_BS & 0xFFFF
    some_BS = (high < low) if segments is None else (segments < low) | (high < _LIMIT)
    return jnp.where(some_BS[:, None, :, None], out_BHSE, 0).astype(v_BGTE.dtype)
