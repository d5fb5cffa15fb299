"""Attention over spans. The only place that turns spans into a kernel call.

Legend: B batch, H heads, S queries, T keys, E head dimension.
"""

import jax
import jax.numpy as jnp

from ddt_jax.nn.spans import Spans


def attend(q_BHSE, k_BHTE, v_BHTE, spans: Spans):
    """Softmax attention; a row that sees no key gives zeros.

    Heads come before rows because batched matrix products in this layout are about twice as fast on CPU, forwards and
    backwards, as with heads behind rows.

    Args:
      q_BHSE, k_BHTE, v_BHTE: float.
      spans: which keys each query sees.

    Returns:
      [B, H, S, E] in the type of v. Logits and softmax are at least fp32. The content of a key that a row does not see
      has exactly no effect on it, as long as it is finite.
    """
    wide = jnp.promote_types(q_BHSE.dtype, jnp.float32)
    q_BHSE = q_BHSE * q_BHSE.shape[-1] ** -0.5
    logits_BHST = jnp.matmul(q_BHSE, k_BHTE.swapaxes(-1, -2), preferred_element_type=wide)
    if spans.covers(k_BHTE.shape[2]):
        return jnp.matmul(jax.nn.softmax(logits_BHST).astype(v_BHTE.dtype), v_BHTE)
    visible_BHST = visible(spans, k_BHTE.shape[2])[:, None]
    peak_BHS1 = jnp.max(logits_BHST, axis=-1, keepdims=True, where=visible_BHST, initial=-1e30)
    weights_BHST = jnp.exp(jnp.where(visible_BHST, logits_BHST - jax.lax.stop_gradient(peak_BHS1), -jnp.inf))
    total_BHS1 = jnp.sum(weights_BHST, axis=-1, keepdims=True)
    weights_BHST = weights_BHST / jnp.where(total_BHS1 > 0, total_BHS1, 1)
    return jnp.matmul(weights_BHST.astype(v_BHTE.dtype), v_BHTE)


def visible(spans: Spans, num_keys: int):
    """Dense mask bool [B or 1, S or 1, T]."""
    keys_T = jnp.arange(num_keys, dtype=jnp.int32)

    def inside(start, end):
        return (start[..., None] <= keys_T) & (keys_T < end[..., None])

    mask = inside(spans.start, spans.end)
    return mask if spans.start2 is None else mask | inside(spans.start2, spans.end2)
