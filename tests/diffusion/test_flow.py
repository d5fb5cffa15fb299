"""Path, prediction targets and solvers against algebra and closed-form solutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax.diffusion import paths, prediction, solvers

X0, NOISE = np.random.default_rng(0).normal(size=(2, 4, 3, 2)).astype(np.float32)
T = np.array([0.1, 0.4, 0.7, 0.95], np.float32)
KINDS = ["x0", "velocity", "noise"]


def test_path_ends_at_noise_when_time_is_one():
    np.testing.assert_array_equal(paths.interpolate(X0, NOISE, jnp.ones(4)), NOISE)
    np.testing.assert_array_equal(paths.interpolate(X0, NOISE, jnp.zeros(4)), X0)
    np.testing.assert_allclose(paths.interpolate(X0, NOISE, T)[1], 0.6 * X0[1] + 0.4 * NOISE[1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_implies_the_true_velocity_and_image(kind):
    x_t = paths.interpolate(X0, NOISE, T)
    perfect = prediction.target(kind, X0, NOISE)
    np.testing.assert_allclose(prediction.to_velocity(kind, perfect, x_t, T), NOISE - X0, atol=2e-5)
    np.testing.assert_allclose(prediction.to_x0(kind, perfect, x_t, T), X0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", KINDS)
def test_weighted_error_is_the_error_in_the_other_space(kind, space):
    x_t = paths.interpolate(X0, NOISE, T)
    wrong = prediction.target(kind, X0, NOISE) + 0.01
    velocity = prediction.to_velocity(kind, wrong, x_t, T)
    image = prediction.to_x0(kind, wrong, x_t, T)
    t = T[:, None, None]
    in_space = {"x0": image, "velocity": velocity, "noise": image + velocity}[space]
    expected = np.square(in_space - prediction.target(space, X0, NOISE)).mean((1, 2))
    own = np.square(wrong - prediction.target(kind, X0, NOISE)).mean((1, 2))
    np.testing.assert_allclose(prediction.loss_weight(kind, space, T) * own, expected, rtol=5e-3)
    assert t.shape == (4, 1, 1)


def test_weights_and_velocities_are_finite_at_the_ends_of_time():
    ends = jnp.array([0.0, 1.0])
    for kind in KINDS:
        assert np.isfinite(prediction.to_velocity(kind, X0[:2], NOISE[:2], ends)).all()
        for space in KINDS:
            assert np.isfinite(prediction.loss_weight(kind, space, ends)).all()


def test_euler_is_the_recurrence_by_hand():
    u = np.linspace(1, 0, 6, dtype=np.float32)
    t = u**2
    got = solvers.integrate(lambda x, u, t: x * u + t, jnp.float32(2.0), u, t)
    x = 2.0
    for i in range(5):
        x = x + (t[i + 1] - t[i]) * (x * u[i] + t[i])
    assert float(got) == pytest.approx(float(x), rel=1e-5)


def gaussian_velocity(x, t, mean=0.7, std=0.3):
    """E[noise - x0 | x_t] for x0 ~ N(mean, std^2)."""
    variance = ((1 - t) * std) ** 2 + t**2
    return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_error_falls_with_the_order_of_the_solver(method, order):
    """Between 0.9 and 0.1: at the ends of time log SNR is infinite, and the second order comes with a logarithm."""
    start = np.array([-1.5, 0.3, 2.0], np.float32)
    spread = np.sqrt((0.27**2 + 0.1**2) / (0.03**2 + 0.9**2))
    exact = 0.9 * 0.7 + spread * (start - 0.1 * 0.7)

    def error(steps):
        grid = np.linspace(0.9, 0.1, steps + 1)
        end = solvers.integrate(lambda x, u, t: gaussian_velocity(x, t), start, grid, grid, method)
        return float(np.max(np.abs(end - exact)))

    assert np.log2(error(32) / error(64)) == pytest.approx(order, abs=0.25)  # more steps, and fp32 shows


def test_multistep_is_the_recurrence_by_hand():
    t = np.array([1, 0.9, 0.6, 0.5, 0.1, 0])
    got = solvers.integrate(lambda x, u, t: gaussian_velocity(x, t), jnp.float32(0.8), t, t, "dpmpp_2m")
    x, before = 0.8, None
    for i in range(5):
        x0 = x - t[i] * gaussian_velocity(x, t[i])
        d = x0
        if 1 < i < 4:  # the second step follows one of infinite length in log SNR
            snr = np.log((1 - t[i - 1 : i + 2]) / t[i - 1 : i + 2])
            r = (snr[1] - snr[0]) / (snr[2] - snr[1])
            d = x0 + (x0 - before) / (2 * r)
        alpha = 1 - t[i + 1]
        exp_minus_h = t[i + 1] / alpha * (1 - t[i]) / t[i]
        x = t[i + 1] / t[i] * x + alpha * (1 - exp_minus_h) * d
        before = x0
    assert float(got) == pytest.approx(x, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, under NumPy 2
@pytest.mark.parametrize(("steps", "shift"), [(6, 1.0), (20, 3.0)])
def test_solvers_are_those_of_diffusers(oracle, steps, shift):
    torch, diffusers = oracle("torch"), oracle("diffusers")
    start = np.random.default_rng(1).normal(size=(2, 3, 4, 4)).astype(np.float32)
    for method, theirs in {
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
        ),
        "euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    }.items():
        theirs.set_timesteps(steps)
        x = torch.from_numpy(start)
        for sigma, time in zip(theirs.sigmas, theirs.timesteps, strict=False):
            x = theirs.step(gaussian_velocity(x, sigma), time, x).prev_sample
        grid = theirs.sigmas.numpy()
        assert len(grid) == steps + 1 and grid[-1] == 0
        ours = solvers.integrate(lambda x, u, t: gaussian_velocity(x, t), start, grid, grid, method)
        np.testing.assert_allclose(ours, x.numpy(), atol=2e-5)
        if method != "euler":
            first_order = solvers.integrate(lambda x, u, t: gaussian_velocity(x, t), start, grid, grid)
            assert np.abs(ours - first_order).max() > 1e-3


@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp_2m"])
def test_a_known_image_is_reached_from_any_noise(method):
    grid = np.linspace(1, 0, 5).astype(np.float32)

    def velocity(x, u, t):
        return prediction.to_velocity("x0", X0, x, jnp.full((4,), t))

    np.testing.assert_allclose(solvers.integrate(velocity, NOISE, grid, grid, method), X0, atol=1e-5)


def test_the_loop_is_one_compiled_body():
    grid = np.linspace(1, 0, 33).astype(np.float32)
    text = str(jax.make_jaxpr(lambda x: solvers.integrate(lambda x, u, t: jnp.tanh(x), x, grid, grid))(X0))
    assert text.count("tanh") == 1


def test_guidance_at_its_ends_is_one_of_the_predictions_bit_for_bit():
    for scale in (1, 1.0, jnp.float32(1)):
        np.testing.assert_array_equal(solvers.guide(X0, NOISE, scale), X0)
        np.testing.assert_array_equal(solvers.guide(X0, NOISE, 1 - scale), NOISE)
    np.testing.assert_allclose(solvers.guide(X0, NOISE, 3.0), 3 * X0 - 2 * NOISE, atol=1e-5)


def test_normal_numbers_have_their_quantiles():
    uniform = np.linspace(-1, 1, 9)[1:-1].astype(np.float32)
    expected = [-1.15035, -0.67449, -0.31864, 0, 0.31864, 0.67449, 1.15035]
    np.testing.assert_allclose(paths.to_normal(uniform), expected, atol=1e-4)
    drawn = paths.uniform(jax.random.key(0), 10_000)
    assert -1 < float(drawn.min()) < -0.99 and 0.99 < float(drawn.max()) < 1
    assert np.isfinite(paths.to_normal(np.float32(np.nextafter(np.float32(-1), np.float32(0)))))
