"""Texts that are longer than a row, as several documents: each goes on where the one before has ended.

A piece is laid out as a text of its own, BOS text EOS; only that with which the text ends learns its EOS. The pieces of
an epoch come in the order of the seed, like all documents.
"""

import numpy as np

from ddt_jax.multimodal import documents
from ddt_jax.multimodal.documents import Text
from ddt_jax.multimodal.records import DocumentSource

_EMPTY, _LONGER = (np.array(documents.count(documents.text_only(ids))) for ids in ([], [0]))
MARKS = int(_EMPTY[0])
_SOME = 1 << 20  # documents that are measured at once
_OPEN = np.array([0, 0, 0, 1, 0, 0])  # the mark that is not learned, of a piece after which the text goes on


class Pieces:
    """A DocumentSource of the pieces of another's documents.

    Args:
      whole: of texts alone, each one BOS text EOS.
      length: text tokens of a piece, at least 1; the last of a text has what is left.

    A text is read and encoded for each of its pieces.
    """

    def __init__(self, whole: DocumentSource, length: int):
        self.name, self.num_codes, self.text_fingerprint = whole.name, whole.num_codes, whole.text_fingerprint
        self._whole, self._length = whole, length
        some = (np.arange(a, min(a + _SOME, len(whole))) for a in range(0, len(whole), _SOME))
        self._tokens_N = np.concatenate([np.zeros(0, np.int64), *(whole.counts(of, of)[:, 1] for of in some)])
        # A text of none, as of a record that cannot be read, is a document as well.
        self._ends_N = np.cumsum(np.maximum(-(-self._tokens_N // length), 1))

    def __len__(self):
        return int(self._ends_N[-1]) if len(self._ends_N) else 0

    def counts(self, index, number):
        _, _, left = self._place(np.asarray(index))
        kept = np.minimum(left, self._length)
        return _EMPTY + kept[:, None] * (_LONGER - _EMPTY) - (left > kept)[:, None] * _OPEN

    def document(self, index, number):
        """Raises BadRecord as the whole's."""
        (record,), (begin,), _ = self._place(np.array([index]))
        whole = self._whole.document(int(record), int(record))
        (ids,) = (segment.ids[begin:] for segment in whole.segments if isinstance(segment, Text))
        return documents.truncate_text(documents.text_only(ids), max(len(ids) - self._length, 0))

    def record_of(self, index):
        """The number of the text that a piece is of; of several as an array."""
        return np.searchsorted(self._ends_N, index, side="right")

    def _place(self, index_D):
        """Of each piece: (record, where it begins, tokens from there to the end of the text)."""
        record = self.record_of(index_D)
        pieces_before = np.where(record, self._ends_N[record - 1], 0)
        begin = (index_D - pieces_before) * self._length
        return record, begin, self._tokens_N[record] - begin
