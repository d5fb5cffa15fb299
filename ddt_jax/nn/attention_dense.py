"""Attention with all of a layer's logits held at once: one product of matrices, for short sequences.

What softmax does is linear in its exponentials but for one number per row, the sum that they are divided by. So the
division is left to the output, which has E numbers per row where the weights have T, and backwards takes what the
logits of a row share from the output as well (FlashAttention-2, arXiv 2307.08691, §2.3.2). On CPUs a pass over S x T
numbers costs as much as a product does; this takes 4 % off a step of `configs/llama_scenes.py`.

Legend: B batch, G heads of keys and values, R queries' heads that share one, S queries, T keys, E head dimension,
Q = R S rows of queries that share keys.
"""

import functools

import jax
import jax.numpy as jnp

HIDDEN = -1e30  # a logit far below all others, whose exponential is exactly 0


def attend_dense(q_BGRSE, k_BGTE, v_BGTE, seen_BST, soft_cap: float):
    """As `attention.attend`, with scaled queries in groups; [B, G, R, S, E] in the type of v.

    Args:
      seen_BST: bool [B or 1, S or 1, T], which keys each query sees; None: all.
    """
    b, g, r, s, e = q_BGRSE.shape
    # The heads that share keys are rows of one product, so that nothing is repeated.
    out_BGQE = _attend(q_BGRSE.reshape(b, g, r * s, e), k_BGTE, v_BGTE, seen_BST, r, soft_cap)
    return out_BGQE.reshape(b, g, r, s, e)


def _logits(q_BGQE, k_BGTE, soft_cap):
    """At least fp32 [B, G, Q, T]."""
    wide = jnp.promote_types(q_BGQE.dtype, jnp.float32)
    logits_BGQT = jnp.matmul(q_BGQE, k_BGTE.swapaxes(-1, -2), preferred_element_type=wide)
    return soft_cap * jnp.tanh(logits_BGQT / soft_cap) if soft_cap else logits_BGQT


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, seen, heads, soft_cap):
    return _forward(q, k, v, seen, heads, soft_cap)[0]


def _forward(q_BGQE, k_BGTE, v_BGTE, seen_BST, heads, soft_cap):
    logits_BGQT = _logits(q_BGQE, k_BGTE, soft_cap)
    wide = logits_BGQT.dtype
    if seen_BST is not None:
        b, g, rows, t = logits_BGQT.shape
        by_head = logits_BGQT.reshape(b, g, heads, rows // heads, t)
        logits_BGQT = jnp.where(seen_BST[:, None, None], by_head, HIDDEN).reshape(logits_BGQT.shape)
    # A row that sees nothing has this as its peak, so that its exponentials, too, are 0.
    peak_BGQ1 = jnp.max(logits_BGQT, axis=-1, keepdims=True, initial=HIDDEN / 2)
    powers_BGQT = jnp.exp(logits_BGQT - peak_BGQ1)
    total_BGQ1 = jnp.sum(powers_BGQT, axis=-1, keepdims=True)
    share_BGQ1 = 1 / jnp.where(total_BGQ1 > 0, total_BGQ1, 1)
    summed_BGQE = jnp.matmul(powers_BGQT.astype(v_BGTE.dtype), v_BGTE, preferred_element_type=wide)
    out_BGQE = (summed_BGQE * share_BGQ1).astype(v_BGTE.dtype)
    return out_BGQE, (q_BGQE, k_BGTE, v_BGTE, powers_BGQT, share_BGQ1, out_BGQE)


def _backward(heads, soft_cap, saved, d_out_BGQE):
    q_BGQE, k_BGTE, v_BGTE, powers_BGQT, share_BGQ1, out_BGQE = saved
    wide = powers_BGQT.dtype
    scaled_BGQE = d_out_BGQE.astype(wide) * share_BGQ1
    shared_BGQ1 = jnp.sum(scaled_BGQE * out_BGQE.astype(wide), axis=-1, keepdims=True)
    scaled_BGQE = scaled_BGQE.astype(v_BGTE.dtype)
    d_v_BGTE = _product(powers_BGQT.swapaxes(-1, -2).astype(v_BGTE.dtype), scaled_BGQE, v_BGTE)
    d_weights_BGQT = jnp.matmul(scaled_BGQE, v_BGTE.swapaxes(-1, -2), preferred_element_type=wide)
    d_logits_BGQT = powers_BGQT * (d_weights_BGQT - shared_BGQ1)
    if soft_cap:
        d_logits_BGQT = d_logits_BGQT * (1 - jnp.square(_logits(q_BGQE, k_BGTE, soft_cap) / soft_cap))
    d_logits_BGQT = d_logits_BGQT.astype(q_BGQE.dtype)
    d_q_BGQE = _product(d_logits_BGQT, k_BGTE, q_BGQE)
    return d_q_BGQE, _product(d_logits_BGQT.swapaxes(-1, -2), q_BGQE, k_BGTE), d_v_BGTE, None


def _product(a, b, like):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.matmul(a, b, preferred_element_type=wide).astype(like.dtype)


_attend.defvjp(_forward, _backward)
