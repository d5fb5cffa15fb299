"""Batches of packed rows: global row g is a pure function of (settings, seed, g).

Row g belongs to one source, chosen in exact proportion (`mixture`), and is that source's next row (`packing`). So
weights are shares of rows, that is of positions, as rows are full. A document that cannot be read leaves its positions
empty; no other row moves.

Legend: B rows of the global batch, b of this host, S positions, I images of a row, R places for targets.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ddt_jax.data.base import BadRecord
from ddt_jax.data.loader import BatchLoader, check_divides
from ddt_jax.errors import UserError
from ddt_jax.multimodal import documents, sequence
from ddt_jax.multimodal.mixture import Proportions
from ddt_jax.multimodal.packing import Packing, RowStream, block_size
from ddt_jax.multimodal.records import DocumentSource
from ddt_jax.multimodal.sequence import ImageForm, Layout
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.settings import Data

_SAMPLE = 4096  # documents whose mean length decides how many a block has


@dataclass(frozen=True)
class RowLimits:
    """What a row holds.

    Attributes:
      context: positions, S.
      images: I; 0 = as many as fit in the context.
      targets: positions that the loss looks at; 0 = no limit of their own.
      truncate: cut the text of a document that is longer than a row, rather than refuse it.
    """

    context: int
    images: int = 0
    targets: int = 0
    truncate: bool = False


class SizesOf:
    """Sizes of a source's documents in a row, after cutting; what `Packing` asks for."""

    def __init__(self, source: DocumentSource, form: ImageForm, limits: RowLimits):
        self.source, self.form, self.limits = source, form, limits

    def __call__(self, index, number):
        counts = self.source.counts(index, number)
        return self.select(sequence.sizes(counts, self.form) - self.excess(counts)[:, None] * np.array([1, 0, 0]))

    def excess(self, counts):
        """Text tokens to be cut from each document."""
        too_many = sequence.sizes(counts, self.form)[:, 0] - self.limits.context
        return np.clip(too_many, 0, counts[:, 1] if self.limits.truncate else 0)

    def select(self, sizes):
        """The columns that are limited."""
        return sizes[:, [True, self.limits.images > 0, self.limits.targets > 0]]


class RowBatcher:
    """Makes batches. Holds caches, no state: any thread, process or test may ask for any step.

    Args:
      sources: documents by name.
      weights: share of rows of each, any scale.
      vocabulary: must fit the sources' text and codes.
      seed: of order, mixture and packing.
      batch_size: B.
      shard_index, shard_count: this host among all.

    Raises:
      UserError: sizes, codes or text that do not fit; when rows are asked for, a document longer than the context.
    """

    def __init__(
        self,
        sources: dict[str, DocumentSource],
        weights: dict[str, float],
        vocabulary: Vocabulary,
        form: ImageForm,
        limits: RowLimits,
        *,
        seed: int,
        batch_size: int,
        shard_index: int = 0,
        shard_count: int = 1,
    ):
        check_divides(batch_size, shard_count, "train.batch_size")
        for source in sources.values():
            _check(source, vocabulary, form)
        self.vocabulary, self.form, self.limits = vocabulary, form, limits
        self.batch_size = batch_size
        self._host = (shard_index, shard_count)
        self._sources = list(sources.values())
        self._mixture = Proportions({name: weights[name] for name in sources}, seed, "sources", what="mixture")
        self._streams = [
            RowStream(_packing(name, source, SizesOf(source, form, limits), seed)) for name, source in sources.items()
        ]

    @cached_property
    def max_images(self) -> int:
        """I: entries for images in a row."""
        return self.limits.images or self.limits.context // (self.form.rows + 2)

    @cached_property
    def max_targets(self) -> int:
        """How many targets a row can have."""
        return self.limits.targets or self.limits.context

    def source_of(self, row: int) -> tuple[int, int]:
        """(number of the source, row of its own stream) of a global row."""
        source, rank = self._mixture(row)
        return int(source), int(rank)

    @property
    def records(self) -> tuple[tuple[str, int], ...]:
        """(name, how many documents it has) of each source."""
        return tuple((source.name, len(source)) for source in self._sources)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of each source, documents that are packed together: their order is the seed's up to that."""
        return tuple(stream.packing.block for stream in self._streams)

    def contents(self, row: int) -> np.ndarray:
        """(marks, text tokens, images) of the documents that are planned for a global row, int [3]; reads none."""
        number, rank = self.source_of(row)
        planned = self._sources[number].counts(*self._streams[number].row(rank))
        cut = SizesOf(self._sources[number], self.form, self.limits).excess(planned)
        return planned[:, :3].sum(axis=0) - np.array([0, cut.sum(), 0])

    def row(self, row: int) -> tuple[list[Layout], list[tuple[str, str]]]:
        """Documents of a global row, laid out, and what was wrong with others."""
        number, rank = self.source_of(row)
        source, layouts, errors = self._sources[number], [], []
        indices, places = self._streams[number].row(rank)
        planned = source.counts(indices, places)
        excess = SizesOf(source, self.form, self.limits).excess(planned)
        for index, place, counts, cut in zip(indices, places, planned.tolist(), excess, strict=True):
            try:
                layouts.append(self._lay_out(source.document(int(index), int(place)), counts, int(cut)))
            except BadRecord as error:
                errors.append((f"{source.name} record {source.record_of(index)}", str(error)))
        return layouts, errors

    def _lay_out(self, document, planned, excess):
        if documents.count(document) != tuple(planned):
            raise BadRecord("it has not the length that was stored")
        if excess:
            document = documents.truncate_text(document, excess)
        return sequence.lay_out(document, self.vocabulary, self.form)

    def make(self, step: int):
        """The batch of a step, this host's rows of it: the arrays of `sequence.pack_row`, stacked, and
        rows int32 [b, R], `sequence.target_rows`; slot int32 [b], the row inside the global batch; source int32 [b],
        its source's number.
        """
        index, count = self._host
        share = self.batch_size // count
        slots = np.arange(index * share, (index + 1) * share)
        rows, errors = [], []
        for slot in slots:
            layouts, wrong = self.row(step * self.batch_size + int(slot))
            errors += wrong
            pad = self.vocabulary["PAD"]
            row = sequence.pack_row(layouts, self.limits.context, self.max_images, pad, self.form)
            rows.append(row | {"rows": sequence.target_rows(row["target"], self.max_targets)})
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        sources = [self.source_of(step * self.batch_size + int(slot))[0] for slot in slots]
        return batch | {"slot": slots.astype(np.int32), "source": np.asarray(sources, np.int32)}, errors

    def prepare(self, rows: int) -> None:
        """Makes the index up to global row `rows`, so that copies of this in worker processes need not."""
        sources, ranks = self._mixture(np.arange(max(0, rows - 64 * len(self._sources)), rows + 1))
        for number in np.unique(sources):
            self._streams[number].locate(int(ranks[sources == number].max()))


class RowLoader(BatchLoader):
    """Batches of packed rows made ahead, as `data.loader.Loader` makes those of images."""

    def __init__(self, batcher: RowBatcher, data: Data):
        super().__init__(data, batcher, "documents could not be used", "left out of their rows")
        self.batcher = batcher

    def iterate(self, start_step, stop_step=None):
        """As BatchLoader's. The epochs before are packed here once; each worker process would do it for itself."""
        with contextlib.suppress(UserError):  # as ever, it is raised where the batch is asked for
            self.batcher.prepare(start_step * self.batcher.batch_size)
        return super().iterate(start_step, stop_step)

    def _good(self, batch):
        return int((batch["document"].max(axis=1) + 1).sum())


def utilisation(batches: Sequence[dict]) -> float:
    """Share of positions that hold a document."""
    used = [np.mean(batch["document"] >= 0) for batch in batches]
    return float(np.mean(used))


def _packing(name, source, sizes, seed):
    limits = sizes.limits
    some = np.arange(min(_SAMPLE, len(source)))
    mean = sequence.sizes(source.counts(some, some), sizes.form)[:, 0].mean()
    held = sizes.select(np.array([[limits.context, limits.images, limits.targets]]))[0]
    return Packing(len(source), sizes, tuple(held.tolist()), seed, name, block_size(mean, limits.context), source.name)


def _check(source, vocabulary, form):
    if vocabulary.text_fingerprint != source.text_fingerprint:
        raise UserError(
            f"mixture: text of {source.name} is of tokenizer {source.text_fingerprint[:8]}…, the vocabulary is for "
            f"{vocabulary.text_fingerprint[:8]}…; use one text tokenizer"
        )
    if form.kind == "codes" and source.num_codes not in (0, vocabulary.num_codes):
        raise UserError(
            f"mixture: {source.name} has {source.num_codes:,} image codes, the vocabulary {vocabulary.num_codes:,}; "
            "use codes of one tokenizer"
        )
