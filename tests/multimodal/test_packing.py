import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_jax.errors import UserError
from ddt_jax.multimodal.packing import Packing, RowStream, best_fit, block_size


class Sizes:
    """Sizes of documents, which change with the epoch when there are several columns of them."""

    def __init__(self, lengths, images=None):
        self.columns = [np.asarray(lengths)] + ([] if images is None else [np.asarray(images)])

    def __call__(self, documents, numbers):
        return np.stack([column[documents] for column in self.columns], axis=1)


def packing(lengths, limits=(20,), seed=3, block=8, images=None):
    return Packing(len(lengths), Sizes(lengths, images), limits, seed, "test", block)


things = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 4)), max_size=60)


@given(things, st.booleans())
def test_every_thing_is_in_one_bin_and_no_bin_overflows(sizes, with_images):
    sizes = np.array(sizes, int).reshape(-1, 2)[:, : 1 + with_images]
    limits = (20, 5)[: 1 + with_images]
    bins = best_fit(sizes, limits)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    for b in bins:
        assert len(b) and (sizes[b].sum(axis=0) <= limits).all() and list(b) == sorted(b)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_no_two_bins_could_be_one(lengths):
    rooms = sorted(20 - sum(lengths[i] for i in b) for b in best_fit(np.array(lengths)[:, None], (20,)))
    fills = [20 - r for r in rooms]
    # Of any-fit packings: two bins that are both at most half full would have been joined.
    assert sum(fill <= 10 for fill in fills) <= 1


def test_exact_complements_are_found():
    lengths = np.array([13, 7, 18, 2, 11, 9, 5, 15])[:, None]
    assert len(best_fit(lengths, (20,))) == 4


lengths_of_a_source = st.lists(st.integers(1, 20), min_size=1, max_size=50)


@settings(deadline=None, max_examples=40)
@given(lengths_of_a_source, st.integers(1, 20), st.integers(0, 3), st.integers(0, 1000))
def test_each_epoch_holds_every_document_once(lengths, block, epoch, seed):
    stream = RowStream(packing(lengths, seed=seed, block=block))
    first = sum(stream.epoch_rows(e) for e in range(epoch))
    rows = [stream.row(first + i) for i in range(stream.epoch_rows(epoch))]
    assert sorted(d for documents, _ in rows for d in documents) == list(range(len(lengths)))
    numbers = sorted(n for _, numbers in rows for n in numbers)
    assert numbers == list(range(epoch * len(lengths), (epoch + 1) * len(lengths)))
    assert all(sum(lengths[d] for d in documents) <= 20 for documents, _ in rows)
    assert [stream.locate(first + i)[0] for i in range(len(rows))] == [epoch] * len(rows)


@settings(deadline=None, max_examples=20)
@given(lengths_of_a_source, st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_any_row_may_be_asked_for_first(lengths, rows):
    """A plan that read on would differ from one that is asked out of order, in another process, or after a restart."""
    in_order = RowStream(packing(lengths))
    expected = {n: in_order.row(n) for n in range(max(rows) + 1)}
    asked = RowStream(packing(lengths))
    for n in rows:
        for one, other in zip(asked.row(n), expected[n], strict=True):
            np.testing.assert_array_equal(one, other)
        asked = pickle.loads(pickle.dumps(asked))


def test_rows_do_not_come_in_order_of_length_and_epochs_and_seeds_differ():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 4000)
    stream = RowStream(packing(lengths, limits=(100,), block=2000))
    longest = [max(lengths[stream.row(i)[0]]) for i in range(stream.epoch_rows(0))]
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.15  # 3 sigma of 1 / sqrt(400)
    other_seed = RowStream(packing(lengths, limits=(100,), block=2000, seed=4)).row(0)[0].tolist()
    other_epoch = stream.row(stream.epoch_rows(0))[0].tolist()
    assert len({tuple(stream.row(0)[0].tolist()), tuple(other_seed), tuple(other_epoch)}) == 3


def test_sizes_may_depend_on_the_epoch():
    """A document that is long in odd epochs: each epoch has its own number of rows, and rows are found all the same."""

    def sizes(documents, numbers):
        return np.where(numbers // 12 % 2 == 0, 5, 15)[:, None]

    stream = RowStream(Packing(12, sizes, (20,), 0, "test", 4))
    assert [stream.epoch_rows(e) for e in range(4)] == [3, 12, 3, 12]
    assert stream.locate(3 + 12 + 3)[0] == 3
    assert sorted(np.concatenate([stream.row(n)[0] for n in range(3, 15)])) == list(range(12))


def test_the_plan_is_the_same_in_every_version():
    # A run that goes on after an update must see the same rows. Change these numbers only with a note in the changelog.
    stream = RowStream(packing(np.arange(30) % 7 + 2))
    assert [stream.row(i)[0].tolist() for i in (0, 1, 12)] == [[28, 23, 10, 3, 2], [8, 15, 7], [5, 19, 10]]


def test_a_document_that_fits_no_row_is_named():
    with pytest.raises(UserError, match=r"document 2 of test needs \[21\].*a row holds \[20\]; take a longer context"):
        RowStream(packing([3, 4, 21])).row(0)


def test_blocks_fill_many_rows():
    assert block_size(50, 8192) == 20972 and block_size(1e6, 8192) == 2048


def test_what_cutting_would_not_mend_is_not_to_be_cut():
    with pytest.raises(UserError, match=r"needs \[4, 3\].* holds \[20, 2\]; raise sequences.targets .* to 0"):
        RowStream(packing([3, 4], limits=(20, 2), images=[1, 3])).row(0)
    with pytest.raises(UserError, match=r"needs \[21, 3\].*; take a longer context.* sequences.truncate=True"):
        RowStream(packing([3, 21], limits=(20, 2), images=[1, 3])).row(0)
