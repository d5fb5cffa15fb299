import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_jax.data.permutation import Permutation, keyed_generator, keyed_integers


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 2**20))
def test_every_record_comes_once_per_epoch(n, seed, epoch):
    assert sorted(Permutation(n, seed, epoch)(np.arange(n))) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 31, 127, 128, 129, 65536, 65537, 100003])
def test_bijection_at_awkward_sizes(n):
    np.testing.assert_array_equal(np.sort(Permutation(n, 1, 2)(np.arange(n))), np.arange(n))


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.integers(1, 10**6), st.integers(1, 2**62 - 1)), st.data())
def test_one_position_and_an_array_agree(n, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8))
    permutation = Permutation(n, 5, 6)
    together = permutation(np.array(positions))
    assert [permutation(p) for p in positions] == together.tolist()
    assert ((together >= 0) & (together < n)).all()
    assert len(set(together.tolist())) == len(set(positions))


def test_shape_is_kept_and_empty_is_fine():
    permutation = Permutation(10, 0, 0)
    assert permutation(np.arange(6).reshape(2, 3)).shape == (2, 3)
    assert permutation(np.arange(0)).shape == (0,)


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position):
    with pytest.raises(IndexError):
        Permutation(10, 0, 0)(position)
    with pytest.raises(IndexError):
        Permutation(10, 0, 0)(np.array([0, position]))


def test_all_orders_of_few_records_are_about_equally_likely():
    counts = {}
    for epoch in range(4800):
        order = tuple(Permutation(4, 0, epoch)(np.arange(4)).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    # 200 expected each; chi-square with 23 degrees of freedom is below 50 in 99.9 % of fair cases.
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 50


def test_neighbours_part_and_epochs_and_seeds_differ():
    n = 50_000
    orders = [Permutation(n, seed, epoch)(np.arange(n)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02  # 4.5 sigma of 1/sqrt(n)
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.02
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert (orders[a] == orders[b]).sum() < 10  # 1 expected by chance


def test_order_is_the_same_in_every_version():
    # A run that goes on after an update must see the same rows. Change these numbers only with a note in the changelog.
    assert Permutation(50_000, 0, 0)(np.arange(5)).tolist() == [47994, 44916, 49777, 33106, 14544]
    assert keyed_integers(1, "redraw", 1, 2, 3) == [17948546371079880926]
    assert keyed_generator("augment", 0).integers(1000, size=3).tolist() == [504, 47, 378]


def test_keys_do_not_run_together():
    assert keyed_integers(1, 1, 23) != keyed_integers(1, 12, 3)
