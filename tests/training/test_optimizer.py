"""Which parameter gets which optimizer, and what an update is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn.params import Declaration
from ddt_jax.training.optimizer import learning_rate, make_optimizer, table, with_part_rates

MATRIX = Declaration(axes=("embed", "mlp"), group="matrix", matrix=((-2,), (-1,)))
STACK = Declaration(axes=("layers", "embed", None, "heads", "head_dim"), group="matrix", matrix=((-4,), (-2, -1)))
BIAS = Declaration(axes=("mlp",), decay=False)
FROZEN = Declaration(axes=("mlp",), group="frozen")
JUDGE = Declaration(axes=("mlp",), group="discriminator")


def one_update(declarations, params, grads, **kwargs):
    s = settings.Optimizer(lr=1.0, warmup=0, schedule="constant", clip_norm=0.0, **kwargs)
    tx = make_optimizer(s, 10, declarations)
    return tx.update(grads, tx.init(params), params)[0]


def test_muon_update_is_orthogonal_with_the_stated_size():
    g = jax.random.normal(jax.random.key(0), (16, 64))
    u = one_update({"w": MATRIX}, {"w": jnp.zeros((16, 64))}, {"w": g}, weight_decay=0.0)["w"]
    singular = np.linalg.svd(np.asarray(u) / (0.2 * 8), compute_uv=False)  # 8 = sqrt(max(16, 64))
    # Newton-Schulz with the usual coefficients drives the singular values to within [0.68, 1.13].
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert np.sum(np.asarray(u) * np.asarray(g)) < 0


def test_the_steps_of_muon_are_a_loop_and_its_state_is_that_of_optax():
    s = settings.Optimizer(newton_schulz_steps=3)
    tx, g = make_optimizer(s, 10, {"w": MATRIX}), {"w": jnp.ones((4, 8))}
    state = tx.init(g)
    compiled = jax.jit(tx.update).lower(g, state, g).compile()
    assert " while(" in compiled.as_text(), "written out, the steps of all matrices are up to half of a train step"
    theirs = optax.contrib.scale_by_muon(ns_steps=3).init(g)
    for found in (state, compiled(g, state, g)[1]):
        muon = found[1].inner_states["muon"].inner_state[0]
        assert jax.tree.map(jnp.shape, muon) == jax.tree.map(jnp.shape, theirs)


def test_every_matrix_of_a_stack_is_its_own():
    shape = (2, 8, 2, 2, 4)
    g = jax.random.normal(jax.random.key(1), shape)
    u = one_update({"w": STACK}, {"w": jnp.zeros(shape)}, {"w": g}, weight_decay=0.0)["w"]
    for layer in range(2):
        for part in range(2):
            alone = one_update(
                {"w": MATRIX}, {"w": jnp.zeros((8, 8))}, {"w": g[layer, :, part].reshape(8, 8)}, weight_decay=0.0
            )["w"]
            np.testing.assert_allclose(u[layer, :, part].reshape(8, 8), alone, atol=1e-5)


def test_the_rest_is_adamw_and_frozen_stays():
    declarations = {"w": MATRIX, "b": BIAS, "f": FROZEN}
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones((4,)), "f": jnp.ones((4,))}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape), params)
    u = one_update(declarations, params, grads, name="adamw", weight_decay=0.1, b1=0.9, b2=0.99)
    adam = optax.adamw(1.0, b1=0.9, b2=0.99, weight_decay=0.1)
    expected = adam.update(grads, adam.init(params), params)[0]["w"]
    np.testing.assert_allclose(u["w"], expected, rtol=1e-6)
    plain = optax.adam(1.0, b1=0.9, b2=0.99)
    np.testing.assert_allclose(u["b"], plain.update(grads, plain.init(params))[0]["b"], rtol=1e-6)
    assert (u["f"] == 0).all()


def test_lr_scale_multiplies_the_whole_update():
    slow = Declaration(axes=("mlp",), lr_scale=0.1)
    p, g = {"w": jnp.ones((4,))}, {"w": jnp.ones((4,))}
    full = one_update({"w": Declaration(axes=("mlp",))}, p, g)["w"]
    np.testing.assert_allclose(one_update({"w": slow}, p, g)["w"], 0.1 * full, rtol=1e-6)


def test_parts_have_rates_of_their_own():
    declarations = {"decoder": {"embed": MATRIX, "blocks": {"image": MATRIX, "token": BIAS}}, "encoder": BIAS}
    params = jax.tree.map(lambda d: jnp.ones((4,) * len(d.axes)), declarations)
    parts = (("decoder/*", 0.5), ("decoder/blocks/*", 0.1), ("decoder/blocks/tok*", 2.0))
    parts = tuple(settings.PartRate(part=part, times=times) for part, times in parts)
    scaled = with_part_rates(declarations, parts)
    plain, now = (one_update(d, params, params, name="adamw", weight_decay=0.1) for d in (declarations, scaled))
    ratios = jax.tree.map(lambda a, b: float((b / a).mean()), plain, now)
    wanted = {"decoder": {"embed": 0.5, "blocks": {"image": 0.1, "token": 2.0}}, "encoder": 1.0}
    assert jax.tree.map(lambda x: round(x, 5), ratios) == wanted
    assert with_part_rates(declarations, ()) is declarations
    with pytest.raises(UserError, match=r"no parameter's name fits 'decoder/bloks/\*'; they are such as decoder"):
        with_part_rates(declarations, (settings.PartRate(part="decoder/bloks/*"),))


def clipped_update(scale_w, scale_judge):
    """First update of a parameter and a discriminator whose gradients have these lengths; plain descent shows them."""
    s = settings.Optimizer(name="adamw", lr=1.0, warmup=0, schedule="constant", clip_norm=1.0, eps=1e3)
    s = dataclasses.replace(s, discriminator=settings.DiscriminatorOptimizer(lr=0.5, clip_norm=2.0))
    declarations, params = {"w": BIAS, "discriminator": JUDGE}, {"w": jnp.ones((4,)), "discriminator": jnp.ones((4,))}
    tx = make_optimizer(s, 10, declarations)
    grads = {"w": jnp.full((4,), scale_w / 2), "discriminator": jnp.full((4,), scale_judge / 2)}
    updates = tx.update(grads, tx.init(params), params)[0]
    # With such an epsilon Adam's first step is the gradient / epsilon.
    return [float(jnp.linalg.norm(updates[name])) * 1e3 for name in ("w", "discriminator")]


def test_a_discriminator_is_clipped_by_itself():
    np.testing.assert_allclose(clipped_update(100.0, 100.0), [1.0, 0.5 * 2.0], rtol=2e-3)
    np.testing.assert_allclose(clipped_update(100.0, 0.1), [1.0, 0.5 * 0.1], rtol=2e-3)
    np.testing.assert_allclose(clipped_update(0.1, 100.0), [0.1, 0.5 * 2.0], rtol=2e-3)


def test_a_discriminator_has_adam_without_decay_and_its_own_rate_and_betas():
    s = settings.Optimizer(lr=1.0, warmup=0, schedule="constant", clip_norm=0.0, weight_decay=0.1)
    s = dataclasses.replace(s, discriminator=settings.DiscriminatorOptimizer(lr=0.25, b1=0.5, b2=0.9, clip_norm=0.0))
    params = {"w": jnp.ones((4, 4)), "discriminator": jnp.ones((4,))}
    tx, own = make_optimizer(s, 10, {"w": MATRIX, "discriminator": JUDGE}), optax.adam(0.25, b1=0.5, b2=0.9)
    state, own_state = tx.init(params), own.init(params["discriminator"])
    for step in range(3):
        grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(step), p.shape), params)  # noqa: B023
        updates, state = tx.update(grads, state, params)
        expected, own_state = own.update(grads["discriminator"], own_state)
        np.testing.assert_allclose(updates["discriminator"], expected, rtol=1e-5)


def test_without_a_discriminator_the_state_has_no_place_for_one():
    """Checkpoints of runs that never heard of discriminators go on."""

    def places(declarations):
        tx = make_optimizer(settings.Optimizer(name="adamw"), 10, declarations)
        state = tx.init(jax.tree.map(lambda d: jnp.ones((4,)), declarations))
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]

    assert not [p for p in places({"w": BIAS}) if "discriminator" in p]
    assert [p for p in places({"w": BIAS, "d": JUDGE}) if "discriminator" in p]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedule_warms_up_and_ends_where_it_says(kind):
    s = settings.Optimizer(lr=2.0, schedule=kind, warmup=10, decay_fraction=0.5, final_lr_fraction=0.1)
    rate = learning_rate(s, 100)
    np.testing.assert_allclose([rate(0), rate(9), rate(10)], [0.2, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rate(100), 2.0 if kind == "constant" else 0.2, rtol=1e-6)
    if kind == "linear":
        np.testing.assert_allclose([rate(50), rate(75)], [2.0, 1.1], rtol=1e-6)


def test_warmup_longer_than_the_run_is_no_error():
    rate = learning_rate(settings.Optimizer(lr=1.0, warmup=50), 10)
    assert np.isfinite([float(rate(i)) for i in range(11)]).all()


def test_box_that_is_no_matrix_cannot_ask_for_muon():
    with pytest.raises(ValueError):
        Declaration(axes=("embed",), group="matrix")
    with pytest.raises(ValueError):
        Declaration(axes=("embed", "mlp"), group="matrix", matrix=((0,), (1,)))


def test_table_names_every_parameter_and_joins_equal_blocks():
    params = {"block_0": {"w": jnp.zeros((4, 8))}, "block_1": {"w": jnp.zeros((4, 8))}, "b": jnp.zeros((8,))}
    declarations = {"block_0": {"w": MATRIX}, "block_1": {"w": MATRIX}, "b": BIAS}
    mesh = meshes.make_mesh(settings.Mesh())
    spec = NamedSharding(mesh, PartitionSpec("fsdp", None))
    shardings = jax.tree.map(lambda p: spec if p.ndim == 2 else meshes.replicated(mesh), params)
    lines = [line.split() for line in table(params, declarations, shardings, settings.Optimizer()).splitlines()]
    assert lines[1] == ["b", "8", "adamw", "0", "x1", "()"]
    assert lines[2] == ["block_*/w", "(2)", "4x8", "muon", "0.01", "x1", "(fsdp,", "-)"]
    assert len(lines) == 3
