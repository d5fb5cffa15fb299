"""What a transformer is asked in its evaluation: the first held-out records that have a caption, or bring an edit."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from ddt_jax import settings
from ddt_jax.data.base import BadRecord
from ddt_jax.data.codes import CodesSource
from ddt_jax.multimodal.documents import Document
from ddt_jax.multimodal.records import own_document


class Edit(NamedTuple):
    """A picture, what to do with it, and what came of it.

    Attributes:
      document: whose last answer is the edited picture.
      source, target: codes int32 [K] of the pictures before and after.
      instruction: what to do.
      caption: of the picture before; "" if none is known.
    """

    document: Document
    source: np.ndarray
    target: np.ndarray
    instruction: str
    caption: str


def captioned(s: settings.Experiment, most: int) -> list[dict]:
    """Records of sequences.eval_sources with a caption, at most so many."""
    records = (record for part in s.sequences.eval_sources for record in _records(s, part))
    return list(islice((record for record in records if record.get("caption")), most))


def edits(s: settings.Experiment, most: int, encode: Callable[[str], np.ndarray]) -> list[Edit]:
    """Edits in those folders of sequences.eval_sources whose records are read with documents of their own.

    An edit is a document of two turns: one image and a text, answered by one image.
    """
    parts = [part for part in s.sequences.eval_sources if part.formats.own]
    found = (edit for part in parts for record in _records(s, part) if (edit := _edit(record, encode)))
    return list(islice(found, most))


def _records(s, part) -> Iterator[dict]:
    """The records of a folder that can be read."""
    source = CodesSource(part.folder, cache_dir=s.data.cache_dir)
    for i in range(len(source)):
        with contextlib.suppress(BadRecord):
            yield source[i]


def _edit(record, encode) -> Edit | None:
    match record.get("turns"):
        case [["USER", [int(before), str(said)]], ["ASSISTANT", [int(after)]]]:
            pass
        case [["USER", [str(said), int(before)]], ["ASSISTANT", [int(after)]]]:
            pass
        case _:
            return None
    try:
        document = own_document(record, encode)
    except BadRecord:
        return None
    caption = record.get("caption", "") if before == 0 else ""
    return Edit(document, record["codes"][before], record["codes"][after], said, caption)
