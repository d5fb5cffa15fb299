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
CONFIG = settings.ACDiT(depth=2, width=32, heads=2, block_size=4, classes=CLASSES, scan_layers=False, places=True)


def network(frames=0, **changes):
    """Of images of 4 x 4 tokens, or of four frames of 2 x 2."""
    return acdit.Network(replace(CONFIG, **changes), 2 if frames else SIDE, P, frames)


@functools.cache
def forward(module):
    return jax.jit(lambda params, *a: module.apply({"params": params}, *a))


def parameters(module, dtype=np.float32, seed=0, text=None):
    """Random ones, none of them zero: a fresh network puts out zeros, which would hide every leak."""
    blocks_ = TOKENS // module.config.block_size
    tokens = jnp.zeros((1, TOKENS, P))
    init = lambda key: module.init(key, tokens, tokens, jnp.zeros((1, blocks_)), jnp.zeros((1,), jnp.int32), text)  # noqa: E731
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


@pytest.mark.parametrize("places", [False, True])
def test_rotations_say_how_far_tokens_are_from_each_other_and_places_where_they_are(places):
    """Among equal tokens nobody can tell by distances which one it is."""
    module = network(block_size=TOKENS, places=places)
    params, (clean, noised, t, label) = parameters(module), inputs(module)
    equal = np.broadcast_to(noised[:, :1], noised.shape)
    found = np.asarray(forward(module)(params, clean, equal, t, label))
    spread = np.abs(found - found[:, :1]).max()
    assert spread > 0.01 if places else spread < 1e-5, spread


def test_a_fresh_network_predicts_zero():
    module = network(depth=1)
    clean, noised, t, label = inputs(module)
    params = split(jax.jit(module.init)(jax.random.key(0), clean, noised, t, label)["params"])[0]
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
        return m._run(m._rows(both), None, m._condition(t, m.told(label)), rotation, visible)[0]

    run = jax.jit(lambda p: module.apply({"params": p}, clean, method=rows))
    out = np.asarray(run(params))
    np.testing.assert_allclose(out[:, :TOKENS], out[:, TOKENS:], atol=1e-5)
    gates[2] = 0.5
    out = np.asarray(run(params))
    assert np.abs(out[:, :TOKENS] - out[:, TOKENS:]).max() > 0.1


def cached(module, params, clean, noised, t, label):
    """The same block after block, each bringing the clean one before it into the cache; and what that holds."""
    r = module.config.block_size
    step, after = (
        jax.jit(functools.partial(module.apply, {"params": params}, method=method))
        for method in ("denoise", "denoise_after")
    )
    cache, told = garbage(module, clean.dtype), module.apply({"params": params}, label, method="told")
    out = [step(noised[:, :r], t[:, 0], told, jnp.int32(0), cache)]
    for i in range(1, TOKENS // r):
        here, number = slice(i * r, (i + 1) * r), jnp.int32(i)
        found, cache = after(clean[:, (i - 1) * r : i * r], noised[:, here], t[:, i], told, number, cache)
        out.append(found)
        beside = step(noised[:, here], t[:, i], told, number, cache)  # every solver step but the first
        np.testing.assert_allclose(
            found, beside, atol=(1e-12 if clean.dtype == np.float64 else 1e-5) * np.abs(beside).max()
        )
    return np.concatenate(out, axis=1), [x[:, :, : TOKENS - r] for x in (*cache.keys, *cache.values)]


def garbage(module, dtype):
    """A cache in whose free slots lies what must not matter."""
    c = module.config
    cache = kv_cache.empty(c.depth, (B, c.heads, TOKENS, c.width // c.heads), dtype, stacked=False)
    return jax.tree.map(lambda x: x + 1e3 if x.ndim else x, cache)


@pytest.mark.parametrize(
    ("size", "rope", "dtype", "most", "frames"),
    [
        (4, "nd", np.float64, 1e-12, 0),
        (4, "nd", np.float32, 1e-5, 0),
        (8, "nd", np.float64, 1e-12, 4),
        pytest.param(4, "released", np.float64, 1e-12, 0, marks=pytest.mark.slow),
        pytest.param(1, "nd", np.float64, 1e-12, 0, marks=pytest.mark.slow),
        pytest.param(16, "nd", np.float64, 1e-12, 0, marks=pytest.mark.slow),
        pytest.param(1, "nd", np.float32, 1e-5, 0, marks=pytest.mark.slow),
        pytest.param(1, "nd", np.float64, 1e-12, 4, marks=pytest.mark.slow),
        pytest.param(4, "released", np.float32, 1e-5, 4, marks=pytest.mark.slow),
    ],
)
def test_block_decoding_behind_a_cache_equals_the_whole_sequence(size, rope, dtype, most, frames):
    with jax.enable_x64(dtype is np.float64):
        module = network(frames, block_size=size, rope=rope)
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


@pytest.mark.parametrize("rope", ["nd", pytest.param("released", marks=pytest.mark.slow)])
def test_a_window_brought_into_the_cache_at_once_equals_the_whole_sequence(rope):
    """As the last block of a window is drawn: all others in one pass with it, whatever the cache held before."""
    module = network(4, rope=rope)
    params, (clean, noised, t, label) = parameters(module), inputs(module)
    whole = np.asarray(forward(module)(params, clean, noised, t, label))[:, 12:]
    after = jax.jit(functools.partial(module.apply, {"params": params}, method="denoise_after"))
    told = module.apply({"params": params}, label, method="told")
    found, cache = after(clean[:, :12], noised[:, 12:], t[:, 3], told, jnp.int32(3), garbage(module, np.float32))
    np.testing.assert_allclose(found, whole, atol=1e-5 * np.abs(whole).max())
    assert int(cache.length) == 12


def test_clean_rows_alone_are_those_beside_noised_ones():
    """Keys and values of both are equal: what is probed is what drawing reads."""
    module = network()
    params, (clean, noised, t, label) = parameters(module), inputs(module)
    rows = jax.jit(functools.partial(module.apply, {"params": params}, method="clean_rows"))
    before = rows(clean)
    assert before.shape == (B, TOKENS, 32)
    for j in range(4):  # block by block, causally
        after = rows(changed(clean, j, 4))
        moved_N = (np.asarray(before) != np.asarray(after)).reshape(B, 4, 4, 32).any(axis=(0, 2, 3))
        np.testing.assert_array_equal(moved_N, np.arange(4) >= j)

    def beside(m):
        both = m._rows(jnp.concatenate([clean, noised], axis=1))
        rotation = [jnp.concatenate([table, table]) for table in m._rotation(jnp.float32)]
        condition = m._condition(t, m.told(label))
        return m._run(both, None, condition, rotation, acdit.spans.skip_causal(4, 4))[0][:, :TOKENS]

    beside_noised = jax.jit(lambda p: module.apply({"params": p}, method=beside))
    np.testing.assert_allclose(before, beside_noised(params), atol=1e-5)


def test_time_rows_and_columns_are_axes_of_their_own():
    """The same tokens as frames of a clip and as squares of an image are told apart, and so is every frame."""
    clip, image = network(4), network()
    params, given = parameters(image), inputs(image)
    found = [np.asarray(forward(m)(params, *given)) for m in (clip, image)]
    assert np.abs(found[0] - found[1]).max() > 1e-3  # rounding moves it by 1e-6
    cos, _ = clip.apply({"params": params}, jnp.float32, method="_rotation")
    assert len(np.unique(np.asarray(cos).round(5), axis=0)) == TOKENS


def test_captions_reach_noised_blocks_only_and_leave_the_cache_alone():
    """So both branches of guidance, with and without a caption, read one cache."""
    module = network(classes=0, caption_bytes=6, caption_depth=1)
    clean, noised, t, _ = inputs(module)
    texts = [np.array([list(text)] * B, np.uint8) for text in (b"ab\0\0\0\0", b"ba\0\0\0\0", b"\0\0\0\0\0\0")]
    params = parameters(module, text=texts[0][:1])
    told = jax.jit(functools.partial(module.apply, {"params": params}, None, method="told"))
    vectors = [np.asarray(told(text)) for text in texts]
    assert min(np.abs(vectors[i] - vectors[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3
    after = jax.jit(functools.partial(module.apply, {"params": params}, method="denoise_after"))
    given = clean[:, :4], noised[:, 4:8], t[:, 1]
    (first, cache), (second, other) = (after(*given, v, jnp.int32(1), garbage(module, np.float32)) for v in vectors[:2])
    assert (np.asarray(first) != np.asarray(second)).any(axis=(1, 2)).all()
    for a, b in zip((*cache.keys, *cache.values), (*other.keys, *other.values), strict=True):
        np.testing.assert_array_equal(a[:, :, :4], b[:, :, :4])


def test_scanned_and_recomputed_blocks_are_the_same_network():
    module = network()
    params, given = parameters(module), inputs(module)
    whole = forward(module)(params, *given)
    for remat in ("none", "full"):
        scanned = network(scan_layers=True, remat=remat)
        found = forward(scanned)(blocks.scanned(params), *given)
        np.testing.assert_allclose(found, whole, atol=1e-5)
