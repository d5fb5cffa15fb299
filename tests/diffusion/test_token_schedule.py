"""k(t) against the published counts and against the formulas by hand."""

import bisect
import math
from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.diffusion.time import grid
from ddt_jax.diffusion.token_schedule import TokenSchedule, weigh_gradients
from ddt_jax.errors import UserError

SELFTOK = settings.Schedule(
    kind="piecewise", direction="selftok", breakpoints=(200, 400, 600, 800, 1000), tokens=(192, 184, 72, 48, 16)
)
# Visible tokens of the released 512-token model over its 50 sampling steps.
PUBLISHED = """
512 511 509 508 506 505 503 501 500 498 497 492 487 482 477 473 468 463 458 453 449 441 434 427 420
413 405 398 391 384 376 358 339 321 303 284 266 248 229 211 192 172 154 135 116 96 77 58 39 20
"""


def counts(schedule, u, **kwargs):
    return np.asarray(schedule.count(jnp.asarray(u, jnp.float32), **kwargs))


def custom_by_hand(tau):
    """Last visible token of the released model at a whole number of thousandths, in integers."""
    ends, granted, low, base = SELFTOK.breakpoints, SELFTOK.tokens, 0, 0
    for high, n in zip(ends, granted, strict=True):
        if tau <= high:
            return min(base + n * (tau - low) // (high - low), 511)
        low, base = high, base + n


def test_piecewise_is_exact_at_every_thousandth():
    tau = np.arange(1001)
    expected = np.array([custom_by_hand(int(x)) for x in tau]) + 1
    schedule = TokenSchedule(SELFTOK, 512)
    u = np.nextafter(np.float32(tau / 1000), np.float32(2))  # 1000 u rounds to tau or just above it, never below
    np.testing.assert_array_equal(counts(schedule, u, sampling=True), expected)
    np.testing.assert_array_equal(counts(schedule, u), expected)
    np.testing.assert_array_equal(expected[[200, 400, 600, 800, 1000]] - 1, [192, 376, 448, 496, 511])


def test_one_segment_is_the_uniform_schedule():
    one = TokenSchedule(settings.Schedule(kind="piecewise", breakpoints=(1000,), tokens=(512,)), 512)
    uniform = TokenSchedule(settings.Schedule(kind="uniform"), 512)
    u = (np.arange(4000) + 0.5) / 4000
    np.testing.assert_array_equal(counts(one, u), counts(uniform, u))
    np.testing.assert_array_equal(one.probability_visible(), uniform.probability_visible())


def test_piecewise_is_exact_between_thousandths():
    tau = np.float32(1000) * np.random.default_rng(0).uniform(size=3000).astype(np.float32)
    ends, granted = SELFTOK.breakpoints, SELFTOK.tokens
    expected, near = [], []
    for x in map(Fraction, tau.astype(np.float64)):
        i = bisect.bisect_left(ends, x)
        low = ends[i - 1] if i else 0
        k = sum(granted[:i]) + granted[i] * (x - low) / (ends[i] - low)
        expected.append(min(math.floor(k), 511))
        near.append(abs(k - round(k)) < 1e-4)  # one unit in the last place of 1000 u
    assert 0 < np.sum(near) < 20
    found = counts(TokenSchedule(SELFTOK, 512), tau / np.float32(1000)) - 1
    np.testing.assert_array_equal(np.where(near, expected, found), expected)


@pytest.mark.parametrize("num_tokens", [64, 480, 512])
def test_uniform_and_logit_normal_are_exact_at_every_thousandth(num_tokens):
    tau = np.arange(1, 1000)
    u = np.nextafter(np.float32(tau / 1000), np.float32(2))
    uniform = TokenSchedule(settings.Schedule(kind="uniform", direction="selftok"), num_tokens)
    np.testing.assert_array_equal(counts(uniform, u) - 1, tau * num_tokens // 1000)
    normal = TokenSchedule(settings.Schedule(kind="logit_normal", direction="selftok"), num_tokens)
    phi = [math.erfc(-math.log(x / (1000 - x)) / math.sqrt(2)) / 2 * num_tokens for x in tau]
    # All but the middle, where Phi K is a whole number; what lies next to 0 or K is not near any other count.
    off = [abs(x - round(x)) > 1e-4 or not 0 < round(x) < num_tokens for x in phi]
    assert np.sum(off) == 998
    np.testing.assert_array_equal((counts(normal, u) - 1)[off], np.minimum(np.ceil(phi), num_tokens - 1)[off])


@pytest.mark.parametrize("num_tokens", [5, 16, 480, 1024])
def test_one_token_per_timestep_shows_as_many_tokens_as_the_timesteps_number(num_tokens):
    schedule = TokenSchedule(settings.Schedule(kind="timesteps", direction="selftok"), num_tokens)
    timestep = np.arange(num_tokens, 0, -1)
    np.testing.assert_array_equal(counts(schedule, grid(num_tokens)[:-1], sampling=True), timestep)
    # A time between two timesteps counts as the noisier one; "uniform" is the same there.
    between = (timestep - 0.5) / num_tokens
    np.testing.assert_array_equal(counts(schedule, between), timestep)
    uniform = TokenSchedule(settings.Schedule(kind="uniform", direction="selftok"), num_tokens)
    np.testing.assert_array_equal(counts(uniform, between), timestep)
    mirrored = TokenSchedule(settings.Schedule(kind="timesteps"), num_tokens)
    np.testing.assert_array_equal(counts(mirrored, 1 - grid(num_tokens)[:-1]), timestep)


def test_an_unpublished_schedule_answers_nothing():
    schedule = TokenSchedule(settings.Schedule(kind="unpublished"), 8)
    for ask in (schedule.check_known, lambda: counts(schedule, [0.5]), schedule.gradient_weights):
        with pytest.raises(UserError, match="'unpublished' does not say"):
            ask()


def test_piecewise_gives_the_published_integers_with_their_fp32_truncation():
    published = np.array(PUBLISHED.split(), int)
    schedule, u = TokenSchedule(SELFTOK, 512), grid(50)[:-1]
    np.testing.assert_array_equal(counts(schedule, u, sampling=True), published)
    # Exact arithmetic would show one token more where the fp32 product lies below the whole number.
    exact = np.array([custom_by_hand(1000 - 20 * i) for i in range(50)]) + 1
    assert set(1000 - 20 * np.nonzero(exact != published)[0]) == {100, 180, 200, 300, 360, 400}


def test_training_sees_the_published_mean_and_shares():
    k = counts(TokenSchedule(SELFTOK, 512), (np.arange(400_000) + 0.5) / 400_000)
    assert k.mean() == pytest.approx(354.1, abs=0.005)
    for token, share in ((0, 1.0), (192, 0.8), (376, 0.6), (448, 0.4), (496, 0.2), (511, 0.0125)):
        assert np.mean(k > token) == pytest.approx(share, abs=2e-5)


def test_logit_normal_has_the_published_last_tokens():
    schedule = TokenSchedule(settings.Schedule(kind="logit_normal", direction="selftok"), 512)
    u = [0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9]
    np.testing.assert_array_equal(counts(schedule, u) - 1, [8, 43, 176, 256, 337, 470, 505])
    assert counts(schedule, [0.0])[0] == 1 and counts(schedule, [1.0])[0] == 512


def test_logit_normal_is_its_formula_with_any_mean_and_width():
    schedule = TokenSchedule(
        settings.Schedule(kind="logit_normal", direction="selftok", logit_mean=0.4, logit_std=1.7), 24
    )
    u = np.random.default_rng(0).uniform(size=500).astype(np.float32)
    phi = [0.5 * (1 + math.erf((math.log(x / (1 - x)) - 0.4) / 1.7 / math.sqrt(2))) for x in u.astype(np.float64)]
    np.testing.assert_array_equal(counts(schedule, u), np.minimum(np.ceil(np.array(phi) * 24), 23) + 1)


EVERY_KIND = {
    "uniform": settings.Schedule(kind="uniform"),
    "timesteps": settings.Schedule(kind="timesteps"),
    "late": settings.Schedule(full_below=0.75),
    "piecewise": settings.Schedule(kind="piecewise", breakpoints=(200, 700, 1000), tokens=(9, 2, 5)),
    "crowded": settings.Schedule(kind="piecewise", breakpoints=(998, 1000), tokens=(2, 14)),
    "logit_normal": settings.Schedule(kind="logit_normal", logit_mean=-0.3),
}


@pytest.mark.parametrize("direction", ["coarse_first", "selftok"])
@pytest.mark.parametrize("groups", [0, 4])
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_probability_is_the_share_of_time_that_shows_a_token(kind, groups, direction):
    schedule = TokenSchedule(replace(EVERY_KIND[kind], groups=groups, direction=direction), 16)
    n = 1 << 17
    k = counts(schedule, (np.arange(n) + 0.5) / n)
    by_counting = np.array([np.mean(k > j) for j in range(16)])
    np.testing.assert_allclose(schedule.probability_visible(), by_counting, atol=2 / n + 1e-6)
    np.testing.assert_allclose(schedule.gradient_weights() * schedule.probability_visible(), 1, rtol=1e-6)


def test_gradient_weights_are_the_published_constants():
    weight = TokenSchedule(SELFTOK, 512).gradient_weights()
    # Published ones were estimated from draws: the rarest token's is 78.5, the exact one 80.
    for token, exact, published in (
        (0, 1, 1.0),
        (64, 15 / 14, 1.0712),
        (192, 1.25, 1.2504),
        (448, 2.5, 2.496),
        (496, 5.0, 4.993),
        (511, 80.0, 78.5),
    ):
        assert weight[token] == pytest.approx(exact, rel=1e-6)
        assert weight[token] == pytest.approx(published, rel=0.02 if token == 511 else 2e-3)


def test_weighing_gradients_leaves_values_alone():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    weight = np.array([1.0, 3.0, 0.1], np.float32)
    np.testing.assert_array_equal(weigh_gradients(x, weight), x)
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(weigh_gradients(x, weight))))(x)
    np.testing.assert_allclose(gradient, 2 * x * weight[:, None], rtol=1e-6)


@pytest.mark.parametrize("direction", ["coarse_first", "selftok"])
@pytest.mark.parametrize(("groups", "per_group"), [(1, 8), (3, 7), (8, 1), (8, 3), (10, 5), (64, 1), (48, 4)])
def test_every_prefix_of_groups_drives_its_own_share_of_the_steps(groups, per_group, direction):
    k = groups * 4
    schedule = TokenSchedule(settings.Schedule(kind="uniform", groups=groups, direction=direction), k)
    u = grid(groups * per_group)
    found = counts(schedule, u[:-1])
    if direction == "coarse_first":
        np.testing.assert_array_equal(found, np.repeat(np.arange(1, groups + 1) * 4, per_group))
        driven = [schedule.steps_driven(n, u) for n in (3, *range(4, k + 1, 4))]
        np.testing.assert_array_equal(driven, np.arange(groups + 1) * per_group)
    else:
        assert set(found) <= set(range(4, k + 1, 4)) and (np.diff(found) <= 0).all() and found[0] == k
        assert schedule.steps_driven(k - 1, u) == 0 and schedule.steps_driven(k, u) == len(u) - 1


def test_late_grows_as_the_noise_falls_and_is_full_below_its_threshold():
    schedule = TokenSchedule(settings.Schedule(kind="late", full_below=0.75), 16)
    u = np.array([1.0, 0.99, 0.9, 0.8, 0.76, 0.75, 0.3, 0.0])
    expected = [min(max(math.floor(min(1, (1 - x) / 0.25) * 16 + 1e-6) + 1, 1), 16) for x in u]
    np.testing.assert_array_equal(counts(schedule, u), expected)
    assert expected[0] == 1 and expected[-3:] == [16, 16, 16]


def test_uniform_gives_every_token_the_same_share_of_time():
    schedule = TokenSchedule(settings.Schedule(kind="uniform"), 10)
    k = counts(schedule, (np.arange(1000) + 0.5) / 1000)
    np.testing.assert_array_equal(np.bincount(k)[1:], 100)


@pytest.mark.parametrize("kind", ["uniform", "late", "piecewise"])
def test_directions_mirror_each_other(kind):
    extra = {"breakpoints": (250, 1000), "tokens": (12, 4)} if kind == "piecewise" else {}
    forward, backward = (
        TokenSchedule(settings.Schedule(kind=kind, direction=d, **extra), 16) for d in ("selftok", "coarse_first")
    )
    u = np.arange(17) / 16  # 1 - u is exact
    np.testing.assert_array_equal(counts(forward, u), counts(backward, 1 - u))
    assert (np.diff(counts(forward, u)) >= 0).all() and counts(forward, [1.0]) == 16
    assert counts(backward, [1.0]) == 1


def test_truncation_keeps_the_coarsest_tokens_of_either_direction():
    u = jnp.array([1.0, 0.5, 0.0])
    coarse = TokenSchedule(settings.Schedule(kind="uniform"), 8)
    start, end = coarse.visible(u, 3)
    np.testing.assert_array_equal([start, end], [[0, 0, 0], [1, 3, 3]])
    fine = TokenSchedule(settings.Schedule(kind="uniform", direction="selftok"), 8)
    start, end = fine.visible(u, 4)
    np.testing.assert_array_equal([start, end], [[4, 4, 4], [8, 5, 4]])  # 5..8 of 8, where the schedule shows them


def test_a_prefix_is_the_coarsest_tokens_whatever_the_noise():
    count = jnp.array([1, 3, 8, 9])
    coarse = TokenSchedule(settings.Schedule(kind="uniform"), 8)
    np.testing.assert_array_equal(coarse.prefix(count), [[0, 0, 0, 0], [1, 3, 8, 8]])
    fine = TokenSchedule(settings.Schedule(kind="uniform", direction="selftok"), 8)
    np.testing.assert_array_equal(fine.prefix(count), [[7, 5, 0, 0], [8, 8, 8, 8]])


@pytest.mark.parametrize("direction", ["coarse_first", "selftok"])
def test_truncation_to_all_tokens_changes_nothing(direction):
    schedule = TokenSchedule(settings.Schedule(direction=direction), 8)
    u = jnp.linspace(0, 1, 33)
    np.testing.assert_array_equal(schedule.visible(u), schedule.visible(u, jnp.full((33,), 8)))


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "piecewise", "breakpoints": (500,), "tokens": (8,)},
        {"kind": "piecewise", "breakpoints": (500, 1000), "tokens": (8,)},
        {"kind": "piecewise", "breakpoints": (500, 500, 1000), "tokens": (4, 2, 2)},
        {"kind": "piecewise", "breakpoints": (500, 1000), "tokens": (4, 5)},
        {"kind": "late", "full_below": 1.0},
        {"kind": "logit_normal", "logit_std": 0.0},
        {"groups": 3},
        {"groups": -2},
    ],
)
def test_settings_that_do_not_fit_are_refused(bad):
    with pytest.raises(UserError, match="model.schedule") as error:
        TokenSchedule(settings.Schedule(**bad), 8)
    assert "\n" not in str(error.value)
