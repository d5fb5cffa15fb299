"""The quantizer against NumPy, and the promises about how its statistics add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.nn.quantize import VectorQuantizer, nearest

B, K, D, V = 8, 4, 3, 16


def make(**kwargs):
    defaults = dict(code_dim=D, codebook_size=V, decay=0.9, revive_below=0.0, normalize_input="none")
    return VectorQuantizer(settings.Quantizer(**(defaults | kwargs)), num_tokens=K, batch_size=B)


def features(seed=0, rows=B):
    return np.random.default_rng(seed).normal(size=(rows, K, D)).astype(np.float32)


def normalized(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


SLOTS = np.arange(B, dtype=np.int32)


def test_the_chosen_code_has_the_smallest_angle():
    q = make()
    extra = q.init(jax.random.key(0))
    z = features()
    out, codes, commitment, _ = q.quantize(extra, z, SLOTS, jax.random.key(1))
    book = np.asarray(extra["codes"])
    expected = np.argmax(normalized(z) @ book.T, axis=-1)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(out, np.sqrt(D) * book[expected], atol=1e-6)
    distance = ((normalized(z) - book[expected]) ** 2).sum(-1)
    np.testing.assert_allclose(commitment, distance, atol=1e-6)


def test_chunked_search_equals_the_whole_table_and_never_holds_it():
    rng = np.random.default_rng(0)
    z, book = rng.normal(size=(37, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    for rows in (5, 36):
        np.testing.assert_array_equal(nearest(z, book, max_table=rows * V), np.argmax(z @ book.T, axis=-1))
    shapes = str(jax.make_jaxpr(lambda z, c: nearest(z, c, max_table=5 * V))(z, book))
    assert f"[37,{V}]" not in shapes and f"[40,{V}]" not in shapes


def test_similarities_are_not_rounded_on_any_device():
    rows, codes = jnp.zeros((4, 8)), jnp.zeros((6, 8))
    eqns = jax.make_jaxpr(nearest)(rows, codes).eqns
    (product,) = (eqn for eqn in eqns if eqn.primitive.name == "dot_general")
    assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}


def test_gradients_pass_straight_through():
    q = make()
    extra, weight = q.init(jax.random.key(0)), features(3)

    def through(z):
        return jnp.sum(weight * q.quantize(extra, z, SLOTS, jax.random.key(1))[0])

    def unit_only(z):
        return jnp.sum(weight * np.sqrt(D) * z / jnp.linalg.norm(z, axis=-1, keepdims=True))

    z = features()
    np.testing.assert_allclose(jax.grad(through)(z), jax.grad(unit_only)(z), atol=1e-5)
    book_gradient = jax.grad(
        lambda codes: (
            jnp.sum(q.quantize(extra | {"codes": codes}, z, SLOTS, jax.random.key(1))[0])
            + jnp.sum(q.quantize(extra | {"codes": codes}, z, SLOTS, jax.random.key(1))[2])
        )
    )(extra["codes"])
    np.testing.assert_array_equal(book_gradient, 0)


def test_ema_follows_numpy_over_several_steps():
    q = make()
    extra = q.init(jax.random.key(0))
    extra = q.update(extra, q.quantize(extra, features(9), SLOTS, jax.random.key(9))[3])
    count, total, book = (np.asarray(extra[n]) for n in ("count", "sum", "codes"))
    for step in range(5):
        z = features(step)
        stats = q.quantize(extra, z, SLOTS, jax.random.key(step))[3]
        extra = q.update(extra, stats)
        rows = normalized(z).reshape(-1, D)
        hard = np.eye(V)[np.argmax(rows @ book.T, axis=-1)]
        count = 0.9 * count + 0.1 * hard.sum(0)
        total = 0.9 * total + 0.1 * hard.T @ rows
        book = normalized(total)
        np.testing.assert_allclose(extra["count"], count, atol=1e-5)
        np.testing.assert_allclose(extra["codes"], book, atol=1e-5)


def test_first_step_takes_codes_from_the_data():
    q = make()
    extra = q.init(jax.random.key(0))
    z = features()
    after = q.update(extra, q.quantize(extra, z, SLOTS, jax.random.key(1))[3])
    cosine = np.asarray(after["codes"]) @ normalized(z).reshape(-1, D).T
    np.testing.assert_allclose(cosine.max(axis=1), 1, atol=1e-6)
    assert len(np.unique(cosine.argmax(axis=1))) == V  # B K = 32 rows, 16 codes: no row twice
    assert float(after["revived"]) == 0 and bool(after["initialized"])


def test_dead_codes_move_to_current_features_and_live_ones_stay():
    q = make(revive_below=0.1, decay=0.0)
    extra = q.init(jax.random.key(0))
    extra = q.update(extra, q.quantize(extra, features(), SLOTS, jax.random.key(1))[3])
    z = np.broadcast_to(np.asarray(extra["codes"])[0], (B, K, D))  # everything falls on code 0
    stats = q.quantize(extra, z, SLOTS, jax.random.key(2))[3]
    after = q.update(extra, stats)
    assert float(after["revived"]) == V - 1
    np.testing.assert_allclose(after["codes"], np.asarray(stats["candidates"]) * 0 + z[0, 0], atol=1e-5)
    never = make(decay=0.0)
    assert float(never.update(extra, stats)["revived"]) == 0


def test_a_moved_code_starts_at_the_uniform_share_or_at_the_threshold():
    share = B * K / V
    for kind, expected in {"uniform": share, "threshold": 0.5 * share}.items():
        q = make(revive_below=0.5, revive_count=kind, decay=0.0)
        quantize, update = jax.jit(q.quantize), jax.jit(q.update)
        extra = q.init(jax.random.key(0))
        extra = update(extra, quantize(extra, features(), SLOTS, jax.random.key(1))[3])
        np.testing.assert_allclose(extra["count"], share)  # codes from the data are no moved ones
        stats = quantize(extra, features(1), SLOTS, jax.random.key(2))[3]
        after = update(extra, stats)
        dead = np.asarray(stats["count"]) < 0.5 * share
        assert 0 < dead.sum() == int(after["revived"]) < V
        np.testing.assert_allclose(np.asarray(after["count"])[dead], expected)
        np.testing.assert_allclose(np.asarray(after["codes"])[dead], np.asarray(stats["candidates"])[dead], atol=1e-6)


def test_codes_wait_for_features_that_differ_between_images():
    q = make(init="when_varied", init_variance=0.01, revive_below=0.1, revive_from="perplexity")
    start = extra = q.init(jax.random.key(0))
    quantize, update = jax.jit(q.quantize), jax.jit(q.update)
    same = np.broadcast_to(features()[:1], (B, K, D))
    slightly = same + 0.01 * features(1)
    for z in (same, np.zeros_like(same), slightly):
        extra = update(extra, quantize(extra, z, SLOTS, jax.random.key(1))[3])
        jax.tree.map(np.testing.assert_array_equal, extra, start)
    z = same + 0.3 * features(1)
    rows = normalized(z)
    assert np.mean(np.sum(rows.var(0), -1)) > 0.01 > np.mean(np.sum(normalized(slightly).var(0), -1))
    halves = [quantize(extra, z[r], SLOTS[r], jax.random.key(1))[3] for r in (slice(0, B, 2), slice(1, B, 2))]
    after = update(extra, jax.tree.map(jnp.add, *halves))
    assert bool(after["initialized"]) and float(after["revived"]) == 0
    assert len(np.unique(np.asarray(after["codes"]).round(5), axis=0)) == V
    np.testing.assert_allclose((np.asarray(after["codes"]) @ rows.reshape(-1, D).T).max(1), 1, atol=1e-6)
    later = update(after, quantize(after, z, SLOTS, jax.random.key(2))[3])
    assert not np.allclose(later["usage"], 1 / V)
    again = update(later, quantize(later, same, SLOTS, jax.random.key(2))[3])  # once is for good
    assert bool(again["initialized"]) and not np.allclose(again["count"], later["count"])


def test_sums_without_atomics_lead_to_the_same_codes():
    z, key, extra = features(), jax.random.key(1), jax.jit(make().init)(jax.random.key(0))
    stats = {}
    for deterministic in (False, True):
        traced = jax.jit(make(deterministic=deterministic).quantize).trace(extra, z, SLOTS, key)
        # The counts stay: a sum of ones is exact in any order.
        assert (f"f32[{V},{D}] = scatter-add[" in str(traced.jaxpr)) != deterministic
        stats[deterministic] = traced.lower().compile()(extra, z, SLOTS, key)[3]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), stats[False], stats[True])


PERPLEXITY = {"revive_from": "perplexity", "init": "when_varied"}


@pytest.mark.parametrize("options", [{}, {"normalize_input": "batch"}, PERPLEXITY], ids=str)
def test_statistics_of_two_halves_add_up_to_the_whole(options):
    q = make(**options)
    normalize = q.config.normalize_input
    extra = q.init(jax.random.key(0))
    if options == PERPLEXITY:
        extra |= {"initialized": jnp.bool_(True)}
    z, key, quantize = features(), jax.random.key(1), jax.jit(q.quantize)
    order = np.random.default_rng(2).permutation(B)
    whole = quantize(extra, z, SLOTS, key)[3]
    parts = [quantize(extra, z[rows], SLOTS[rows], key)[3] for rows in (order[:3], order[3:])]
    added = jax.tree.map(jnp.add, *parts)
    names = {"norm_sum", "norm_square", "norm_count"} if normalize == "batch" else set(whole)
    for name in names:  # with batch norm the features themselves depend on the cut, so accumulation is refused there
        np.testing.assert_allclose(added[name], whole[name], atol=1e-6)


def test_candidates_are_rows_of_the_global_batch_whatever_order_the_rows_come_in():
    q = make()
    extra, z, key = q.init(jax.random.key(0)), features(), jax.random.key(1)
    candidates = np.asarray(q.quantize(extra, z, SLOTS, key)[3]["candidates"])
    shuffled = np.random.default_rng(2).permutation(B)
    again = q.quantize(extra, z[shuffled], SLOTS[shuffled], key)[3]["candidates"]
    np.testing.assert_array_equal(candidates, again)
    rows = normalized(z).reshape(-1, D)
    np.testing.assert_allclose((candidates @ rows.T).max(axis=1), 1, atol=1e-6)
    other = q.quantize(extra, z, SLOTS, jax.random.key(2))[3]["candidates"]
    assert not np.allclose(candidates, other)


def test_more_codes_than_rows_still_gives_every_code_a_row():
    q = VectorQuantizer(settings.Quantizer(code_dim=D, codebook_size=100, normalize_input="none"), K, B)
    candidates = q.quantize(q.init(jax.random.key(0)), features(), SLOTS, jax.random.key(1))[3]["candidates"]
    np.testing.assert_allclose(np.linalg.norm(candidates, axis=-1), 1, atol=1e-6)


def test_batch_norm_uses_the_batch_in_training_and_running_statistics_after():
    q = make(normalize_input="batch", norm_momentum=0.25)
    extra = q.init(jax.random.key(0))
    z = 3 * features() + 5
    after = q.update(extra, q.quantize(extra, z, SLOTS, jax.random.key(1))[3])
    np.testing.assert_allclose(after["mean"], z.mean(0), rtol=1e-5)  # first step: the batch itself
    np.testing.assert_allclose(after["var"], z.var(0), rtol=1e-4)
    y = 2 * features(1) - 1
    later = q.update(after, q.quantize(after, y, SLOTS, jax.random.key(2))[3])
    np.testing.assert_allclose(later["mean"], 0.75 * z.mean(0) + 0.25 * y.mean(0), rtol=1e-4, atol=1e-5)
    white = (y - np.asarray(later["mean"])) / np.sqrt(np.asarray(later["var"]) + 1e-5)
    expected = np.argmax(normalized(white) @ np.asarray(later["codes"]).T, axis=-1)
    np.testing.assert_array_equal(q.encode(later, y), expected)
    np.testing.assert_array_equal(q.encode(later, y)[:2], q.encode(later, y[:2]))  # each image alone


def test_update_keeps_types_and_shapes():
    q = make(normalize_input="batch", diversity=1.0, entropy_groups=2, init="when_varied", deterministic=True)
    extra = jax.eval_shape(q.init, jax.random.key(0))

    def step(extra):
        return q.update(extra, q.quantize(extra, features(), SLOTS, jax.random.key(1))[3])

    after = jax.eval_shape(step, extra)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), extra) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


def test_perplexity_of_uniform_usage_is_the_number_of_codes():
    q = make()
    extra = q.init(jax.random.key(0)) | {"count": jnp.full((V,), 3.0)}
    np.testing.assert_allclose(q.metrics(extra)["codebook_perplexity"], V, rtol=1e-5)
