"""The parametric law: against scipy's minimiser, and against laws that are known, whose intervals must hold them."""

import numpy as np
import pytest
from scipy import optimize

from ddt_jax.errors import UserError
from ddt_jax.scaling import law

TRUE = law.Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # Hoffmann et al. 2022, eq. 10
SIZES, COUNTS = np.logspace(7, 9.5, 5), np.logspace(9, 11.5, 5)
PARAMS, TOKENS = (x.ravel() for x in np.meshgrid(SIZES, COUNTS))


def noisy(outcomes, sigma, outliers=0.0, seed=0):
    """Losses [outcomes, runs] of the true law; a share of them with eight times the noise."""
    rng = np.random.default_rng(seed)
    noise = sigma * rng.standard_normal((outcomes, len(PARAMS)))
    noise *= np.where(rng.random(noise.shape) < outliers, 8, 1)
    return TRUE.loss(PARAMS, TOKENS) * np.exp(noise)


def held(fits):
    """Parameter → in how many fits its interval of 95 % holds the true one."""
    found = {}
    for name in (*law.NAMES, "exponent"):
        bounds = np.array([fit.interval(name) for fit in fits])
        found[name] = int(((bounds[:, 0] <= getattr(TRUE, name)) & (getattr(TRUE, name) <= bounds[:, 1])).sum())
    return found


def test_without_noise_the_law_is_found():
    found = law.fit(PARAMS, TOKENS, TRUE.loss(PARAMS, TOKENS), draws=1).law
    for name in law.NAMES:
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3)


def test_no_start_of_scipy_finds_less_loss():
    """Huber's loss written down again, minimised by another program from the truth and from around our answer."""
    losses = noisy(1, 0.01, outliers=0.1)[0]
    ours = law.fit(PARAMS, TOKENS, losses, draws=1)

    def objective(theta):
        e, a, b, alpha, beta = theta
        said = np.logaddexp.reduce([np.full(len(PARAMS), e), a - alpha * np.log(PARAMS), b - beta * np.log(TOKENS)])
        size = np.abs(np.log(losses) - said)
        return np.where(size < ours.huber, size**2 / 2, ours.huber * (size - ours.huber / 2)).sum()

    rng = np.random.default_rng(0)
    for start in (TRUE, ours.law):
        theta = np.array([*np.log([start.E, start.A, start.B]), start.alpha, start.beta])
        theta = theta + 0.02 * rng.standard_normal(5)
        theirs = optimize.minimize(objective, theta, method="Nelder-Mead", options={"maxiter": 4000, "maxfev": 4000})
        assert ours.objective <= theirs.fun * (1 + 1e-4)
    theta = np.array([*np.log([ours.law.E, ours.law.A, ours.law.B]), ours.law.alpha, ours.law.beta])
    assert objective(theta) == pytest.approx(ours.objective, rel=1e-6)


def test_a_few_bad_runs_do_not_pull_the_law_away():
    losses = TRUE.loss(PARAMS, TOKENS) * np.exp(0.002 * np.random.default_rng(0).standard_normal(len(PARAMS)))
    losses[[3, 11]] *= 1.3
    assert law.fit(PARAMS, TOKENS, losses, draws=1).law.alpha == pytest.approx(TRUE.alpha, rel=0.1)


def test_the_best_size_is_where_no_other_of_its_cost_loses_less():
    params, tokens = TRUE.optimum(1e20, 6)
    assert 6 * params * tokens == pytest.approx(1e20)
    others = params * np.array([0.9, 1.1])
    assert (TRUE.loss(others, 1e20 / 6 / others) > TRUE.loss(params, tokens)).all()
    assert np.log(TRUE.optimum(1e22, 6)[0] / params) / np.log(100) == pytest.approx(TRUE.exponent)


@pytest.mark.parametrize(
    ("params", "tokens", "said"),
    [
        ([1, 2, 3, 1, 2], [1, 2, 3, 2, 3], "6 runs or more, there are 5"),
        ([1, 1, 2, 2, 1, 2], [1, 2, 3, 1, 2, 3], "3 sizes or more, there are 2"),
        ([1, 2, 3, 1, 2, 3], [5, 5, 5, 5, 5, 5], "3 token counts or more, there are 1"),
        ([1, 2, 4] * 9, [4, 2, 1] * 9, "6 pairs of size and token count or more, there are 3"),  # rates and seeds
        ([1, 2, 4] * 3, [4, 2, 1, 4.01, 2.01, 1.01, 4.02, 2.02, 1.02], "6 pairs .* there are 3"),  # packed by seed
        ([1, 2, 4, 8, 16, 32], [32, 16, 8, 4, 2, 1.001], "2 costs or more, there are 1"),
    ],
)
def test_runs_that_do_not_determine_a_law_are_refused(params, tokens, said):
    with pytest.raises(UserError, match=said):
        law.fit(params, tokens, [1.0] * len(params))


def test_intervals_hold_the_truth_in_most_of_twelve_outcomes():
    found = held(law.fit_many(PARAMS, TOKENS, noisy(12, 0.01), draws=60))
    assert min(found.values()) >= 9, found


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "outliers"), [(0.003, 0.0), (0.01, 0.08)])
def test_intervals_hold_the_truth_in_90_of_100_outcomes(sigma, outliers):
    found = held(law.fit_many(PARAMS, TOKENS, noisy(100, sigma, outliers), draws=100))
    assert min(found.values()) >= 90, found
