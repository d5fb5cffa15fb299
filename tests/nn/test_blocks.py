"""Blocks: identity at the start, hidden tokens without effect, scanned equal to unrolled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax.nn import blocks, params, spans

B, K, N, D, HEADS = 2, 3, 4, 8, 2


def noisy(module, *args):
    """Random parameters, away from the zeros of adaLN-zero, without compiling the initializers."""
    rng = np.random.default_rng(7)
    shapes = declared_shapes(module, *args)[0]
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


def declared_shapes(module, *args):
    return params.split(jax.eval_shape(module.init, jax.random.key(0), *args)["params"])


def apply(module, values, *args):
    return jax.jit(lambda values, args: module.apply({"params": values}, *args))(values, args)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    x, tokens = rng.normal(size=(B, N, D)), rng.normal(size=(B, K, D))
    return (
        jnp.asarray(x, jnp.float32),
        jnp.asarray(tokens, jnp.float32),
        jnp.asarray(rng.normal(size=(B, D)), jnp.float32),
    )


VISIBLE = spans.tokens_and_patches(jnp.zeros(B, jnp.int32), jnp.array([1, 2]), K, N)


def init(module, *args):
    return params.split(jax.jit(module.init)(jax.random.key(0), *args)["params"])[0]


def test_adaln_zero_blocks_are_the_identity_at_first():
    x, tokens, condition = inputs()
    cross = blocks.CrossBlock(HEADS)
    args = (x, tokens, condition, VISIBLE)
    np.testing.assert_array_equal(apply(cross, init(cross, *args), *args), x)
    joint = blocks.JointBlock(HEADS)
    args = ((tokens, x), tokens, condition, VISIBLE)
    got = apply(joint, init(joint, *args), *args)
    np.testing.assert_array_equal(got[0], tokens)
    np.testing.assert_array_equal(got[1], x)


def test_what_a_hidden_token_holds_changes_no_patch():
    x, tokens, condition = inputs()
    other = tokens.at[0, 1:].set(100.0).at[1, 2:].set(-100.0)
    cross = blocks.CrossBlock(HEADS)
    values = noisy(cross, x, tokens, condition, VISIBLE)
    a, b = (apply(cross, values, x, t, condition, VISIBLE) for t in (tokens, other))
    np.testing.assert_array_equal(a, b)
    seen = apply(cross, values, x, tokens.at[:, 0].add(1.0), condition, VISIBLE)
    assert np.abs(seen - a).max() > 1e-3

    joint = blocks.JointBlock(HEADS)
    condition_tokens = jnp.ones((1, K, D))
    values = noisy(joint, (tokens, x), condition_tokens, condition, VISIBLE)
    a, b = (apply(joint, values, (t, x), condition_tokens, condition, VISIBLE) for t in (tokens, other))
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_array_equal(a[0][0, :1], b[0][0, :1])  # nor a visible token


def test_pre_only_passes_tokens_unchanged_and_has_no_idle_weights():
    x, tokens, condition = inputs()
    last = blocks.JointBlock(HEADS, pre_only=True)
    args = ((tokens, x), tokens, condition, VISIBLE)
    values = noisy(last, *args)
    got = apply(last, values, *args)
    np.testing.assert_array_equal(got[0], tokens)
    gradients = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(apply(last, v, *args)[1]))))(values)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients)) > 0


def encoder_case():
    make = functools.partial(blocks.EncoderBlock, HEADS)
    return make, (inputs()[0], spans.full(N))


def cross_case():
    x, tokens, condition = inputs()
    return functools.partial(blocks.CrossBlock, HEADS), (x, tokens, condition, VISIBLE)


def joint_case():
    x, tokens, condition = inputs()
    return functools.partial(blocks.JointBlock, HEADS), ((tokens, x), tokens, condition, VISIBLE)


@pytest.mark.parametrize("case", [encoder_case, cross_case, joint_case])
def test_scanned_equals_unrolled_and_converts_both_ways(case):
    make, args = case()
    loose, tight = blocks.Stack(make, 3), blocks.Stack(make, 3, scan=True)
    values = noisy(loose, *args)
    stacked = blocks.scanned(values)
    own, declarations = declared_shapes(tight, *args)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, stacked)
    assert all(d.axes[0] == params.LAYERS for d in jax.tree.leaves(declarations))
    for a, b in zip(
        jax.tree.leaves(apply(loose, values, *args)),
        jax.tree.leaves(apply(tight, stacked, *args)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, blocks.unrolled(stacked), values)


@pytest.mark.parametrize("scan", [False, True])
def test_blocks_that_are_computed_again_have_the_same_gradients_and_keep_less(scan):
    make, args = encoder_case()
    kept, again = blocks.Stack(make, 3, scan), blocks.Stack(make, 3, scan, remat="full")
    values = noisy(kept, *args)

    def loss(stack):
        return lambda values: jnp.sum(jnp.sin(stack.apply({"params": values}, *args)))

    gradients = [jax.tree.leaves(jax.jit(jax.grad(loss(stack)))(values)) for stack in (kept, again)]
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    saved = [len(jax.tree.leaves(jax.eval_shape(lambda v, s=s: jax.vjp(loss(s), v)[1], values))) for s in (kept, again)]
    assert saved[1] < saved[0]


def test_scanned_layers_start_different_from_each_other():
    make, args = encoder_case()
    kernel = init(blocks.Stack(make, 2, scan=True), *args)["scanned"]["block"]["mlp"]["up"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_conversion_orders_more_than_ten_blocks_by_number():
    values = {"blocks": {f"block_{i}": {"w": jnp.full((1,), i)} for i in range(12)}}
    np.testing.assert_array_equal(blocks.scanned(values)["blocks"]["scanned"]["block"]["w"][:, 0], np.arange(12))
