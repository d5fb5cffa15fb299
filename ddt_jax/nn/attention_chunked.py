"""Attention over spans by tiles: chunks of queries against chunks of keys, softmax as it goes, S x T never held.

Forwards keeps the output and one number per row, from which backwards computes each tile again (FlashAttention-2,
arXiv 2307.08691). A tile in which no row sees a key is skipped. Which ones are is found before the loops, for the whole
batch at once: a loop's length must be the same on every device.

Legend: B batch, G heads of keys and values, R queries' heads that share one, S queries, T keys, E head dimension,
C queries of a chunk, D keys of a chunk, M chunks of queries, N chunks of keys, 4 bounds (start, end, start2, end2).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ddt_jax.nn.spans import Spans

# Of queries and keys. 256 and 512 were as fast on CPU; a tile's logits are B H x 512 x 512.
CHUNK = 512
SAVED = "attention"  # what a remat policy keeps, so that attention is not computed a third time


def attend_chunked(q_BGRSE, k_BGTE, v_BGTE, spans: Spans, soft_cap: float, chunk: int = CHUNK):
    """As `attention.attend`, with scaled queries in groups; [B, G, R, S, E] in the type of v."""
    s, t = q_BGRSE.shape[3], k_BGTE.shape[2]
    c, d = min(chunk, s), min(chunk, t)
    bounds_4BS = _bounds(spans, s, t)
    padded_q, bounds_4BS = (_pad(x, axis, c) for x, axis in ((q_BGRSE, 3), (bounds_4BS, 2)))  # padding sees nothing
    padded_k, padded_v = (_pad(x, 2, d) for x in (k_BGTE, v_BGTE))  # no row sees padding
    schedule = _schedule(bounds_4BS, c, d, padded_k.shape[2] // d)
    return _attend(padded_q, padded_k, padded_v, bounds_4BS, schedule, soft_cap, (c, d))[:, :, :, :s]


def _bounds(spans, s, t):
    """int32 [4, B or 1, S], ends at most T."""
    parts = [spans.start, spans.end]
    parts += [jnp.zeros((1, 1), jnp.int32)] * 2 if spans.start2 is None else [spans.start2, spans.end2]
    parts = [jnp.clip(jnp.asarray(x), 0, t) for x in parts]
    shape = jnp.broadcast_shapes(*(x.shape for x in parts))
    return jnp.stack([jnp.broadcast_to(x, (shape[0], s)) for x in parts])


def _pad(x, axis, multiple):
    extra = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)]) if extra else x


def _schedule(bounds_4BS, c, d, n):
    """For each chunk of queries, the chunks of keys that are needed, first, and how many these are: [M, N], [M]."""
    b, s = bounds_4BS.shape[1:]
    start, end, start2, end2 = bounds_4BS.reshape(4, b, s // c, c, 1)
    left = jnp.arange(n, dtype=jnp.int32) * d

    def meets(start, end):
        return (start < left + d) & (left < end) & (start < end)

    needed_MN = jnp.any(meets(start, end) | meets(start2, end2), axis=(0, 2))
    return jnp.argsort(~needed_MN, axis=1, stable=True).astype(jnp.int32), needed_MN.sum(1, dtype=jnp.int32)


def _rows(x, i, c, axis):
    return jax.lax.dynamic_slice_in_dim(x, i * c, c, axis)


def _tile(q_BGQE, k_BGDE, bounds_4BC, j, soft_cap):
    """Logits of a tile in at least fp32 and which of them are seen; [B, G, R, C, D] and [B, 1, 1, C, D]."""
    wide = jnp.promote_types(q_BGQE.dtype, jnp.float32)
    b, g, rows, _ = q_BGQE.shape
    c, d = bounds_4BC.shape[2], k_BGDE.shape[2]
    logits = jnp.matmul(q_BGQE, k_BGDE.swapaxes(-1, -2), preferred_element_type=wide).reshape(b, g, rows // c, c, d)
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    keys = j * d + jnp.arange(d, dtype=jnp.int32)
    start, end, start2, end2 = bounds_4BC[..., None]
    seen = ((start <= keys) & (keys < end)) | ((start2 <= keys) & (keys < end2))
    return logits, seen[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, bounds_4BS, schedule, soft_cap, sizes):
    return _forward(q, k, v, bounds_4BS, schedule, soft_cap, sizes)[0]


def _forward(q_BGRSE, k_BGTE, v_BGTE, bounds_4BS, schedule, soft_cap, sizes):
    """The output, and the logarithm of each row's sum of exponentials [B, G, R, S]; 0 where a row sees nothing."""
    (b, g, r, s, e), (c, d) = q_BGRSE.shape, sizes
    wide = jnp.promote_types(q_BGRSE.dtype, jnp.float32)
    order_MN, count_M = schedule

    def one_chunk(i):
        q_BGQE = _rows(q_BGRSE, i, c, 3).reshape(b, g, r * c, e)
        bounds = _rows(bounds_4BS, i, c, 2)

        def one_tile(n, carry):
            peak, total, out = carry
            j = order_MN[i, n]
            logits, seen = _tile(q_BGQE, _rows(k_BGTE, j, d, 2), bounds, j, soft_cap)
            higher = jnp.maximum(peak, jnp.max(logits, axis=-1, where=seen, initial=-1e30))
            weights = jnp.exp(jnp.where(seen, logits - higher[..., None], -jnp.inf))
            shrink = jnp.exp(peak - higher)
            v_BGDE = _rows(v_BGTE, j, d, 2)
            more = jnp.matmul(weights.reshape(b, g, r * c, d).astype(v_BGDE.dtype), v_BGDE, preferred_element_type=wide)
            out = out * shrink[..., None] + more.reshape(b, g, r, c, e)
            return higher, total * shrink + weights.sum(-1), out

        rows = (b, g, r, c)
        start = (jnp.full(rows, -1e30, wide), jnp.zeros(rows, wide), jnp.zeros((*rows, e), wide))
        peak, total, out = jax.lax.fori_loop(0, count_M[i], one_tile, start)
        some = jnp.where(total > 0, total, 1)
        log_total = jnp.where(total > 0, peak + jnp.log(some), 0)
        return (out / some[..., None]).astype(v_BGTE.dtype), log_total

    out, log_total = jax.lax.map(one_chunk, jnp.arange(s // c))
    return _joined(out), _joined(log_total)


def _joined(x_MBGRC):
    """Chunks [M, B, G, R, C, ...] → rows [B, G, R, S, ...]."""
    x = jnp.moveaxis(x_MBGRC, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _save(q, k, v, bounds_4BS, schedule, soft_cap, sizes):
    out, log_total = _forward(q, k, v, bounds_4BS, schedule, soft_cap, sizes)
    out, log_total = checkpoint_name(out, SAVED), checkpoint_name(log_total, SAVED)
    return out, (q, k, v, bounds_4BS, schedule, out, log_total)


def _backward(soft_cap, sizes, saved, d_out):
    q_BGRSE, k_BGTE, v_BGTE, bounds_4BS, (order_MN, count_M), out, log_total = saved
    (b, g, r, s, e), (c, d) = q_BGRSE.shape, sizes
    wide = log_total.dtype
    # What the softmax takes off every gradient of a row's logits.
    mean_BGRS = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)

    def one_chunk(carry, i):
        q_BGQE, d_out_BGQE = (_rows(x, i, c, 3).reshape(b, g, r * c, e) for x in (q_BGRSE, d_out))
        bounds = _rows(bounds_4BS, i, c, 2)
        log_total_C, mean_C = (_rows(x, i, c, 3)[..., None] for x in (log_total, mean_BGRS))

        def one_tile(n, carry):
            d_q, d_k, d_v = carry
            j = order_MN[i, n]
            k_BGDE, v_BGDE = _rows(k_BGTE, j, d, 2), _rows(v_BGTE, j, d, 2)
            logits, seen = _tile(q_BGQE, k_BGDE, bounds, j, soft_cap)
            weights = jnp.exp(jnp.where(seen, logits - log_total_C, -jnp.inf))
            d_weights = jnp.matmul(d_out_BGQE, v_BGDE.swapaxes(-1, -2), preferred_element_type=wide)
            d_logits = weights * (d_weights.reshape(weights.shape) - mean_C)
            if soft_cap:
                d_logits = d_logits * (1 - jnp.square(logits / soft_cap))
            flat = lambda x, like: x.reshape(b, g, r * c, d).astype(like.dtype)  # noqa: E731
            weights, d_logits = flat(weights, v_BGDE), flat(d_logits, q_BGQE)
            d_q = d_q + jnp.matmul(d_logits, k_BGDE, preferred_element_type=wide)
            d_k = _add(d_k, jnp.matmul(d_logits.swapaxes(-1, -2), q_BGQE, preferred_element_type=wide), j * d)
            d_v = _add(d_v, jnp.matmul(weights.swapaxes(-1, -2), d_out_BGQE, preferred_element_type=wide), j * d)
            return d_q, d_k, d_v

        start = (jnp.zeros((b, g, r * c, e), wide), *carry)
        d_q, *carry = jax.lax.fori_loop(0, count_M[i], one_tile, start)
        return tuple(carry), d_q.reshape(b, g, r, c, e).astype(q_BGRSE.dtype)

    zeros = (jnp.zeros(k_BGTE.shape, wide), jnp.zeros(v_BGTE.shape, wide))
    (d_k, d_v), d_q = jax.lax.scan(one_chunk, zeros, jnp.arange(s // c))
    return _joined(d_q), d_k.astype(k_BGTE.dtype), d_v.astype(v_BGTE.dtype), None, None


def _add(total, part, at):
    """total with part added to its rows from `at` on."""
    rows = jax.lax.dynamic_slice_in_dim(total, at, part.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(total, rows + part, at, 2)


_attend.defvjp(_save, _backward)
