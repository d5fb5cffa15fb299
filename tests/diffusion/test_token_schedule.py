"""k(t) against the published counts and against the formulas by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.diffusion.time import grid
from ddt_jax.diffusion.token_schedule import TokenSchedule
from ddt_jax.errors import UserError

SELFTOK = settings.Schedule(
    kind="piecewise", direction="selftok", breakpoints=(200, 400, 600, 800, 1000), tokens=(192, 184, 72, 48, 16)
)
# Visible tokens of the released 512-token model over its 50 sampling steps.
PUBLISHED = [
    *(
        512,
        511,
        509,
        508,
        506,
        505,
        503,
        501,
        500,
        498,
        497,
        492,
        487,
        482,
        477,
        473,
        468,
        463,
        458,
        453,
        449,
        441,
        434,
    ),
    *(427, 420, 413, 405, 398, 391, 384, 376, 358, 339, 321, 303, 284, 266, 248, 229, 211, 192, 172, 154, 135, 116, 96),
    *(77, 58, 39, 20),
]


def counts(schedule, u):
    return np.asarray(schedule.count(jnp.asarray(u, jnp.float32)))


def test_piecewise_gives_the_published_integers_with_their_fp32_truncation():
    np.testing.assert_array_equal(counts(TokenSchedule(SELFTOK, 512), grid(50)[:-1]), PUBLISHED)


def test_piecewise_share_of_time_at_which_a_token_is_seen():
    k = counts(TokenSchedule(SELFTOK, 512), (np.arange(100_000) + 0.5) / 100_000)
    for token, share in ((0, 1.0), (192, 0.8), (376, 0.6), (448, 0.4), (496, 0.2)):
        assert np.mean(k > token) == pytest.approx(share, abs=0.002)
    assert k.mean() == pytest.approx(354.1, abs=0.5)


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
    ],
)
def test_settings_that_do_not_fit_are_refused(bad):
    with pytest.raises(UserError, match="model.schedule"):
        TokenSchedule(settings.Schedule(**bad), 8)
