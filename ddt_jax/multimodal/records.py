"""Documents from records of images and captions, in formats that a mixture weighs: of codes (data/codes.py), or of
pictures (data/pictures.py), where images are not made of codes; and of texts alone (data/texts.py).

A record with a caption becomes one of `documents.PAIR_FORMATS`. A record may also bring a document of its own, with
which it stands under the format "own":

    turns: [["USER", [0, "make it red"]], ["ASSISTANT", [1]]]     questions, editing, conversations; loss on answers
    parts: ["first a circle", 0, "then a square", 1]              texts and images in any order; loss on all

where a number stands for an image of the record. How long texts are is stored per text tokenizer, beside the shards of
codes or in the cache, so that a plan needs to read no record.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, nearest
from ddt_jax.data.codes import CodesSource
from ddt_jax.data.pictures import PictureRecords
from ddt_jax.data.texts import TextRecords
from ddt_jax.errors import UserError
from ddt_jax.io import atomic
from ddt_jax.multimodal import documents
from ddt_jax.multimodal.documents import Document, Image, Text
from ddt_jax.multimodal.mixture import Proportions

OWN = "own"
FORMATS = (*documents.PAIR_FORMATS, OWN)
_COLUMNS = 7  # tokens of the caption, then `documents.count` of the record's own document (zeros if it has none)


class TextTokenizer(Protocol):
    """What is needed of `tokenizers.text.TextTokenizer`, which stands beside this layer."""

    fingerprint: str
    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...


class DocumentSource(Protocol):
    """Documents at random, whose sizes are known without reading them.

    Attributes:
      name: for messages.
      num_codes: image codes its images are made of; 0 if they are not made of codes, or there are none.
      text_fingerprint: of the tokenizer its text ids are of.
    """

    name: str
    num_codes: int
    text_fingerprint: str

    def __len__(self) -> int: ...

    def counts(self, documents: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """`documents.count` int [D, 6] of documents whose numbers in the series (epoch N + place) are these."""
        ...

    def document(self, index: int, number: int) -> Document:
        """Raises BadRecord if it cannot be read."""
        ...

    def record_of(self, index: int) -> int:
        """Which record a document is of, for messages."""
        ...


class RecordDocuments:
    """The documents of records.

    Args:
      records: of codes, of pictures, or of texts alone.
      formats: weights of FORMATS; a document's format depends on its number in the series alone.
      seed: of the order of formats.
      answers_only: what is given is not learned, in no format.

    Records that lack what their format needs become "image_only".

    Raises:
      UserError: an unknown format, or no record has what the formats need.
    """

    def __init__(
        self,
        records: CodesSource | PictureRecords | TextRecords,
        text: TextTokenizer,
        formats: Mapping[str, float],
        seed: int,
        *,
        answers_only: bool = False,
    ):
        for name in formats:
            if name not in FORMATS:
                raise UserError(f"mixture: {name} is not a format{nearest(name, FORMATS)}")
        self.records = records
        self.name = records.name
        self.num_codes = records.num_codes
        self.text_fingerprint = text.fingerprint
        self._text, self._answers_only = text, answers_only
        self._formats = Proportions(
            formats, seed, "formats", records.origin, what=f"mixture: formats of {records.name}"
        )
        of_codes = isinstance(records, CodesSource)
        self._lengths_N7 = text_lengths(records, text) if of_codes else picture_lengths(records, text)
        if OWN in formats and not self._lengths_N7[:, 1:].any():
            raise UserError(f"mixture: no record of {records.name} has a document of its own; leave out format {OWN}")
        if formats.keys() - {"image_only", OWN} and not self._lengths_N7[:, 0].any():
            raise UserError(f"mixture: no record of {records.name} has a caption; the only format left is image_only")
        self._numbers = np.array([FORMATS.index(name) for name in self._formats.names])
        caption_N, own_N = self._lengths_N7[:, 0] > 0, self._lengths_N7[:, 1:].any(axis=1)
        every_N = np.ones(len(records), bool)
        of_record = {OWN: own_N, "image_only": every_N}
        self._possible_NF = np.stack([of_record.get(name, caption_N) for name in FORMATS], axis=1)
        # Counts of a pair are linear in the length of its caption.
        names = documents.PAIR_FORMATS
        self._base, one = (np.array([documents.count(self._pair(n, ids, Image())) for n in names]) for ids in ([], [0]))
        self._slope = one - self._base

    def __len__(self):
        return len(self.records)

    def record_of(self, index):
        return index

    def format_of(self, index, number) -> np.ndarray:
        """Numbers of formats in FORMATS, int [D], of documents with these numbers in the series."""
        chosen = self._numbers[self._formats(number)[0]]
        return np.where(self._possible_NF[index, chosen], chosen, FORMATS.index("image_only"))

    def counts(self, index, number):
        formats, lengths = self.format_of(index, number), self._lengths_N7[index]
        pair = np.minimum(formats, len(self._base) - 1)
        counts = self._base[pair] + lengths[:, :1] * self._slope[pair]
        return np.where(formats[:, None] == FORMATS.index(OWN), lengths[:, 1:], counts)

    def document(self, index, number):
        record = self.records[index]
        name = FORMATS[int(self.format_of(index, number))]
        if name == OWN:  # where all is learned, all but BOS is an answer
            return own_document(record, self._text.encode)
        caption = self._text.encode(record.get("caption", ""))
        images = images_of(record)
        if not len(images) and name != "text_only":
            raise BadRecord("it has no image")
        return self._pair(name, caption, Image(images[0]) if len(images) else Image())

    def _pair(self, name, text, image):
        document = documents.PAIR_FORMATS[name](text, image)
        return replace(document, learn="answer") if self._answers_only else document


def own_document(record: Mapping[str, Any], encode: Callable[[str], np.ndarray]) -> Document | None:
    """The document that a record brings; None if it brings none. Raises BadRecord if it makes no sense."""

    images = images_of(record)

    def part(value):
        if isinstance(value, str):
            return Text(encode(value))
        if isinstance(value, int) and 0 <= value < len(images):
            return Image(images[value], value)
        raise BadRecord(f"part {value!r} is neither text nor one of {len(images)} images")

    try:
        if "turns" in record:
            return documents.chat([(role, [part(p) for p in parts]) for role, parts in record["turns"]])
        return documents.interleaved([part(p) for p in record["parts"]]) if "parts" in record else None
    except (UserError, TypeError, ValueError) as error:
        raise BadRecord(str(error)) from None


def images_of(record: Mapping[str, Any]) -> Any:
    """Contents of a record's images: codes, or pixels."""
    return record["codes"] if "codes" in record else record["images"]


def text_lengths(records: CodesSource, text: TextTokenizer) -> np.ndarray:
    """How long the texts of records are, int32 [N, 7]; measured once for each shard and text tokenizer, then stored."""
    folder = files.path_of(records.folder) / "lengths" / text.fingerprint[:16]
    found = []
    for shard, begin in zip(records.shards, records.records_before.tolist(), strict=False):
        path = folder / f"{shard.name.split('.')[0]}-{shard.sha256[:16]}.npy"
        lengths = np.load(path) if path.exists() else None
        if lengths is None or lengths.shape != (shard.records, _COLUMNS):
            lengths = np.array(
                [_lengths(records.__getitem__, i, text) for i in range(begin, begin + shard.records)], np.int32
            ).reshape(-1, _COLUMNS)
            _store(path, lengths)
        found.append(lengths)
    return np.concatenate([*found, np.zeros((0, _COLUMNS), np.int32)])


def picture_lengths(records: PictureRecords | TextRecords, text: TextTokenizer) -> np.ndarray:
    """As `text_lengths`. What was measured is kept under the source's spec and the texts of a few records: another text
    that changes there is left out.
    """
    count = len(records)
    some = [_texts(records, i) for i in sorted({0, count // 2, count - 1}) if 0 <= i < count]
    mark = hashlib.sha256(repr((records.identity, count, text.fingerprint, some)).encode()).hexdigest()[:16]
    path = files.cache_folder(records.cache_dir) / "lengths" / f"{mark}.npy"
    lengths = np.load(path) if path.exists() else None
    if lengths is None or lengths.shape != (len(records), _COLUMNS):
        found = [_lengths(records.without_images, i, text) for i in range(len(records))]
        lengths = np.array(found, np.int32).reshape(-1, _COLUMNS)
        _store(path, lengths)
    return lengths


def _texts(records, index):
    """What of a record is measured."""
    try:
        record = records.without_images(index)
    except BadRecord:
        return None
    return [record.get(name) for name in ("caption", "turns", "parts")]


def _lengths(read, index, text):
    try:
        record = read(index)
        own = own_document(record, text.encode)
    except BadRecord:
        return (0,) * _COLUMNS  # it is found again, and counted, when it is read for training
    return (len(text.encode(record.get("caption", ""))), *(documents.count(own) if own else (0,) * 6))


def _store(path, lengths):
    try:
        with atomic.replacing(path) as file:
            np.save(file, lengths)
    except OSError as error:
        print(f"data: lengths of texts are not kept: {path}: {error.strerror or error}", file=sys.stderr)
