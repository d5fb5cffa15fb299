"""The backbone: LLaMA-3's numbers, its options, and the same results scanned, unrolled, cached and computed again."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import backbone
from ddt_jax.nn import blocks, params, rope, spans
from ddt_jax.training.state import shardings_of

B, S = 2, 7
TINY = settings.Transformer(vocab_size=32, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)


def random_params(c, scale=0.3):
    shapes = params.split(jax.eval_shape(lambda: backbone.init(c, jax.random.key(0))))[0]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, scale, s.shape).astype(np.float32), shapes)


def ids_of(seed=0, rows=S):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (B, rows)).astype(np.int32)


POSITIONS = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))


def logits_of(c, values, ids, positions=POSITIONS, visible=None):
    visible = visible or spans.causal(ids.shape[1])
    model = backbone.Backbone(c)
    return jax.jit(lambda v, i, p, s: model.apply({"params": v}, i, p, s, method="everything"))(
        values, ids, positions, visible
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama3_8b", 8_030_261_248), ("llama3.2_1b", 1_235_814_400)],
)
def test_presets_have_the_published_number_of_parameters(name, count):
    """Of Meta's model cards; Transfusion's are in test_published_sizes.py."""
    assert backbone.count_parameters(backbone.preset(name)) == count


def test_every_parameter_is_declared_with_axes_that_have_rules():
    c = replace(TINY, qk_norm=True, lora=settings.LoRA(rank=2, targets=("query", "output", "gate", "down")))
    boxed = jax.eval_shape(lambda: backbone.init(c, jax.random.key(0)))
    _, missed = shardings_of(boxed, meshes.make_mesh(settings.Mesh(fsdp=4, tensor=2)))
    assert not missed
    declared = params.split(boxed)[1]
    assert declared["embed"].axes == ("vocab", "embed")
    matrices = [d for d in jax.tree.leaves(declared["blocks"]) if d.group == "matrix"]
    assert len(matrices) == 7


def test_scanned_and_unrolled_are_equal():
    values = random_params(TINY)
    loose = logits_of(replace(TINY, scan_layers=False), blocks.unrolled(values), ids_of())
    np.testing.assert_allclose(logits_of(TINY, values, ids_of()), loose, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"qk_norm": True, "tied_head": True}])
def test_weights_of_the_type_that_they_are_computed_with_change_no_bit(more):
    c = replace(TINY, dtype="bfloat16", **more)
    values = random_params(c)
    cast = backbone.as_computed(c, values)
    assert cast["embed"].dtype == jnp.bfloat16 and cast["norm"]["scale"].dtype == np.float32
    np.testing.assert_array_equal(logits_of(c, values, ids_of()), logits_of(c, cast, ids_of()))
    assert jax.tree.leaves(backbone.as_computed(TINY, values))[0] is jax.tree.leaves(values)[0]


@pytest.mark.parametrize(
    "remat", ["full", "dots_attention", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dots", "attention"))]
)
def test_what_is_computed_again_changes_no_gradient(remat):
    values, ids = random_params(TINY), ids_of()

    def gradients(c):
        def loss(values):
            logits = backbone.Backbone(c).apply(
                {"params": values}, ids, POSITIONS, spans.causal(S), method="everything"
            )
            return jnp.sum(jnp.sin(logits))

        kept = jax.tree.leaves(jax.eval_shape(lambda v: jax.vjp(loss, v)[1], values))
        return jax.jit(jax.grad(loss))(values), sum(x.size for x in kept)

    (plain, kept), (again, kept_again) = gradients(TINY), gradients(replace(TINY, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)
    assert kept_again < kept


def test_a_row_does_not_see_later_rows_or_other_documents():
    values = random_params(TINY)
    ids = ids_of()
    document = np.repeat(np.array([[0, 4], [0, 4]], np.int32), [4, 3], axis=1)
    packed = functools.partial(logits_of, TINY, values, visible=spans.causal(S, start=document))
    before = np.asarray(packed(ids))
    changed = ids.copy()
    changed[:, 3] = (changed[:, 3] + 1) % TINY.vocab_size
    after = np.asarray(packed(changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    np.testing.assert_array_equal(before[:, 4:], after[:, 4:])
    assert np.abs(before[:, 3] - after[:, 3]).max() > 1e-3


def test_positions_count_and_not_places():
    """A document in the middle of a row, with its own positions, is the document alone."""
    values, ids = random_params(TINY), ids_of()
    positions = np.array([[0, 1, 2, 0, 1, 2, 3]] * B, np.int32)
    document = np.array([[0, 0, 0, 3, 3, 3, 3]] * B, np.int32)
    packed = logits_of(TINY, values, ids, positions, spans.causal(S, start=document))
    alone = logits_of(TINY, values, ids[:, 3:], positions[:, 3:])
    np.testing.assert_allclose(packed[:, 3:], alone, atol=1e-5)
    shifted = logits_of(TINY, values, ids, POSITIONS + 1000)
    np.testing.assert_allclose(shifted, logits_of(TINY, values, ids), atol=1e-4)  # angles of 1e3 in fp32
    assert np.abs(logits_of(TINY, values, ids, 2 * POSITIONS) - logits_of(TINY, values, ids)).max() > 1e-3


@pytest.mark.parametrize("kind", ["scanned", "unrolled", "lengths by example"])
def test_rows_through_a_cache_equal_the_full_forward(kind):
    c = replace(TINY, qk_norm=True, scan_layers=kind == "scanned")
    values = random_params(c)
    ids = ids_of()
    full = logits_of(c, values, ids)
    model = backbone.Backbone(c)

    @functools.partial(jax.jit, static_argnums=3)
    def step(ids, positions, cache, rows):
        def run(m, ids):
            visible = spans.causal(rows, offset=cache.length)
            h, new = m(m.embed(ids), positions, visible, cache)
            return m.logits(h), new

        return model.apply({"params": values}, ids, method=run)[0:2]

    cache = backbone.empty_cache(c, B, S + 3)
    if kind == "lengths by example":
        cache = cache.replace(length=jnp.zeros(B, jnp.int32))
    at, got = 0, []
    for rows in (4, 1, 1, 1):
        logits, cache = step(ids[:, at : at + rows], POSITIONS[:, at : at + rows], cache, rows)
        got.append(logits)
        at += rows
    np.testing.assert_allclose(np.concatenate(got, axis=1), full, atol=1e-5)
    assert (np.asarray(cache.length) == S).all()


def test_rows_whose_length_is_set_back_leave_no_trace():
    c = replace(TINY, scan_layers=False)
    values, ids, model = random_params(c), ids_of(), backbone.Backbone(c)

    def run(m, ids, positions, cache):
        return m(m.embed(ids), positions, spans.causal(ids.shape[1], offset=cache.length), cache)

    step = jax.jit(lambda *args: model.apply({"params": values}, *args, method=run))
    _, cache = step(ids[:, :3], POSITIONS[:, :3], backbone.empty_cache(c, B, S))
    direct, _ = step(ids[:, 3:5], POSITIONS[:, 3:5], cache)
    _, tried = step(ids[:, 5:7], POSITIONS[:, 3:5], cache)
    again, _ = step(ids[:, 3:5], POSITIONS[:, 3:5], tried.replace(length=cache.length))
    np.testing.assert_array_equal(direct, again)


def test_rows_of_an_image_see_its_end_and_text_does_not():
    values, ids = random_params(TINY), ids_of()
    image = np.zeros((B, S), np.int32)
    image[:, 2:5] = 5
    before = logits_of(TINY, values, ids, visible=spans.bidirectional(image))
    changed = ids.copy()
    changed[:, 4] = (changed[:, 4] + 1) % TINY.vocab_size
    moved = np.abs(logits_of(TINY, values, changed, visible=spans.bidirectional(image)) - before).max((0, 2)) > 0
    np.testing.assert_array_equal(moved, [False, False, True, True, True, True, True])


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_rows_that_are_wanted_equal_those_of_all_and_the_last_block_makes_no_others(scan):
    c = replace(TINY, scan_layers=scan)
    values, ids, model = random_params(c), ids_of(), backbone.Backbone(c)
    rows = np.array([[1, 4, S - 1], [0, 0, 3]], np.int32)[:B]
    seen = spans.bidirectional(np.full((B, S), 5, np.int32), start=np.array([[0], [1]], np.int32)[:B])
    weights = np.random.default_rng(1).normal(size=(B, rows.shape[1], c.width)).astype(np.float32)

    def of(values, **given):
        def run(m, ids):
            h = m(m.embed(ids), POSITIONS, seen, **given)[0]
            return h if given else jnp.take_along_axis(h, rows[..., None], axis=1)

        h = model.apply({"params": values}, ids, method=run)
        return jnp.sum(weights * h), h

    wanted = functools.partial(of, rows_BR=rows)
    got, expected = (jax.jit(jax.value_and_grad(f, has_aux=True))(values) for f in (wanted, of))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    text = str(jax.make_jaxpr(wanted)(values))
    made = text.count(f"[{B * rows.shape[1]},{c.mlp_width}] = dot_general")
    assert made == (0 if scan else 2)  # the last block's gate and up, of wanted rows alone


def test_dropout_is_of_the_example_and_only_where_keys_are_given():
    c = replace(TINY, dropout=0.5)
    values, model, ids = random_params(c), backbone.Backbone(c), ids_of()
    run = jax.jit(
        lambda ids, keys: model.apply(
            {"params": values},
            ids,
            method=lambda m, ids: m(m.embed(ids), POSITIONS[: len(ids)], spans.causal(S), None, keys)[0],
        )
    )
    keys = jax.random.split(jax.random.key(0), B)
    both = run(ids, keys)
    np.testing.assert_allclose(run(ids[1:], keys[1:]), both[1:], atol=1e-6)
    assert np.abs(run(ids, keys[::-1]) - both).max() > 1e-2
    plain = model.apply({"params": values}, ids, POSITIONS, spans.causal(S), method="everything")
    np.testing.assert_allclose(plain, logits_of(replace(c, dropout=0.0), values, ids), atol=1e-5)


def test_soft_caps_and_z_loss_reach_the_loss():
    c = replace(TINY, logit_soft_cap=1.0, z_loss=0.1, tied_head=True)
    values, ids = random_params(c), ids_of()
    logits = logits_of(c, values, ids)
    assert 0.5 < np.abs(logits).max() <= 1
    weights = np.ones((B, S), np.float32)
    total, rows = backbone.Backbone(c).apply(
        {"params": values},
        ids,
        method=lambda m, ids: m.loss(m(m.embed(ids), POSITIONS, spans.causal(S))[0], ids, weights),
    )
    log_total = jax.nn.logsumexp(logits, axis=-1)
    nll = log_total - np.take_along_axis(np.asarray(logits), ids[..., None], -1)[..., 0]
    np.testing.assert_allclose(rows.nll, nll, atol=1e-5)
    np.testing.assert_allclose(total, np.sum(nll + 0.1 * log_total**2), rtol=1e-5)
    assert np.abs(logits_of(replace(c, attention_soft_cap=0.1), values, ids) - logits).max() > 1e-4


@pytest.mark.parametrize("changes", [{"heads": 3}, {"kv_heads": 3}, {"head_dim": 5}, {"dropout": 1.0}])
def test_sizes_that_do_not_fit_are_refused_in_one_line(changes):
    with pytest.raises(UserError) as error:
        backbone.init(replace(TINY, **changes), jax.random.key(0))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no preset 'llama9'"):
        backbone.preset("llama9")


def test_linear_scaling_divides_and_llama3_keeps_fast_pairs():
    plain = rope.frequencies(64, 500_000.0, settings.RopeScaling())
    linear = rope.frequencies(64, 500_000.0, settings.RopeScaling(kind="linear", factor=4.0))
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    ours = rope.frequencies(64, 500_000.0, settings.RopeScaling(kind="llama3"))
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(ours[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(ours[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [settings.Mesh(fsdp=8), settings.Mesh(data=2, fsdp=2, tensor=2)], ids=str)
def test_loss_and_gradients_are_the_same_on_every_mesh(sizes):
    c = replace(TINY, remat="dots", loss_chunk=3)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, c.vocab_size, (8, S)).astype(np.int32)
    values, model = random_params(c), backbone.Backbone(c)

    def loss(values, ids):
        def run(m, ids):
            h, _ = m(m.embed(ids), jnp.broadcast_to(jnp.arange(S), ids.shape), spans.causal(S))
            return m.loss(h[:, :-1], ids[:, 1:], jnp.ones((8, S - 1)))[0]

        return model.apply({"params": values}, ids, method=run)

    expected = jax.jit(jax.value_and_grad(loss))(values, ids)
    mesh = meshes.make_mesh(sizes)
    shardings, _ = shardings_of(jax.eval_shape(lambda: backbone.init(c, jax.random.key(0))), mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(values, shardings)
        got = jax.jit(jax.value_and_grad(loss))(placed, jax.device_put(ids, meshes.batch_sharding(mesh)))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got[1], expected[1])
