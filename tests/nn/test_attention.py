"""Attention over spans against loops over rows in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax.nn import spans
from ddt_jax.nn.attention import attend, visible

B, H, S, T, E = 2, 2, 5, 7, 4


def brute_force(q, k, v, mask_BST):
    out = np.zeros(q.shape)
    for b, h, s in np.ndindex(q.shape[:3]):
        keys = [t for t in range(k.shape[2]) if mask_BST[b, s, t]]
        if keys:
            logits = np.array([q[b, h, s] @ k[b, h, t] for t in keys]) / np.sqrt(E)
            weights = np.exp(logits - logits.max())
            out[b, h, s] = (weights / weights.sum()) @ np.array([v[b, h, t] for t in keys])
    return out


def arrays(queries=S, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(B, H, n, E)).astype(np.float32) for n in (queries, T, T))


def mask_of(rule, queries=S):
    return np.array([[[rule(b, s, t) for t in range(T)] for s in range(queries)] for b in range(B)])


VISIBLE_START, VISIBLE_END = np.array([0, 1], np.int32), np.array([2, 1], np.int32)
DOCUMENT = np.array([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]], np.int32)
IMAGE_END = np.array([[0, 0, 0, 5, 5], [0, 4, 4, 4, 0]], np.int32)
CASES = {
    "full": (lambda: spans.full(T), lambda b, s, t: True),
    "causal": (lambda: spans.causal(S), lambda b, s, t: t <= s),
    "causal with a cache": (lambda: spans.causal(S, offset=2, start=1), lambda b, s, t: 1 <= t <= s + 2),
    "key prefix": (lambda: spans.key_prefix(jnp.array([3, 0])), lambda b, s, t: t < (3, 0)[b]),
    "tokens and patches": (
        lambda: spans.tokens_and_patches(jnp.asarray(VISIBLE_START), jnp.asarray(VISIBLE_END), 3, 4),
        lambda b, s, t: VISIBLE_START[b] <= t < VISIBLE_END[b] or t >= 3,
    ),
    "packed": (
        lambda: spans.causal(S, offset=2, start=jnp.asarray(DOCUMENT)),
        lambda b, s, t: DOCUMENT[b, s] <= t <= s + 2,
    ),
    "causal with a cache by example": (
        lambda: spans.causal(S, offset=jnp.array([0, 2])),
        lambda b, s, t: t <= s + (0, 2)[b],
    ),
    "images": (
        lambda: spans.bidirectional(IMAGE_END, start=DOCUMENT),
        lambda b, s, t: DOCUMENT[b, s] <= t and (t <= s or t < IMAGE_END[b, s]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_a_loop_over_rows(name):
    build, rule = CASES[name]
    q, k, v = arrays()
    mask = mask_of(rule)
    np.testing.assert_array_equal(np.broadcast_to(visible(build(), T), (B, S, T)), mask)
    np.testing.assert_allclose(attend(q, k, v, build()), brute_force(q, k, v, mask), atol=1e-5)


def test_skip_causal_rows_see_what_the_paper_says():
    """By the paper's rule, for every number and size of blocks up to 64 tokens: the rule is written as in §4.2, pair by
    pair, and not with intervals."""
    cases = [(blocks, size) for size in range(1, 65) for blocks in range(1, 64 // size + 1)]
    assert len(cases) == 280
    for blocks, size in cases:
        n = blocks * size
        built = spans.skip_causal(blocks, size)
        bounds = np.stack([np.broadcast_to(x, (1, 2 * n)) for x in (built.start, built.end, built.start2, built.end2)])
        assert (bounds[1] <= bounds[2]).all() or (bounds[2] == bounds[3])[bounds[1] > bounds[2]].all()  # disjoint
        keys = np.arange(2 * n)
        inside = [(a[0][:, None] <= keys) & (keys < b[0][:, None]) for a, b in ((bounds[0], bounds[1]), bounds[2:])]
        block, clean = keys % n // size, keys < n
        before = block[None] < block[:, None]
        own = (block[None] == block[:, None]) & (clean[None] == clean[:, None])
        np.testing.assert_array_equal(inside[0] | inside[1], clean[None] & before | own, err_msg=f"{blocks} x {size}")


@pytest.mark.parametrize(("blocks", "size"), [(1, 3), (3, 2), (4, 1)])
def test_blocks_with_the_keys_they_see_equal_the_mask(blocks, size):
    """Skip-causal attention without a mask, forwards and backwards, with shared keys and bent logits."""
    s, seen = 2 * blocks * size, spans.skip_causal(blocks, size)
    rng = np.random.default_rng(1)
    q = rng.normal(size=(B, 4, s, E)).astype(np.float32)
    k, v = (rng.normal(size=(B, 2, s, E)).astype(np.float32) for _ in range(2))

    def of(method):
        def run(q, k, v):
            out = attend(q, k, v, seen, method=method, soft_cap=2.0)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(q, k, v)
        return out, *gradients

    for found, expected in zip(of("blocks"), of("dense"), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    out = attend(q, k, v, seen, method="blocks")
    mask = np.asarray(visible(seen, s))[0]
    for j in range(s):
        push = 5 * np.float32(np.arange(s) == j)[:, None]
        other = attend(q, k + push, v - push, seen, method="blocks")
        np.testing.assert_array_equal((np.asarray(other) != np.asarray(out)).any((0, 1, 3)), mask[:, j], err_msg=f"{j}")


def test_blocks_are_taken_where_they_pay():
    """Large ones, and not so many that the program grows long; nothing of all rows by all keys is left."""

    def holds(blocks, size, rows):
        """Whether logits of so many rows by as many keys are ever held."""
        q = jnp.zeros((1, 1, 2 * blocks * size, E))
        text = str(jax.make_jaxpr(lambda q: attend(q, q, q, spans.skip_causal(blocks, size)))(q))
        return f",{rows},{rows}]" in text

    assert not holds(4, 16, 128) and holds(4, 16, 16)
    assert holds(4, 4, 32) and holds(17, 16, 544)
    assert not holds(1, 1024, 1024)  # a long block goes by tiles, as any other long attention


def test_other_spans_have_no_blocks():
    q, k, v = arrays(T)
    with pytest.raises(ValueError, match="'blocks' takes the spans of skip_causal"):
        attend(q, k, v, spans.causal(T), method="blocks")


@pytest.mark.parametrize("size", [1, 6, 64])
def test_one_block_is_full_attention_within_the_image(size):
    """N = 1: full-sequence diffusion; the noised rows never see the clean ones."""
    whole = np.asarray(visible(spans.skip_causal(1, size), 2 * size)[0])
    np.testing.assert_array_equal(whole, np.kron(np.eye(2), np.ones((size, size))))


@pytest.mark.parametrize("blocks", [1, 6, 64])
def test_blocks_of_one_token_are_strictly_causal(blocks):
    """B = 1: clean rows are a causal decoder's; a noised one sees the clean tokens before it, and itself."""
    seen = np.asarray(visible(spans.skip_causal(blocks, 1), 2 * blocks)[0])
    np.testing.assert_array_equal(seen[:blocks], np.concatenate([np.tri(blocks), np.zeros((blocks, blocks))], axis=1))
    np.testing.assert_array_equal(seen[blocks:], np.concatenate([np.tri(blocks, k=-1), np.eye(blocks)], axis=1))


@pytest.mark.parametrize("method", ["dense", "chunked"])
def test_shared_keys_equal_repeated_ones_without_being_repeated(method):
    rng = np.random.default_rng(1)
    q = rng.normal(size=(B, 6, S, E)).astype(np.float32)
    k, v = (rng.normal(size=(B, 2, T, E)).astype(np.float32) for _ in range(2))
    expected = brute_force(q, k.repeat(3, 1), v.repeat(3, 1), mask_of(lambda b, s, t: t <= s))
    np.testing.assert_allclose(attend(q, k, v, spans.causal(S), method=method), expected, atol=1e-5)
    text = str(jax.make_jaxpr(lambda k: attend(q, k, v, spans.causal(S), method=method))(k))
    assert f"f32[{B},6,{T},{E}]" not in text


def test_heads_that_do_not_share_evenly_are_an_error():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="2 heads of queries cannot share 3"):
        attend(q, np.repeat(k[:, :1], 3, 1), np.repeat(v[:, :1], 3, 1), spans.causal(S))


def test_soft_cap_bends_logits():
    q, k, v = (10 * x for x in arrays())
    logits = 3 * np.tanh(np.einsum("bhse,bhte->bhst", q, k) / np.sqrt(E) / 3)
    expected = np.asarray(jax.nn.softmax(logits)) @ v
    for method in ("dense", "chunked"):
        np.testing.assert_allclose(attend(q, k, v, spans.full(T), soft_cap=3.0, method=method), expected, atol=1e-4)


def test_hidden_keys_have_no_effect_at_all():
    q, k, v = arrays()
    visible_two = spans.key_prefix(jnp.array([2, 2]))
    changed_k, changed_v = k.copy(), v.copy()
    changed_k[:, :, 2:], changed_v[:, :, 2:] = 1e9, -1e9
    np.testing.assert_array_equal(attend(q, k, v, visible_two), attend(q, changed_k, changed_v, visible_two))


def test_gradients_agree_with_a_plain_softmax_and_stay_finite_where_nothing_is_seen():
    q, k, v = arrays()
    lengths = jnp.array([3, 0])

    def ours(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, spans.key_prefix(lengths))))

    def plain(q, k, v):
        return jnp.sum(jnp.sin(jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(E)) @ v))

    gradients = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(q, k, v)
    first = jax.jit(jax.grad(plain, argnums=(0, 1, 2)))(q[:1], k[:1, :, :3], v[:1, :, :3])
    for got, expected in zip(gradients, first, strict=True):
        np.testing.assert_allclose(got[:1, :, : expected.shape[2]], expected, atol=1e-5)
        np.testing.assert_array_equal(got[1], 0)


def test_big_logits_do_not_overflow():
    q, k, v = arrays()
    assert np.isfinite(attend(1e4 * q, k, v, spans.causal(S))).all()


def test_full_spans_are_known_at_trace_time_and_traced_ones_are_not():
    assert spans.full(T).covers(T) and not spans.full(T).covers(T + 1)
    assert not spans.causal(S).covers(S)
    assert not spans.key_prefix(jnp.int32(T)).covers(T)


def test_softmax_is_fp32_for_bf16_inputs():
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays())
    out = attend(q, k, v, spans.causal(S))
    assert out.dtype == jnp.bfloat16
    text = str(jax.make_jaxpr(lambda q: attend(q, k, v, spans.causal(S)))(q))
    assert not [line for line in text.splitlines() if " exp " in line and "bf16" in line]
