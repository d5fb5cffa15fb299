"""Tables, targets and solvers of the DDPM against published values and closed-form solutions, in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax.diffusion import ddpm

KINDS = ["x0", "velocity", "noise"]
METHODS = ["ddpm", "ddim", "dpmpp_2m"]
COSINE = ddpm.variance_kept("cosine", 1000)


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def test_cosine_table_is_the_published_formula_up_to_where_beta_is_clipped():
    n = np.arange(1001)
    f = np.cos((n / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(COSINE[:-1], f[:-1] / f[0], rtol=1e-9)  # β reaches 0.999 in the last step alone
    np.testing.assert_allclose(COSINE[-1], COSINE[-2] * 0.001, rtol=1e-12)
    # Transfusion writes it as about cos(t / T π / 2) (§2.2).
    assert np.abs(np.sqrt(COSINE) - np.cos(n / 1000 * np.pi / 2)).max() < 0.01


def test_linear_table_is_the_published_one():
    kept = ddpm.variance_kept("linear", 1000)
    assert kept[0] == 1 and kept[1] == 1 - 1e-4
    assert kept[-1] == pytest.approx(4.0e-5, rel=0.02)  # ACDiT, and every DDPM with these β
    assert kept[500] == pytest.approx(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:500]), rel=1e-12)
    short = ddpm.variance_kept("linear", 250)
    assert short[-1] == pytest.approx(kept[-1], rel=0.2)  # fewer steps, each with as much more noise


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_noise_only_grows(schedule):
    kept = ddpm.variance_kept(schedule, 1000)
    assert (np.diff(kept) < 0).all() and kept[-1] > 0 and len(kept) == 1001


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_implies_the_image_and_its_error_has_the_stated_size(kind):
    x0, noise = np.random.default_rng(0).normal(size=(2, 50))
    a, s = np.sqrt(COSINE[300]), np.sqrt(1 - COSINE[300])
    x = a * x0 + s * noise
    perfect = ddpm.target(kind, x0, noise, a, s)
    np.testing.assert_allclose(ddpm.to_x0(kind, perfect, x, a, s), x0, atol=1e-12)
    off = ddpm.to_x0(kind, perfect + 0.01, x, a, s) - x0
    np.testing.assert_allclose(np.abs(off), 0.01 * ddpm.x0_error(kind, jnp.float64(a), jnp.float64(s)), rtol=1e-9)


def test_velocity_turns_image_and_noise_by_a_quarter():
    """v is the derivative of x along the angle whose cosine is a (arXiv 2202.00512, appendix D)."""
    x0, noise, angle, tiny = 0.3, -1.2, 0.7, 1e-6
    at = lambda angle: np.cos(angle) * x0 + np.sin(angle) * noise  # noqa: E731
    derivative = (at(angle + tiny) - at(angle - tiny)) / (2 * tiny)
    assert ddpm.target("velocity", x0, noise, np.cos(angle), np.sin(angle)) == pytest.approx(derivative, abs=1e-8)


def test_grid_runs_from_the_last_step_to_the_image():
    np.testing.assert_array_equal(ddpm.grid(1000, 250), np.arange(1000, -1, -4))
    np.testing.assert_array_equal(ddpm.grid(1000, 1000), np.arange(1000, -1, -1))
    assert ddpm.grid(1000, 7)[[0, -1]].tolist() == [1000, 0]


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def run(method, denoise, x, steps, kept=COSINE):
    grid = ddpm.grid(len(kept) - 1, steps)
    return np.asarray(ddpm.integrate(denoise, jnp.asarray(x), keys(len(x), 1), kept, grid, method))


@pytest.mark.parametrize("steps", [1, 5, 250])
@pytest.mark.parametrize("method", METHODS)
def test_a_known_image_is_reached_from_any_noise(method, steps):
    x0 = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_allclose(run(method, lambda x, n: x0, 5 * x0[::-1], steps), x0, atol=1e-12)


def gaussian_x0(mean, std):
    """E[x0 | x_n] for x0 ~ N(mean, std²)."""

    def denoise(x, n):
        a2 = jnp.asarray(COSINE)[n]
        gain = jnp.sqrt(a2) * std**2 / (a2 * std**2 + 1 - a2)
        return mean + gain * (x - jnp.sqrt(a2) * mean)

    return denoise


MEAN, STD = 0.7, 0.3


@pytest.mark.parametrize("method", METHODS)
def test_samples_of_a_gaussian_have_its_mean_and_variance(method):
    noise = np.random.default_rng(0).normal(size=20_000)
    samples = run(method, gaussian_x0(MEAN, STD), noise, 250)
    assert samples.mean() == pytest.approx(MEAN, abs=4 * STD / np.sqrt(20_000))
    assert samples.std() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize(("method", "tolerance"), [("ddim", 4e-3), ("dpmpp_2m", 2e-4)])
def test_all_steps_follow_the_probability_flow_which_can_be_turned_round(method, tolerance):
    """Of a Gaussian it is affine: deviations from the mean keep their number of standard deviations."""
    start = np.linspace(-2, 2, 9)
    a2 = COSINE[-1]
    deviations = (start - np.sqrt(a2) * MEAN) / np.sqrt(a2 * STD**2 + 1 - a2)
    end = run(method, gaussian_x0(MEAN, STD), start, 1000)
    np.testing.assert_allclose(end, MEAN + STD * deviations, atol=tolerance)
    np.testing.assert_allclose((end - MEAN) / STD, deviations, atol=4 * tolerance)  # back to the noise it came from


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_error_falls_with_the_order_of_the_solver(method, order):
    """From step 900 to 100: the last step, to no noise at all, is of first order."""
    start = np.linspace(-2, 2, 9)
    spread = lambda n: np.sqrt(COSINE[n] * STD**2 + 1 - COSINE[n])  # noqa: E731
    exact = np.sqrt(COSINE[100]) * MEAN + spread(100) / spread(900) * (start - np.sqrt(COSINE[900]) * MEAN)

    def error(steps):
        grid = np.linspace(900, 100, steps + 1).astype(int)
        end = run_on(method, grid, start)
        return np.abs(end - exact).max()

    assert np.log2(error(50) / error(100)) == pytest.approx(order, abs=0.25)


def run_on(method, grid, start):
    """The recurrence of a solver along any grid, by hand."""
    x = last = start
    denoise = gaussian_x0(MEAN, STD)
    for i, (a, s, ratio) in enumerate(by_hand(grid, method)):
        x0 = np.asarray(denoise(x, grid[i]))
        ahead = x0 + ratio * (x0 - last)
        noise = (x - np.sqrt(COSINE[grid[i]]) * x0) / np.sqrt(1 - COSINE[grid[i]])
        x = a * ahead + s * noise if method == "ddim" else s * x / np.sqrt(1 - COSINE[grid[i]]) + a * ahead
        last = x0
    table = ddpm.recurrence(COSINE[grid], method)
    y = last = start
    for i, (of_x, of_x0, of_last, _) in enumerate(table):
        x0 = np.asarray(denoise(y, grid[i]))
        y, last = of_x * y + of_x0 * x0 + of_last * last, x0
    np.testing.assert_allclose(y, x, atol=1e-12)
    return y


def by_hand(grid, method):
    """(factor of x0, factor of noise or of x, share of the last difference) of each step, from the papers' formulas."""
    a, s = np.sqrt(COSINE[grid]), np.sqrt(1 - COSINE[grid])
    if method == "ddim":
        return [(a[i + 1], s[i + 1], 0.0) for i in range(len(grid) - 1)]
    log_snr = np.log(a / s)
    steps = []
    for i in range(len(grid) - 1):
        h = log_snr[i + 1] - log_snr[i]
        second = 0 < i < len(grid) - 2
        ratio = h / (2 * (log_snr[i] - log_snr[i - 1])) if second else 0.0
        steps.append((a[i + 1] * -np.expm1(-h), s[i + 1], ratio))
    return steps


@pytest.mark.parametrize("stride", [1, 4])
def test_ancestral_step_is_the_posterior(stride):
    """q(x_next | x, x0) of the joint normal distribution, by conditioning in covariance form."""
    grid = ddpm.grid(1000, 1000 // stride)
    table = ddpm.recurrence(COSINE[grid], "ddpm")
    for i in (0, 100 // stride, 700 // stride):
        now, after = COSINE[grid[i]], COSINE[grid[i + 1]]
        step = np.sqrt(now / after)
        variance, covariance = 1 - now, step * (1 - after)  # of x and with x_next, given x0
        gain = covariance / variance
        mean_x0 = np.sqrt(after) - gain * np.sqrt(now)
        left = (1 - after) - gain * covariance
        np.testing.assert_allclose(table[i], [gain, mean_x0, 0, np.sqrt(left)], atol=1e-10)
    np.testing.assert_allclose(table[-1], [0, 1, 0, 0], atol=1e-12)


def test_fresh_noise_is_an_examples_own():
    x = np.random.default_rng(0).normal(size=(4, 3))
    grid = ddpm.grid(1000, 10)
    own = keys(4)
    denoise = lambda x, n: 0.5 * x  # noqa: E731
    whole = ddpm.integrate(denoise, jnp.asarray(x), own, COSINE, grid, "ddpm")
    one = ddpm.integrate(denoise, jnp.asarray(x[2:3]), own[2:3], COSINE, grid, "ddpm")
    np.testing.assert_allclose(whole[2:3], one, rtol=1e-12)
    other = ddpm.integrate(denoise, jnp.asarray(x), keys(4, seed=5), COSINE, grid, "ddpm")
    assert np.abs(np.asarray(whole - other)).max() > 0.01
