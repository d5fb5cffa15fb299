from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_jax.errors import UserError
from ddt_jax.multimodal.mixture import Proportions, whole_weights

weights = st.lists(st.integers(0, 50), min_size=1, max_size=7).filter(any)


@settings(deadline=None, max_examples=40)
@given(weights, st.integers(0, 2**40), st.integers(1, 300))
def test_any_number_is_found_without_the_ones_before(weights, start, count):
    series = Proportions({str(i): w for i, w in enumerate(weights)}, 7)
    choice, rank = series(np.arange(start, start + count))
    for k in (0, count // 2, count - 1):
        one, its_rank = series(start + k)
        assert (choice[k], rank[k]) == (one, its_rank)
    # The ranks of an option go up by one each time it is chosen.
    for option in set(choice.tolist()):
        mine = rank[choice == option]
        assert (np.diff(mine) == 1).all()


@settings(deadline=None, max_examples=40)
@given(weights, st.integers(0, 1000))
def test_ranks_count_from_the_beginning_and_shares_are_exact_at_every_prefix(weights, seed):
    series = Proportions({str(i): w for i, w in enumerate(weights)}, seed)
    choice, rank = series(np.arange(200))
    seen = [0] * len(weights)
    for m, (option, r) in enumerate(zip(choice.tolist(), rank.tolist(), strict=True), start=1):
        assert r == seen[option]
        seen[option] += 1
        for i, w in enumerate(weights):
            # Each of the at most three levels of the tree rounds by less than one.
            assert abs(seen[i] - Fraction(m * w, sum(weights))) < 3
            assert w or not seen[i]


def test_two_series_with_the_same_weights_do_not_run_in_step():
    even = {"a": 7, "b": 6, "c": 11}
    one, other = (Proportions(even, 0, name)(np.arange(1000))[0] for name in ("x", "y"))
    assert (one != other).any()


def test_weights_are_read_as_they_are_written():
    assert whole_weights({"a": 0.1, "b": 0.2}, "m") == [1, 2]
    assert whole_weights({"a": 0.5, "b": 5.0, "c": 2}, "m") == [1, 10, 4]
    assert whole_weights({"a": 1e-3, "b": 0}, "m") == [1, 0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1.0, "b": 2}, "weight -1.0 of a is negative"),
        ({"a": 0.0}, "leave nothing to choose"),
        ({}, "leave nothing to choose"),
        ({"a": 0.12345678, "b": 1}, "too many digits"),
        ({"a": float("nan")}, "must be numbers"),
    ],
)
def test_weights_that_cannot_be(weights, message):
    with pytest.raises(UserError, match=f"data.mixture: .*{message}"):
        Proportions(weights, 0, what="data.mixture")
