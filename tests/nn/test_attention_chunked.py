"""Attention by tiles equals dense attention, forwards and backwards, and needs memory that grows like S."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax.nn import spans
from ddt_jax.nn.attention import attend
from ddt_jax.nn.attention_chunked import attend_chunked

B, G, R, S, E = 2, 2, 2, 21, 4
CHUNK = 8  # does not divide S
DOCUMENT = np.repeat(np.array([[0, 9], [0, 13]], np.int32), [13, 8], axis=1)
IMAGE_END = np.zeros((B, S), np.int32)
IMAGE_END[0, 2:9], IMAGE_END[1, 14:20] = 9, 20

CASES = {
    "full": spans.full(S),
    "packed": spans.causal(S, start=DOCUMENT),
    "images": spans.bidirectional(jnp.asarray(IMAGE_END), start=DOCUMENT),
    "two intervals": spans.Spans(
        jnp.array([[0], [3]]), jnp.array([[4], [3]]), jnp.full((1, 1), 10), jnp.arange(S, dtype=jnp.int32)[None] + 1
    ),
    "prefix, nothing in one example": spans.key_prefix(jnp.array([11, 0])),
    "ends behind the last key": spans.key_prefix(jnp.array([S + 9, 5])),
}


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(B, heads, S, E)).astype(dtype) for heads in (G * R, G, G))


def chunked(q, k, v, visible, soft_cap=0.0):
    q = (q * E**-0.5).reshape(B, G, R, S, E)
    return attend_chunked(q, k, v, visible, soft_cap, CHUNK).reshape(B, G * R, S, E)


@pytest.mark.parametrize("soft_cap", [0.0, 1.5])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_forwards_and_backwards(name, soft_cap):
    def outcome(attention):
        def loss(*qkv):
            out = attention(*qkv)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs())

    dense = outcome(lambda *qkv: attend(*qkv, CASES[name], soft_cap=soft_cap, method="dense"))
    ours = outcome(lambda *qkv: chunked(*qkv, CASES[name], soft_cap))
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_row_that_sees_nothing_gives_zeros_without_gradient():
    nothing = spans.key_prefix(jnp.array([S, 0]))
    out, pullback = jax.vjp(lambda *qkv: chunked(*qkv, nothing), *inputs())
    np.testing.assert_array_equal(out[1], 0)
    for gradient in pullback(jnp.ones_like(out)):
        np.testing.assert_array_equal(gradient[1], 0)
        assert np.isfinite(gradient).all()


def test_hidden_keys_have_no_effect_at_all():
    q, k, v = inputs()
    few = spans.key_prefix(jnp.array([10, 10]))
    changed_k, changed_v = k.copy(), v.copy()
    changed_k[:, :, 10:], changed_v[:, :, 10:] = 1e9, -1e9
    np.testing.assert_array_equal(chunked(q, k, v, few), chunked(q, changed_k, changed_v, few))


def test_big_logits_do_not_overflow():
    q, k, v = inputs()
    gradients = jax.grad(lambda q: jnp.sum(chunked(q, k, v, spans.causal(S))))(1e4 * q)
    assert np.isfinite(gradients).all()


def test_softmax_is_fp32_for_bf16_inputs():
    q, k, v = inputs(jnp.bfloat16)
    out = chunked(q, k, v, spans.causal(S))
    assert out.dtype == jnp.bfloat16
    text = str(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(chunked(q, k, v, spans.causal(S)))))(q))
    assert " exp " in text and not [line for line in text.splitlines() if " exp " in line and "bf16" in line]


def test_attention_that_a_policy_keeps_is_not_computed_again():
    policy = jax.checkpoint_policies.save_only_these_names("attention")

    def loops(policy):
        again = jax.checkpoint(lambda q, k, v: jnp.sin(chunked(q, k, v, CASES["packed"])), policy=policy)
        text = str(jax.make_jaxpr(jax.grad(lambda *qkv: jnp.sum(again(*qkv))))(*inputs()))
        return text.count("while[")

    assert loops(policy) == 2 and loops(None) == 3


def test_memory_grows_like_s_and_stays_below_dense():
    def temporary(s, method):
        q, k = (jax.ShapeDtypeStruct((1, heads, s, 8), jnp.float32) for heads in (4, 2))
        loss = lambda q, k, v: jnp.sum(attend(q, k, v, spans.causal(s), method=method))  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    at = {s: temporary(s, "auto") for s in (2048, 4096, 8192)}
    assert at[8192] - at[4096] < 2.2 * (at[4096] - at[2048])  # a constant for the tile, then so much per row
    assert at[8192] < temporary(8192, "dense") / 20
