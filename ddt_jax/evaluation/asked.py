"""What a transformer is asked in its evaluation: the first held-out records that have a caption, or bring an edit."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from ddt_jax import settings
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.images import prepare
from ddt_jax.errors import UserError
from ddt_jax.multimodal.documents import Document
from ddt_jax.multimodal.records import images_of, own_document
from ddt_jax.training import corpus


class Edit(NamedTuple):
    """A picture, what to do with it, and what came of it.

    Attributes:
      document: whose last answer is the edited picture.
      source, target: the pictures before and after, as documents hold them: codes int32 [K], or pixels.
      instruction: what to do.
      caption: of the picture before; "" if none is known.
    """

    document: Document
    source: np.ndarray
    target: np.ndarray
    instruction: str
    caption: str


def has_pictures(s: settings.Experiment) -> bool:
    """Whether held-out sources hold anything but texts."""
    return any(part.kind != "texts" for part in s.sequences.eval_sources)


def captioned(s: settings.Experiment, most: int) -> list[dict]:
    """Records of sequences.eval_sources with a caption and an image, at most so many."""
    parts = (part for part in s.sequences.eval_sources if part.kind != "texts")
    records = (record for part in parts for record in _records(s, part))
    return list(islice((record for record in records if record.get("caption")), most))


def with_pictures(s: settings.Experiment, data: settings.Data, most: int) -> Iterator[tuple[str, np.ndarray]]:
    """(caption, picture uint8 [S, S, 3]) of the records of `captioned`, one after the other.

    Args:
      data: how the pictures are prepared that codes were made of. Where images are no codes, records have them.

    Raises:
      UserError: those pictures are not where they were, or can no longer be read.
    """
    parts = (part for part in s.sequences.eval_sources if part.kind != "texts")
    return islice((pair for part in parts for pair in _with_pictures(s, data, part)), most)


def _with_pictures(s, data, part):
    if part.kind != "codes":
        captioned = (record for record in _records(s, part) if record.get("caption"))
        yield from ((record["caption"], images_of(record)[0]) for record in captioned)
        return
    spec = corpus.open_records(s, part).plan.source
    try:
        source = open_source(spec, image_size=data.image_size, cache_dir=s.data.cache_dir)
        for record in _records(s, part):
            if record.get("caption"):
                yield record["caption"], prepare(source[record["index"]]["image"], replace(data, flip=False))
    except (UserError, BadRecord, IndexError) as error:
        raise UserError(
            f"evaluate: the pictures of {spec}, which {part.folder} was made of, are needed: {error}; bring them back, "
            "or leave out evaluate.inception_file and evaluate.classifier"
        ) from error


def edits(s: settings.Experiment, most: int, encode: Callable[[str], np.ndarray]) -> list[Edit]:
    """Edits in those parts of sequences.eval_sources whose records are read with documents of their own.

    An edit is a document of two turns: one image and a text, answered by one image.
    """
    parts = [part for part in s.sequences.eval_sources if part.kind != "texts" and part.formats.own]
    found = (edit for part in parts for record in _records(s, part) if (edit := _edit(record, encode)))
    return list(islice(found, most))


def _records(s, part) -> Iterator[dict]:
    """The records of a part that can be read."""
    source = corpus.open_records(s, part)
    if getattr(source, "are_latents", False):
        raise UserError(
            f"evaluate: {part.source} in sequences.eval_sources has no pictures to ask about; name the images it was "
            "made of"
        )
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
    images = images_of(record)
    return Edit(document, images[before], images[after], said, caption)
