"""The loader: batch i of a run as a pure function of (seed, i), made by threads or processes of Grain.

Global row g = step * B + slot; epoch = g // n; record = permutation(seed, epoch)[g % n]. Each host makes its own
contiguous slots of the global batch, so a run may stop, go on and change its number of hosts without seeing other rows.
A record that cannot be used is replaced by one drawn from (seed, step, slot, attempt): no other slot moves.
"""

import logging
import os
import signal
import threading
import weakref
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process
from typing import Any, Protocol

import numpy as np

from ddt_jax.data import images, videos
from ddt_jax.data.base import BadRecord, Source
from ddt_jax.data.permutation import Permutation, keyed_generator, keyed_integers
from ddt_jax.errors import UserError
from ddt_jax.settings import Data

MAX_ATTEMPTS = 100  # draws for one slot; when all fail, nothing in the source can be read
MIN_SEEN = 1000  # the rate of bad records is judged from here on, or from 1 / max_bad_fraction where that is less
EXAMPLES_KEPT = 20  # reasons kept for the log
ENDLESS = 1 << 40  # batches of a run without a stop

log = logging.getLogger("ddt_jax.data")


class CaptionRows(Protocol):
    """Captions as rows of ids: `tokenizers.caption_ids`. Picklable."""

    def row(self, caption: str) -> np.ndarray:
        """[L]. Raises BadRecord if the caption cannot be used."""
        ...

    def rows(self, n: int) -> np.ndarray:
        """[n, L] where there are no captions."""
        ...


@dataclass(frozen=True)
class Batcher:
    """Makes batches. Holds no state, so that a thread, a process or a test may ask for any step in any order."""

    source: Source
    data: Data
    batch_size: int  # of the global batch
    seed: int
    shard_index: int
    shard_count: int
    shuffle: bool
    with_captions: bool
    keep_captions: bool = False  # those that there are, in batches for evaluation
    caption_ids: CaptionRows | None = None
    whole_clips: bool = False

    def slots(self, batch_size):
        """The rows of a global batch that this host makes."""
        share = batch_size // self.shard_count
        return np.arange(self.shard_index * share, (self.shard_index + 1) * share)

    def order(self, rows):
        """Record index of each global row. int64 [b] -> int64 [b]"""
        n = len(self.source)
        epochs, positions = rows // n, rows % n
        if self.shuffle:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                positions[here] = Permutation(n, self.seed, int(epoch))(positions[here])
        return positions

    def make(self, step: int):
        """One training batch and what was wrong on the way: (batch, [(where, why), ...])."""
        slots = self.slots(self.batch_size)
        batch, errors = self._empty(slots), []
        captions = []
        for row, index in enumerate(self.order(step * self.batch_size + slots)):
            slot = int(slots[row])
            for attempt in range(1, MAX_ATTEMPTS + 1):
                rng = None
                if self.data.flip or "random" in (self.data.crop, self.data.clip_start):
                    rng = keyed_generator("augment", self.seed, step, slot)
                try:
                    captions.append(self._fill(batch, row, int(index), rng))
                    break
                except BadRecord as error:
                    errors.append((self.source.describe(int(index)), str(error)))
                (drawn,) = keyed_integers(1, "redraw", self.seed, step, slot, attempt)
                index = drawn % len(self.source)
            else:
                where, why = errors[-MAX_ATTEMPTS]
                raise UserError(
                    f"data: none of {MAX_ATTEMPTS} images tried from {self.source.name} could be used "
                    f"(first: {where}: {why})"
                )
        if self.with_captions:
            batch["caption"] = captions
        return batch, errors

    def make_eval(self, start: int, stop: int, batch_size: int):
        """Records [start, stop) of the first epoch without augmentation, padded to the batch size: see `make`."""
        slots = self.slots(batch_size)
        batch, errors = self._empty(slots), []
        batch["valid"] = np.zeros(len(slots), bool)
        batch["index"][:] = -1
        captions = [""] * len(slots)
        rows = start + slots
        rows = rows[rows < stop]
        for row, index in enumerate(self.order(rows)):
            try:
                captions[row] = self._fill(batch, row, int(index), None)
                batch["valid"][row] = True
            except BadRecord as error:
                errors.append((self.source.describe(int(index)), str(error)))
        if self.with_captions or self.keep_captions:
            batch["caption"] = captions
        return batch, errors

    def _fill(self, batch, row, index, rng):
        """Puts one record into its row and returns its caption. Raises BadRecord and leaves the row as it was."""
        record = self.source[index]
        caption = record.get("caption", "")
        if not isinstance(caption, str):
            raise BadRecord("a caption that is no text")
        if (self.with_captions or self.caption_ids) and not caption:
            raise BadRecord("no caption")
        ids = self.caption_ids.row(caption) if self.caption_ids else None
        label = record.get("label", -1)
        if not (isinstance(label, int | np.integer) and -1 <= label < 1 << 31):
            raise BadRecord(f"class {label!r:.40} is not a number between 0 and 2^31 - 1")
        if arrays := self._arrays:
            part = slice(None)
            if self.data.frames:
                numbers = videos.window(len(record[next(iter(arrays))]), self.data, rng)
                part = slice(numbers.start, numbers.stop, numbers.step)
            for name in arrays:
                batch[name][row] = record[name][part]
        elif self.whole_clips:
            batch["video"][row] = videos.whole(record["video"], self.data)
        elif self.data.frames:
            batch["video"][row] = videos.prepare(record["video"], self.data, rng)
        else:
            batch["image"][row] = images.prepare(record["image"], self.data, rng)
        if ids is not None:
            batch["caption_ids"][row] = ids
        batch["label"][row] = label
        batch["index"][row] = index
        return caption

    @property
    def _arrays(self) -> dict:
        of_clips = (self.data.frames,) if self.data.frames else ()
        arrays = getattr(self.source, "arrays", {})
        return {name: ((*of_clips, *shape), dtype) for name, (shape, dtype) in arrays.items()}

    def _empty(self, slots) -> dict[str, Any]:
        size = self.data.image_size
        pictures = {"video": (self.data.frames, size, size, 3)} if self.data.frames else {"image": (size, size, 3)}
        arrays = self._arrays or {name: (shape, np.uint8) for name, shape in pictures.items()}
        captions = {"caption_ids": self.caption_ids.rows(len(slots))} if self.caption_ids else {}
        if self.whole_clips:  # each as long as it is
            arrays, captions = {}, captions | {"video": [None] * len(slots)}
        return (
            captions
            | {name: np.zeros((len(slots), *shape), dtype) for name, (shape, dtype) in arrays.items()}
            | {
                "slot": slots.astype(np.int32),
                "index": np.zeros(len(slots), np.int32),
                "label": np.full(len(slots), -1, np.int32),
            }
        )


class _EvalBatches:
    """What `make_eval` makes of records [start, stop), batch after batch, for Grain."""

    def __init__(self, batcher, start, stop, batch_size):
        self._batcher, self._start, self._stop, self._size = batcher, start, stop, batch_size

    def __len__(self):
        return -(-(self._stop - self._start) // self._size)

    def __getitem__(self, index):
        return self._batcher.make_eval(self._start + index * self._size, self._stop, self._size)


class _Steps:
    """Batches of the steps [start, stop) as Grain wants them: random access with a length."""

    def __init__(self, batcher, start, stop):
        self._batcher, self._start, self._stop = batcher, start, stop

    def __len__(self):
        return self._stop - self._start

    def __getitem__(self, index):
        return self._batcher.make(self._start + index)


@dataclass
class Stats:
    """What this process has consumed. `examples` are the first bad records as (where, why)."""

    seen: int = 0
    bad: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


class BatchLoader:
    """Batches of one host, made by a batcher, and the account of what could not be used.

    Args:
      data: threads, workers, prefetch, max_bad_fraction.
      batcher: `make(step)` returns (batch, [(where, why), ...]); picklable, holds no state.
      complaint: what the records are and what could not be done with bad ones, for messages.
      consequence: what happens to bad ones.

    Raises:
      UserError: when batches are asked for and too many records are bad.
    """

    def __init__(self, data: Data, batcher, complaint: str, consequence: str = "redrawn"):
        self.data = data
        self.stats = Stats()
        self._batcher = batcher
        self._complaint, self._consequence = complaint, consequence

    def batch_at(self, step: int):
        """The batch of a step, made here and now."""
        return self._account(*self._batcher.make(step))

    def iterate(self, start_step: int, stop_step: int | None = None) -> "BatchIterator":
        """Batches of the steps from `start_step` on, made ahead. Close the iterator, or use it in a `with`."""
        stop_step = start_step + ENDLESS if stop_step is None else stop_step
        return BatchIterator(self, _Steps(self._batcher, start_step, stop_step))

    def report(self) -> str | None:
        """One line about the bad records so far, None if there were none."""
        if not self.stats.bad:
            return None
        limit = f"Limit data.max_bad_fraction={self.data.max_bad_fraction} not reached."
        return f"{self._counts()}; {self._consequence}. {limit}"

    def _counts(self):
        where, why = self.stats.examples[0]
        stats = self.stats
        return f"data: {stats.bad:,} of {stats.seen:,} {self._complaint} (first: {where}: {why})"

    def _good(self, batch) -> int:
        """How many records a batch holds."""
        return int(batch["valid"].sum()) if "valid" in batch else len(batch["slot"])

    def _account(self, batch, errors):
        stats, limit = self.stats, self.data.max_bad_fraction
        stats.seen += self._good(batch) + len(errors)
        for where, why in errors:
            stats.bad += 1
            if len(stats.examples) < EXAMPLES_KEPT:
                stats.examples.append((where, why))
                log.warning("data: %s: %s; left out", where, why)
        enough = stats.seen >= min(MIN_SEEN, 1 / limit if limit > 0 else 1)
        if errors and (stats.bad == stats.seen or (enough and stats.bad > limit * stats.seen)):
            raise UserError(
                f"{self._counts()}, more than data.max_bad_fraction={limit} allows; mend the data or raise the limit"
            )
        return batch


class Loader(BatchLoader):
    """Batches of a source for one host.

    A batch is a dict of NumPy arrays, rows of this host only (b = batch_size / shard_count):
      image: uint8 [b, S, S, 3]; with data.frames video, uint8 [b, T, S, S, 3]; or the arrays that the source has in
        the place of images, of clips for as many frames.
      slot: int32 [b], the row inside the global batch.
      index: int32 [b], the record in the source.
      label: int32 [b], -1 where there is none.
      caption: list of b strings; only with captions.
      caption_ids: [b, L] of caption_ids, if there is one.

    Args:
      source: what `open_source` returns; of clips if data.frames says so.
      data: crop, flip, limits, threads, workers, prefetch.
      batch_size: rows of the global batch.
      seed: of the order and of augmentation.
      shard_index, shard_count: this host among all.
      shuffle: False = the source's own order in every epoch.
      with_captions: a record without a caption is then a bad one.
      keep_captions: batches for evaluation have captions, "" where there is none.
      caption_ids: what makes rows of captions; a record without a caption, or with one that it refuses, is then a bad
        one.
      whole_clips: `video` is a list of clips with all of their frames, `videos.whole`; None for a bad one.

    Raises:
      UserError: sizes that do not fit; later, when too many records are bad.
    """

    def __init__(
        self,
        source: Source,
        data: Data,
        *,
        batch_size: int,
        seed: int,
        shard_index: int = 0,
        shard_count: int = 1,
        shuffle: bool = True,
        with_captions: bool = False,
        keep_captions: bool = False,
        caption_ids: CaptionRows | None = None,
        whole_clips: bool = False,
    ):
        if not 0 <= shard_index < shard_count:
            raise ValueError(f"shard {shard_index} of {shard_count}")
        if not 0 < len(source) < 1 << 31:
            raise UserError(f"data: {source.name} has {len(source):,} images; between 1 and 2^31 - 1 can be used")
        check_divides(batch_size, shard_count, "train.batch_size")
        self.source = source
        self.batch_size = batch_size
        batcher = Batcher(
            source,
            data,
            batch_size,
            seed,
            shard_index,
            shard_count,
            shuffle,
            with_captions,
            keep_captions,
            caption_ids,
            whole_clips,
        )
        super().__init__(data, batcher, f"images could not be {'used' if with_captions or caption_ids else 'decoded'}")

    def eval_batches(self, n: int, batch_size: int):
        """The first n records of the fixed order (fewer if the source has fewer), each once.

        No augmentation and no redraws: `valid` bool [b] is False for padding and for records that cannot be used, whose
        pixels are zero and whose index is -1. All hosts get the same number of batches.
        """
        check_divides(batch_size, self._batcher.shard_count, "evaluate.batch_size")
        n = min(n, len(self.source))
        for start in range(0, n, batch_size):
            yield self._account(*self._batcher.make_eval(start, n, batch_size))

    def iterate_eval(self, start: int, stop: int, batch_size: int) -> "BatchIterator":
        """Records [start, stop) of the fixed order as in `eval_batches`, made ahead as in `iterate`."""
        check_divides(batch_size, self._batcher.shard_count, "evaluate.batch_size")
        return BatchIterator(self, _EvalBatches(self._batcher, start, stop, batch_size))


def check_divides(batch_size: int, shard_count: int, name: str) -> None:
    """Raises UserError unless each host gets the same number of rows."""
    if batch_size < 1 or batch_size % shard_count:
        raise UserError(f"data: {name}={batch_size} does not divide among {shard_count} hosts; take a multiple of it")


class BatchIterator:
    """Iterator over batches with background threads or processes; `close` ends them."""

    def __init__(self, loader: BatchLoader, steps: _Steps | _EvalBatches):
        import grain

        _settle_flags()
        data = loader.data
        self._loader = loader
        # In worker processes the buffer below is each worker's own queue; in this process it is the thread pool's.
        # Fewer than its threads would leave some of them idle.
        ahead = max(1, data.threads, -(-data.prefetch // max(1, data.workers)))
        threads = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=ahead if data.threads else 0)
        dataset = grain.MapDataset.source(steps).to_iter_dataset(threads)
        if data.workers:
            processes = grain.multiprocessing.MultiprocessingOptions(data.workers, per_worker_buffer_size=ahead)
            dataset = dataset.mp_prefetch(processes, worker_init_fn=_start_worker)
        batches = iter(dataset)
        # Grain's iterators close themselves when they die, which at the end of Python prints a traceback. The finalizer
        # runs before that, and only the holder keeps the iterator alive.
        self._holder = [batches]
        self._finalizer = weakref.finalize(self, _close, self._holder)
        batches.start_prefetch()

    def __iter__(self):
        return self

    def __next__(self):
        if not self._holder:
            raise StopIteration
        try:
            return self._loader._account(*next(self._holder[0]))
        except BaseException:
            self.close()
            raise

    def close(self):
        """Ends threads and processes; safe to call twice."""
        self._finalizer()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _close(holder):
    if holder:
        holder.pop().close()


def _settle_flags():
    """Grain asks absl's flags for its settings, and absl refuses while nobody has parsed a command line."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_worker(index: int, count: int):
    """In a worker process: Ctrl-C is the main process's business, and without a main process there is nothing to do."""
    _settle_flags()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process().sentinel

    def follow():
        connection.wait([parent])
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
