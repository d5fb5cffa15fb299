"""What training and sampling see of a path: the same contract for all of them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.diffusion import paths
from ddt_jax.diffusion.process import make_process
from ddt_jax.errors import UserError

DDPM, FLOW = settings.DDPM(), settings.RectifiedFlow()
KINDS = ["x0", "velocity", "noise"]
X0, NOISE = np.random.default_rng(0).normal(size=(2, 4, 3, 2)).astype(np.float32)
T = np.array([0.1, 0.4, 0.7, 0.95], np.float32)
SOLVERS = [(DDPM, s) for s in ("ddpm", "ddim", "dpmpp_2m")] + [(FLOW, s) for s in ("euler", "heun", "dpmpp_2m")]


def keys(count):
    return jax.random.split(jax.random.key(0), count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [DDPM, FLOW], ids=["ddpm", "flow"])
def test_a_perfect_prediction_implies_the_image(path, kind):
    process = make_process(replace(path, prediction=kind))
    x_t = process.noised(X0, NOISE, T)
    a, s = process.scales(T)
    np.testing.assert_allclose(x_t, a[:, None, None] * X0 + s[:, None, None] * NOISE, atol=1e-6)
    np.testing.assert_allclose(process.to_x0(process.target(X0, NOISE, T), x_t, T), X0, atol=1e-4)


def test_ddpm_noises_as_published_and_predicts_the_noise():
    """x_t = sqrt(ᾱ) x0 + sqrt(1 - ᾱ) ε, ε is the target (Transfusion eq. 2-3)."""
    process = make_process(DDPM)
    kept = np.cos((T.astype(np.float64) + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    kept = kept[:, None, None]
    np.testing.assert_allclose(process.noised(X0, NOISE, T), kept**0.5 * X0 + (1 - kept) ** 0.5 * NOISE, atol=2e-6)
    np.testing.assert_array_equal(process.target(X0, NOISE, T), NOISE)
    np.testing.assert_array_equal(process.noised(X0, NOISE, jnp.zeros(4)), X0)
    np.testing.assert_allclose(process.noised(X0, NOISE, jnp.ones(4)), NOISE, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [DDPM, FLOW], ids=["ddpm", "flow"])
def test_min_snr_weighs_the_error_in_the_image_by_what_is_published(path, kind):
    """w = min(SNR, γ) on the squared error in x0, whatever is predicted (arXiv 2303.09556 §3.4)."""
    process = make_process(replace(path, prediction=kind, min_snr=5.0))
    x_t = process.noised(X0, NOISE, T)
    wrong = np.asarray(process.target(X0, NOISE, T)) + 0.01
    in_image = np.square(np.asarray(process.to_x0(wrong, x_t, T)) - X0).mean((1, 2))
    a, s = (np.asarray(x, np.float64) for x in process.scales(T))
    np.testing.assert_allclose(process.weight(T) * 1e-4, np.minimum((a / s) ** 2, 5.0) * in_image, rtol=2e-2)
    np.testing.assert_array_equal(make_process(replace(path, prediction=kind)).weight(T), np.ones(4))


def test_min_snr_is_its_published_form_for_noise_and_velocity():
    for kind, extra in (("noise", lambda snr: snr), ("velocity", lambda snr: snr + 1)):
        process = make_process(settings.DDPM(prediction=kind, min_snr=5.0))
        a, s = (np.asarray(x, np.float64) for x in process.scales(T))
        snr = (a / s) ** 2
        np.testing.assert_allclose(process.weight(T), np.minimum(snr, 5) / extra(snr), rtol=1e-4)


@pytest.mark.parametrize("time", ["uniform", "logit_normal"])
def test_steps_are_drawn_from_one_to_the_limit(time):
    process = make_process(settings.DDPM(time=time))
    uniform = jax.vmap(lambda key: paths.uniform(key, 1)[0])(keys(20_000))
    n = np.asarray(process.draw(uniform)) * 1000
    np.testing.assert_allclose(n, np.round(n), atol=1e-3)
    assert n.min() >= 1 and n.max() <= 1000
    limited = np.round(np.asarray(process.draw(uniform, 0.5)) * 1000)
    assert limited.min() >= 1 and limited.max() <= 500
    if time == "uniform":
        assert n.min() < 3 and n.max() > 998 and limited.max() == 500
        assert abs(n.mean() - 500.5) < 8 and abs(limited.mean() - 250.5) < 4
    else:
        assert abs(np.median(n) - 500) < 10 and abs(np.median(limited) - 250) < 5
    each = np.where(np.arange(20_000) % 2, 0.5, 1.0).astype(np.float32)
    np.testing.assert_array_equal(process.draw(uniform, each)[1::2], process.draw(uniform, 0.5)[1::2])
    if time == "uniform":
        ends = process.draw(jnp.float32([-1, 1]) * np.nextafter(np.float32(1), np.float32(0)))
        np.testing.assert_allclose(ends, [0.001, 1.0], atol=1e-6)


def test_flow_is_drawn_up_to_the_limit_and_shifted():
    uniform = jnp.linspace(-0.999, 0.999, 2001)
    plain = make_process(settings.RectifiedFlow(time="uniform"))
    np.testing.assert_allclose(plain.draw(uniform), (1 + uniform) / 2, atol=1e-6)
    np.testing.assert_allclose(plain.draw(uniform, 0.5), (1 + uniform) / 4, atol=1e-6)
    shifted = make_process(settings.RectifiedFlow(time="uniform", shift=3.0)).draw(uniform)
    assert float(shifted[1000]) == pytest.approx(0.75)


@pytest.mark.parametrize(("path", "solver"), SOLVERS, ids=[f"{p.kind} {s}" for p, s in SOLVERS])
@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_reaches_a_known_image_in_one_call(path, solver, kind):
    process = make_process(replace(path, solver=solver, prediction=kind))

    def predict(x, t):
        """What a network that knows the image would predict: the noise that is left."""
        a, s = process.scales(t)
        noise = (x - a * X0) / jnp.maximum(s, 1e-6)
        return process.target(X0, noise, t)

    np.testing.assert_allclose(process.solve(predict, NOISE, keys(4), steps=10), X0, atol=3e-3)


@pytest.mark.parametrize(("path", "solver"), SOLVERS, ids=[f"{p.kind} {s}" for p, s in SOLVERS])
def test_images_are_held_to_their_range(path, solver):
    process = make_process(replace(path, solver=solver, prediction="noise", clip=1.0))
    wild = process.solve(lambda x, t: -3 * x, NOISE, keys(4), steps=5)
    assert np.abs(wild).max() <= 1 + 1e-5
    free = make_process(replace(path, solver=solver, prediction="noise"))
    assert np.abs(free.solve(lambda x, t: -3 * x, NOISE, keys(4), steps=5)).max() > 2


def test_steps_of_the_settings_are_taken_where_none_are_given():
    calls = []
    process = make_process(settings.DDPM(solver="ddim", solver_steps=7))
    with jax.disable_jit():
        process.solve(lambda x, t: (calls.append(round(float(t) * 1000)), x)[1], jnp.asarray(NOISE))
    assert calls == [1000, 857, 714, 571, 429, 286, 143]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (settings.DDPM(solver_steps=2000), "must lie between 1 and diffusion.steps=1000"),
        (settings.RectifiedFlow(solver_steps=0), "solver_steps=0 must be at least 1"),
        (settings.DDPM(min_snr=-1.0), "min_snr=-1.0"),
    ],
)
def test_settings_that_cannot_work_are_one_line(config, message):
    with pytest.raises(UserError, match=message) as error:
        make_process(config)
    assert "\n" not in str(error.value)
