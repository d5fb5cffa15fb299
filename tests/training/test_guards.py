"""Limits from windows that nothing bad gets into."""

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import settings
from ddt_jax.training import guards
from ddt_jax.training.guards import Guarded, Window

LENGTH, DEVIATIONS = 6, 3.0


@jax.jit
def after(window, values, finite):
    limits = window.limits(DEVIATIONS)
    return window.entered(values, limits, finite), limits


def test_limits_are_those_of_the_last_finite_values_each_cut_at_its_own_limit():
    rng, window, kept = np.random.default_rng(0), Window.empty(2, LENGTH), []
    for step in range(40):
        values = rng.normal(5, 1, 2).astype(np.float32)
        values[0] *= 20 if step in (2, 15) else 1
        finite = step not in (0, 7, 8, 30)
        if not finite:
            values[step % 2] = (np.nan, np.inf, -np.inf)[step % 3]
        window, limits = after(window, jnp.asarray(values), finite)
        last = np.array(kept[-LENGTH:], np.float64)
        expected = np.full(2, np.inf)
        if 2 * len(last) >= LENGTH:
            expected = last.mean(0) + DEVIATIONS * np.maximum(last.std(0), 0.01 * np.abs(last.mean(0)))
        np.testing.assert_allclose(limits, expected, rtol=1e-5)
        if finite:
            kept.append(np.minimum(values, expected))
    assert np.isfinite(window.values_RW).all() and int(window.count) == 36


def test_a_lasting_change_of_level_is_followed():
    window, skipped = Window.empty(1, LENGTH), []
    for step in range(60):
        value = jnp.array([1.0 if step < 10 else 3.0]) + 0.05 * (step % 3)
        window, limits = after(window, value, True)
        skipped.append(bool(value[0] > limits[0]))
    assert skipped[10] and not any(skipped[-20:])


def test_without_guards_the_optimizer_state_stays_what_it_was():
    inner = ({"mu": 1},)
    assert guards.with_guards(settings.Optimizer(), inner, 1) is inner
    assert guards.join(guards.split(inner)) is inner
    guarded = guards.with_guards(settings.Optimizer(spike_skip=6.0, guard_window=5), inner, 2)
    assert guarded.steps.values_RW.shape == (3, 5) and guarded.updates is None
    assert guards.join(guards.split(guarded)) is guarded and isinstance(guarded, Guarded)


def test_each_side_is_scaled_by_its_own_factor_and_one_changes_no_bit():
    tree = {"a": jnp.float32([0.1, 3]), "discriminator": {"b": jnp.float32(7)}}
    found = guards.scaled(tree, jnp.float32([1.0, 0.5]))
    assert found["a"].tolist() == tree["a"].tolist() and found["discriminator"]["b"] == 3.5
    assert guards.scaled({"a": jnp.float32(2)}, jnp.float32([0.5])) == {"a": 1.0}
