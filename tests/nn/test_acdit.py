"""What the rows of ACDiT's network see, are told and leave in a cache: exactly."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.nn import acdit, blocks, kv_cache
from ddt_jax.nn.params import split

B, SIDE, P, CLASSES = 2, 4, 6, 5
TOKENS = SIDE * SIDE
CONFIG = settings.ACDiT(depth=2, width=32, heads=2, block_size=4, classes=CLASSES, scan_layers=False)
QUICK = {"xla_backend_optimization_level": 0}


def network(**changes):
    return acdit.Network(replace(CONFIG, **changes), SIDE, P)


@functools.cache
def forward(module):
    return jax.jit(lambda params, *a: module.apply({"params": params}, *a), compiler_options=QUICK)


def parameters(module, dtype=np.float32, seed=0):
    """Random ones, none of them zero: a fresh network puts out zeros, which would hide every leak."""
    blocks_ = TOKENS // module.config.block_size
    tokens = jnp.zeros((1, TOKENS, P))
    init = lambda key: module.init(key, tokens, tokens, jnp.zeros((1, blocks_)), jnp.zeros((1,), jnp.int32))  # noqa: E731
    shapes = split(jax.eval_shape(init, jax.random.key(0))["params"])[0]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.2).astype(dtype), shapes)


def inputs(module, dtype=np.float32, seed=1):
    """(clean, noised, t, label)."""
    rng = np.random.default_rng(seed)
    n = TOKENS // module.config.block_size
    clean, noised = rng.normal(size=(2, B, TOKENS, P)).astype(dtype)
    return clean, noised, rng.uniform(0.1, 1, (B, n)).astype(dtype), np.array([1, CLASSES], np.int32)


def changed(x, block, size):
    y = x.copy()
    y[:, block * size : (block + 1) * size] += 1
    return y


def moved(before, after, size):
    """Which blocks of the output differ at all, bool [N]."""
    return (np.asarray(before) != np.asarray(after)).reshape(B, -1, size, P).any(axis=(0, 2, 3))


@pytest.mark.parametrize("size", [1, 4, 16])
def test_a_noised_block_sees_clean_ones_before_it_and_itself_alone(size):
    module = network(block_size=size)
    params, (clean, noised, t, label) = parameters(module), inputs(module)
    run, n = forward(module), TOKENS // size
    before = run(params, clean, noised, t, label)
    for j in range(n):
        after = run(params, changed(clean, j, size), noised, t, label)
        np.testing.assert_array_equal(moved(before, after, size), np.arange(n) > j, err_msg=f"clean {j}")
        after = run(params, clean, changed(noised, j, size), t, label)
        np.testing.assert_array_equal(moved(before, after, size), np.arange(n) == j, err_msg=f"noised {j}")
        later = t.copy()
        later[:, j] /= 2
        after = run(params, clean, noised, later, label)
        np.testing.assert_array_equal(moved(before, after, size), np.arange(n) == j, err_msg=f"t {j}")


def test_one_block_is_a_dit_that_no_clean_token_reaches():
    module = network(block_size=TOKENS)
    params, (clean, noised, t, label) = parameters(module), inputs(module)
    a, b = (forward(module)(params, x, noised, t, label) for x in (clean, np.full_like(clean, 7)))
    np.testing.assert_array_equal(a, b)


def test_labels_reach_noised_blocks_only():
    module = network()
    params, (clean, noised, t, label) = parameters(module), inputs(module)
    before, after = (forward(module)(params, clean, noised, t, x) for x in (label, label[::-1].copy()))
    assert (np.asarray(before) != np.asarray(after)).all(axis=(1, 2)).all()
    free = network(classes=0)
    own = {name: value for name, value in params.items() if name != "label"}
    a, b = (forward(free)(own, clean, noised, t, x) for x in (label, label[::-1].copy()))
    np.testing.assert_array_equal(a, b)


def test_a_fresh_network_predicts_zero():
    module = network(depth=1)
    clean, noised, t, label = inputs(module)
    params = split(jax.jit(module.init, compiler_options=QUICK)(jax.random.key(0), clean, noised, t, label)["params"])[
        0
    ]
    out = forward(module)(params, clean, noised, t, label)
    np.testing.assert_array_equal(out, np.zeros_like(clean))


def test_clean_and_noised_tokens_share_all_weights_but_the_modulation():
    """With gates of one, and no shift or scale, the clean and noised rows of equal tokens are alike."""
    module = network(depth=1, block_size=TOKENS)
    params, (clean, _, t, label) = parameters(module), inputs(module)
    params["stack"]["block_0"]["adaln"] = jax.tree.map(np.zeros_like, params["stack"]["block_0"]["adaln"])
    gates = params["stack"]["block_0"]["adaln"]["modulate"]["bias"]
    gates[[2, 5]] = 1  # shift, scale, gate of attention; the same of the MLP

    def rows(m, x):
        both = jnp.concatenate([x, x], axis=1)
        rotation = [jnp.concatenate([table, table]) for table in m._rotation(jnp.float32)]
        visible = acdit.spans.skip_causal(1, TOKENS)
        return m._run(m.into(both), None, m._condition(t, label), rotation, visible)[0]

    run = jax.jit(lambda p: module.apply({"params": p}, clean, method=rows), compiler_options=QUICK)
    out = np.asarray(run(params))
    np.testing.assert_allclose(out[:, :TOKENS], out[:, TOKENS:], atol=1e-5)
    gates[2] = 0.5
    out = np.asarray(run(params))
    assert np.abs(out[:, :TOKENS] - out[:, TOKENS:]).max() > 0.1


def cached(module, params, clean, noised, t, label):
    """The same through a cache, block after block; and the cache."""
    c, n = module.config, TOKENS // module.config.block_size
    step = jax.jit(functools.partial(module.apply, method="denoise"), compiler_options=QUICK)
    commit = jax.jit(functools.partial(module.apply, method="commit"), compiler_options=QUICK)
    cache = kv_cache.empty(c.depth, (B, c.heads, TOKENS, c.width // c.heads), clean.dtype, stacked=False)
    cache = jax.tree.map(lambda x: x + 1e3 if x.ndim else x, cache)  # what lies in free slots must not matter
    out = []
    for i in range(n):
        here = slice(i * c.block_size, (i + 1) * c.block_size)
        variables, number = {"params": params}, jnp.int32(i)
        out.append(step(variables, noised[:, here], t[:, i], label, number, cache))
        cache = commit(variables, clean[:, here], number, cache)
    return np.concatenate(out, axis=1), cache


@pytest.mark.parametrize(
    ("size", "rope", "dtype", "most"),
    [
        (4, "nd", np.float64, 1e-12),
        (4, "nd", np.float32, 1e-5),
        pytest.param(4, "released", np.float64, 1e-12, marks=pytest.mark.slow),
        pytest.param(1, "nd", np.float64, 1e-12, marks=pytest.mark.slow),
        pytest.param(16, "nd", np.float64, 1e-12, marks=pytest.mark.slow),
        pytest.param(1, "nd", np.float32, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_block_decoding_behind_a_cache_equals_the_whole_sequence(size, rope, dtype, most):
    with jax.enable_x64(dtype is np.float64):
        module = network(block_size=size, rope=rope)
        params, given = parameters(module, dtype), inputs(module, dtype)
        whole = np.asarray(forward(module)(params, *given))
        found, _ = cached(module, params, *given)
        assert whole.dtype == found.dtype == dtype
        np.testing.assert_allclose(found, whole, atol=most * np.abs(whole).max(), rtol=0)


def test_the_clean_cache_knows_neither_labels_nor_noise():
    module = network()
    params, (clean, noised, t, label) = parameters(module), inputs(module)
    first = cached(module, params, clean, noised, t, label)[1]
    second = cached(module, params, clean, noised + 1, t / 2, label[::-1].copy())[1]
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_scanned_and_recomputed_blocks_are_the_same_network():
    module = network()
    params, given = parameters(module), inputs(module)
    whole = forward(module)(params, *given)
    for remat in ("none", "full"):
        scanned = network(scan_layers=True, remat=remat)
        found = forward(scanned)(blocks.scanned(params), *given)
        np.testing.assert_allclose(found, whole, atol=1e-5)
