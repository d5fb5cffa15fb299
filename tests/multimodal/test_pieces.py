"""Long texts in pieces: nothing is lost or said twice, and only the end of a text is learned as one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddt_jax.data.base import BadRecord
from ddt_jax.errors import UserError
from ddt_jax.multimodal import documents
from ddt_jax.multimodal.batches import RowBatcher, RowLimits
from ddt_jax.multimodal.documents import Mark, Text
from ddt_jax.multimodal.pieces import MARKS, Pieces
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.multimodal.vocabulary import Vocabulary


class Texts:
    """Texts of these lengths, all of whose tokens differ.

    Args:
      found: what is there when they are read; None: no text.
    """

    name, num_codes, text_fingerprint = "texts", 0, "t"

    def __init__(self, lengths, found=None):
        ends = np.cumsum([0, *lengths])
        self.texts = [np.arange(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        self.found = found or self.texts

    def __len__(self):
        return len(self.texts)

    def counts(self, index, number):
        return np.array([documents.count(documents.text_only(self.texts[i])) for i in index]).reshape(-1, 6)

    def document(self, index, number):
        if self.found[index] is None:
            raise BadRecord("no text")
        return documents.text_only(self.found[index])


def ids(document):
    return next(list(map(int, s.ids)) for s in document.segments if isinstance(s, Text))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 12))
def test_pieces_follow_each_other_and_are_counted_without_being_read(lengths, length):
    whole = Texts(lengths)
    pieces = Pieces(whole, length)
    index = np.arange(len(pieces))
    made = [pieces.document(int(i), int(i) + 100) for i in index]
    np.testing.assert_array_equal(pieces.counts(index, index + 100), [documents.count(d) for d in made])
    assert [token for d in made for token in ids(d)] == [token for text in whole.texts for token in text]
    assert all(len(ids(d)) <= length for d in made)
    ends = [d.segments[-1] for d in made]
    assert all(isinstance(end, Mark) and end.name == "EOS" for end in ends)
    assert sum(end.learned for end in ends) == len(lengths)  # one end for each text
    shuffled = np.random.default_rng(0).permutation(index)
    np.testing.assert_array_equal(pieces.counts(shuffled, shuffled), pieces.counts(index, index)[shuffled])


def batcher(source, context=16, batch_size=4):
    vocabulary = Vocabulary.extend(1000, 16, text_fingerprint="t")
    limits, form = RowLimits(context), ImageForm("codes", 4)
    return RowBatcher({"0": source}, {"0": 1}, vocabulary, form, limits, seed=3, batch_size=batch_size)


def test_rows_of_an_epoch_hold_every_token_of_long_texts_once():
    whole = Texts([100, 3, 14, 0, 57, 28])
    source = batcher(Pieces(whole, 16 - MARKS))
    rows = source._streams[0].epoch_rows(0)
    tokens = np.concatenate([source.make(step)[0]["tokens"] for step in range(-(-rows // 4))])[:rows]
    assert sorted(tokens[tokens < 1000].tolist()) == list(range(202))
    with pytest.raises(UserError, match="sequences.truncate=True"):
        batcher(whole).make(0)


def test_a_text_that_is_not_what_was_measured_is_left_out():
    lengths = [40, 8]
    shorter, other = Texts(lengths).texts[0][:20], Texts(lengths).texts[1]
    batch, errors = batcher(Pieces(Texts(lengths, [shorter, other]), 14), batch_size=8).make(0)
    assert errors and {name for name, _ in errors} == {"texts record 0"}  # the text's number, not the piece's
    assert all("not the length that was stored" in why for _, why in errors)
    assert set(range(40, 48)) <= set(batch["tokens"].ravel().tolist())
    _, errors = batcher(Pieces(Texts(lengths, [None, other]), 14), batch_size=8).make(0)
    assert errors and all(why == "no text" for _, why in errors)
