"""`ddt-jax tokenize`: images of a source as codes of a trained tokenizer, in shards that outlive an interruption."""

import sys
from collections.abc import Iterator

import jax
import numpy as np

from ddt_jax import experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.data.base import open_source
from ddt_jax.data.codes import CodesSource, CodesWriter, Plan, Prepared, read_images
from ddt_jax.data.loader import EXAMPLES_KEPT
from ddt_jax.errors import UserError
from ddt_jax.evaluation.reconstruction import programs
from ddt_jax.multimodal.records import text_lengths
from ddt_jax.tokenizers.base import ImageTokenizer
from ddt_jax.tokenizers.text import open_text_tokenizer
from ddt_jax.training.fingerprint import fingerprint
from ddt_jax.training.progress import Progress

ORDERS = ("coarse_to_fine", "fine_to_coarse")


def tokenize(
    workdir: str,
    to: str,
    *,
    source: str = "",
    order: str = "",
    records: int = 0,
    shard_records: int = 8192,
    batch_size: int = 0,
    text: str = "",
    part: tuple[int, int] = (0, 1),
    overrides: tuple[tuple[str, str], ...] = (),
) -> dict:
    """Encodes a source with the newest checkpoint of a run, or goes on with what `to` holds of it.

    Args:
      source: spec; "" = the run's data.source.
      order: one of ORDERS; "" = the tokenizer's own.
      records: the first so many of the source; 0 = all.
      batch_size: images that are encoded at once; 0 = evaluate.batch_size. A multiple of the devices is taken.
      text: file of a text tokenizer, to store how long the captions are in its tokens.
      part: (i, n): this process makes every n-th shard from the i-th on; n of them share the work without talking.

    Returns:
      "records", "bad", "shards" and "made" (how many of them now), "stopped" (by Ctrl-C), "complete", "tokenizer",
      "order", "written".

    Raises:
      UserError: if the run, the source, the folder or an argument does not fit, or too many images are bad.
    """
    _check_arguments(order, records, shard_records, part)
    lengths_of = open_text_tokenizer(text) if text else None
    built, state = experiment.restore(workdir, overrides)
    s, model = built.settings, built.model
    if not isinstance(model, ImageTokenizer):
        raise UserError(f"tokenize: {workdir} is a run of kind {s.model.kind}, which makes no codes; train a tokenizer")
    spec = source or s.data.source
    images = open_source(
        spec, image_size=s.data.image_size, cache_dir=s.data.cache_dir, retry_seconds=s.data.retry_seconds
    )
    written = _written_order(model, order)
    reversed_ = written != model.token_order
    weights = experiment.weights(state)
    plan = Plan(
        tokenizer=fingerprint(s, model, weights, state.extra, written),
        num_tokens=model.num_tokens,
        codebook_size=model.codebook_size,
        image_size=s.data.image_size,
        order=written,
        reversed=reversed_,
        source=spec,
        records=min(records or len(images), len(images)),
        shard_records=shard_records,
    )
    writer = CodesWriter(to, plan)
    mine = range(part[0], plan.shards, part[1])
    done = {shard: writer.finished(shard) for shard in mine}
    todo = [shard for shard, report in done.items() if report is None]
    if kept := len(mine) - len(todo):
        print(f"tokenize: {kept:,} of {len(mine):,} shards are there and whole", file=sys.stderr)
    writer.write_vectors(model.code_vectors(weights, state.extra, np.arange(model.codebook_size)[None])[0])
    encoder = _Encoder(built, weights, state.extra, batch_size or s.evaluate.batch_size, reversed_)
    total = sum(len(plan.shard_range(shard)) for shard in todo)
    account = _Account(images, s.data, sum(report.records + report.bad for report in done.values() if report))
    made, stopped = 0, False
    try:
        with Progress(total, stream=sys.stderr, unit="record") as progress:
            for shard in todo:
                bad = account.bad
                ready = account.sort_out(read_images(images, plan.shard_range(shard), s.data), progress)
                done[shard] = writer.write(shard, encoder.encode(ready), lambda bad=bad: account.bad - bad)
                made += 1
    except KeyboardInterrupt:
        stopped = True
    shards = writer.complete()
    whole = [report for report in done.values() if report]
    if lengths_of and whole and not stopped:  # of its own shards: others may be missing yet, and measure theirs
        text_lengths(CodesSource(to, only=(plan, tuple(whole))), lengths_of)
    known = shards or whole
    return {
        "records": sum(shard.records for shard in known),
        "bad": sum(shard.bad for shard in known),
        "shards": len(known),
        "made": made,
        "stopped": stopped,
        "complete": shards is not None,
        "tokenizer": plan.tokenizer,
        "order": written,
        "written": str(to),
    }


def _check_arguments(order, records, shard_records, part):
    if order and order not in ORDERS:
        raise UserError(f"tokenize: --order {order} is not one of {', '.join(ORDERS)}")
    if records < 0 or shard_records < 1:
        raise UserError(f"tokenize: --records {records} and --shard-records {shard_records} must be positive")
    if not 0 <= part[0] < part[1]:
        raise UserError(f"tokenize: --part {part[0]}/{part[1]} is not one of 0/{part[1]} to {part[1] - 1}/{part[1]}")


def _written_order(model, order):
    if order and model.token_order == "none":
        raise UserError(f"tokenize: --order {order}: the codes of this tokenizer have no order; leave it out")
    return order or model.token_order


class _Account:
    """Counts bad records and ends the work when they are too many."""

    def __init__(self, source, data: settings.Data, seen: int):
        self._source, self._limit = source, data.max_bad_fraction
        self._earlier = seen
        self.seen = self.bad = 0
        self._first = ""

    def sort_out(self, prepared: Iterator[Prepared], progress: Progress) -> Iterator[Prepared]:
        """Passes on the records that can be used. Raises UserError as soon as too many cannot."""
        for record in prepared:
            self.seen += 1
            progress.update(self.seen)
            if not record.error:
                yield record
                continue
            self.bad += 1
            where = self._source.describe(record.index)
            self._first = self._first or f"{where}: {record.error}"
            if self.bad <= EXAMPLES_KEPT:
                progress.note(f"data: {where}: {record.error}; left out")
            # The share is of all records of the plan, so that it does not depend on which come first.
            if self.bad > self._limit * max(progress.total_steps + self._earlier, 1):
                raise UserError(
                    f"data: {self.bad:,} of {self.seen:,} images could not be used (first: {self._first}), more than "
                    f"data.max_bad_fraction={self._limit} of all allows; mend the data or raise the limit"
                )


class _Encoder:
    """Images to codes in batches of one size, split over all devices of this process."""

    def __init__(self, built, params, extra, batch_size, reversed_):
        self._mesh = meshes.make_mesh(settings.Mesh(data=-1, fsdp=1), jax.local_devices())
        self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        self._arrays = jax.device_put((params, extra), meshes.replicated(self._mesh))
        self._run = programs(built.model).encode
        self._step = -1 if reversed_ else 1

    def encode(self, records: Iterator[Prepared]) -> Iterator[dict]:
        """Records with their codes, in order. One batch is on the device while the next is read."""
        running = None
        for batch in _batches(records, self._batch_size):
            started = batch, self._start([image for record in batch for image in record.images])
            if running is not None:
                yield from self._finish(*running)
            running = started
        if running is not None:
            yield from self._finish(*running)

    def _start(self, images):
        missing = -len(images) % self._batch_size
        stacked = np.stack([*images, *([images[0]] * missing)])
        parts = np.split(stacked, len(stacked) // self._batch_size)
        with jax.set_mesh(self._mesh):
            return [self._run(*self._arrays, meshes.put_batch({"image": p}, self._mesh)["image"]) for p in parts]

    def _finish(self, batch, running):
        codes = np.concatenate([np.asarray(part) for part in running])[:, :: self._step]
        at = 0
        for record in batch:
            yield record.fields | {"codes": codes[at : at + len(record.images)]}
            at += len(record.images)


def _batches(records, size):
    """Lists of records that together have at least `size` images, but for the last."""
    batch, count = [], 0
    for record in records:
        batch.append(record)
        count += len(record.images)
        if count >= size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch
