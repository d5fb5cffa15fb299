"""Iso-FLOP parabolas on losses whose bottoms are known."""

import numpy as np
import pytest

from ddt_jax.scaling import isoflop

COSTS = np.logspace(17, 20, 4)
SPREAD = np.logspace(-0.8, 0.8, 6)


def runs(exponent=0.5, noise=0.0, seed=0):
    """(params, tokens, flops, losses): at each cost an exact parabola with its bottom at 0.05 C^exponent."""
    best = 0.05 * COSTS**exponent
    params = (best[:, None] * SPREAD).ravel()
    flops = np.repeat(COSTS, len(SPREAD))
    losses = 2 + 50 * flops**-0.1 + 0.05 * np.tile(np.log(SPREAD) ** 2, len(COSTS))
    losses = losses + noise * np.random.default_rng(seed).standard_normal(len(losses))
    return params, flops / 6 / params, flops, losses


def test_bottoms_and_their_growth_are_found():
    params, tokens, flops, losses = runs()
    found = isoflop.fit(params, tokens, flops, losses, draws=50)
    assert found.exponent == pytest.approx(0.5) and found.coefficient == pytest.approx(0.05)
    for valley, cost in zip(found.valleys, COSTS, strict=True):
        assert valley.flops == pytest.approx(cost)
        assert valley.params == pytest.approx(0.05 * cost**0.5)
        assert valley.tokens == pytest.approx(cost / 6 / valley.params)
        assert valley.loss == pytest.approx(2 + 50 * cost**-0.1)


def test_the_interval_of_the_growth_holds_it_in_90_of_100_outcomes():
    held = 0
    for seed in range(100):
        found = isoflop.fit(*runs(0.47, noise=0.01, seed=seed), draws=200)
        held += found.exponent_interval[0] <= 0.47 <= found.exponent_interval[1]
    assert held >= 90


def test_runs_of_about_one_cost_are_one_budget_however_they_are_listed():
    assert isoflop.budgets([1e18, 1.05e17, 1e17, 0.98e18, 1.1e17]) == [[2, 1, 4], [3, 0]]


def test_a_bottom_outside_of_the_sizes_is_not_made_up():
    params, tokens, flops, losses = runs()
    small = np.tile(SPREAD < 1, len(COSTS))
    few = isoflop.fit(params[small], tokens[small], flops[small], losses[small], draws=20)
    assert {valley.why for valley in few.valleys} == {"3 sizes, a parabola takes 4"} and few.exponent is None
    rising = isoflop.fit(params[:4], tokens[:4], flops[:4], np.log(params[:4]) ** 2 * 0.01, draws=20)
    assert rising.valleys[0].params is None and "below all sizes; train smaller ones" in rising.valleys[0].why
    noise = 0.2 * np.array([1, -1, 1, -1, 1, -1])  # as high as the walls of the valley
    noisy = isoflop.fit(params[:6], tokens[:6], flops[:6], losses[:6] + noise, draws=200)
    assert "too noisy" in noisy.valleys[0].why
    hill = isoflop.fit(params[:6], tokens[:6], flops[:6], 9 - losses[:6], draws=20)
    assert "opens downwards" in hill.valleys[0].why
