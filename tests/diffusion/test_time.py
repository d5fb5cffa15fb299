"""Noise levels: ranges, coverage, and that a row's draw is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.diffusion import paths, time
from ddt_jax.tokenizers.base import example_keys

SLOTS = np.arange(64, dtype=np.int32)


def draw(kind, slots=SLOTS, seed=0, **kwargs):
    flow = settings.Flow(time=kind, **kwargs)
    uniform = jax.vmap(lambda key: paths.uniform(key, 1))(example_keys(jax.random.key(seed), slots))
    return np.asarray(time.sample(flow, uniform[:, 0], slots, 64))


def test_stratified_puts_one_example_into_each_share():
    np.testing.assert_array_equal(np.floor(draw("stratified") * 64), SLOTS)
    assert not np.allclose(draw("stratified"), draw("stratified", seed=1))


@pytest.mark.parametrize("kind", ["uniform", "stratified", "logit_normal"])
def test_a_row_draws_the_same_whichever_micro_batch_it_is_in(kind):
    np.testing.assert_array_equal(draw(kind)[40:], draw(kind, SLOTS[40:]))


def test_uniform_and_logit_normal_have_their_distributions():
    many = np.arange(4000, dtype=np.int32)
    uniform = np.sort(draw("uniform", many))
    assert np.abs(uniform - np.linspace(0, 1, 4000)).max() < 0.03  # Kolmogorov-Smirnov at 1e-3: 0.031
    logit = draw("logit_normal", many, logit_mean=0.5, logit_std=2.0)
    back = np.log(logit / (1 - logit))
    assert abs(back.mean() - 0.5) < 0.15 and abs(back.std() - 2) < 0.1


def test_shift_keeps_the_ends_and_moves_the_middle_to_noise():
    u = jnp.linspace(0, 1, 5)
    np.testing.assert_allclose(time.shift(u, 4.0), 4 * u / (1 + 3 * u), atol=1e-6)
    np.testing.assert_allclose(time.shift(u, 1.0), u)
    assert float(time.shift(jnp.float32(0.5), 4.0)) == pytest.approx(0.8)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_grid_runs_from_one_to_zero(steps):
    grid = time.grid(steps)
    assert grid[0] == 1 and grid[-1] == 0 and grid.dtype == np.float32
    np.testing.assert_allclose(grid, np.linspace(1, 0, steps + 1), atol=1e-6)
