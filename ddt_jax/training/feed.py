"""What a run trains on, behind one interface: images or latents for a tokenizer, packed rows for a transformer."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from etils import epath

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.data.base import open_source
from ddt_jax.data.loader import BatchLoader, Loader
from ddt_jax.errors import UserError
from ddt_jax.io import atomic, json_object
from ddt_jax.tokenizers.caption_ids import CaptionBytes, CaptionIds
from ddt_jax.training import captions, corpus, latents

_RECORDS = "data.json"  # in a workdir


class Feed(Protocol):
    """Batches of a run.

    Attributes:
      settings: of the run, with what the data decides filled in.
      loader: makes this process's part of each batch.
      description: what and how much there is, for the opening lines.
      records: (source, how many records it has), of all that it is trained on. The order of rows follows from them.
    """

    settings: settings.Experiment
    loader: BatchLoader
    description: str
    records: tuple[tuple[str, int], ...]

    def check(self, model, codec_params: Callable[[], Any]) -> None:
        """Raises UserError if the data was made for another model. codec_params: makes the arrays of its codec."""

    def save(self, workdir) -> None:
        """Keeps with a new run what its data must not change under it."""


@dataclass(frozen=True)
class ImageFeed:
    settings: settings.Experiment
    loader: Loader
    captions: CaptionIds | None = None  # of a model that knows captions

    @property
    def description(self):
        return f"{len(self.loader.source):,} images from {self.loader.source.name}"

    @property
    def records(self):
        return ((self.loader.source.name, len(self.loader.source)),)

    def check(self, model, codec_params):
        name = self.settings.data.source
        if model.image_loss and name.startswith("latents:"):
            raise UserError(f"config: a renderer learns from images, and data.source={name} has none; name theirs")
        latents.check(self.loader.source, model, self.settings.data, codec_params)
        if model.classes:
            _check_labels(self.loader, model.classes)

    def save(self, workdir):
        if self.captions is not None:
            captions.save(workdir, self.captions)
        _remember_records(workdir, self)  # last, as `is_saved` goes by it


@dataclass(frozen=True)
class RowFeed:
    settings: settings.Experiment
    loader: BatchLoader
    corpus: corpus.Corpus

    @property
    def description(self):
        q = self.settings.sequences
        names = (part.folder if part.kind == "codes" else part.source for part in q.sources)
        return f"rows of {q.context:,} positions from {', '.join(names)}"

    @property
    def records(self):
        return self.loader.batcher.records

    def check(self, model, codec_params):
        q = self.settings.sequences
        for part in (*q.sources, *q.eval_sources):
            if part.kind == "pictures" and part.source.startswith("latents:"):
                source = corpus.open_records(self.settings, part).source
                latents.check(source, model, self.settings.data, codec_params)
        self.loader.batch_at(0)  # raises what is wrong with documents, before a run begins

    def save(self, workdir):
        corpus.save(workdir, self.corpus)
        _remember_records(workdir, self)


def _remember_records(workdir, feed):
    atomic.write_text(epath.Path(workdir) / _RECORDS, json.dumps({"records": feed.records}, indent=2) + "\n")


def is_saved(workdir) -> bool:
    """Whether a run has kept what `Feed.save` keeps."""
    return (epath.Path(workdir) / _RECORDS).exists()


def check_records(workdir, feed: Feed, note: Callable[[str], None] | None = None) -> None:
    """Whether a run that goes on finds as much to learn from as when it was begun; what it learns next depends on it.

    Args:
      note: told what has changed, in place of the error: it goes on with what there is now.

    Raises:
      UserError: records have gone, or others have come.
    """
    if not is_saved(workdir):  # of a new run, or one of an earlier version
        return
    path = epath.Path(workdir) / _RECORDS
    try:
        before = [(str(name), int(count)) for name, count in json_object.loads(path.read_text())["records"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data: {path} is damaged ({error}); remove it to go on with the data that is there") from error
    for (_, count), (name, now) in zip(before, feed.records, strict=False):
        if count != now:
            text = f"data: {name} had {count:,} records when the run was begun and has {now:,} now; the rest of the run"
            if note is None:
                raise UserError(f"{text} would see other rows; bring its files back, or go on with --force")
            note(f"{text} sees other rows")
    if note is not None and jax.process_index() == 0:
        _remember_records(workdir, feed)


def _check_labels(loader: Loader, classes: int) -> None:
    """Raises UserError if images have no labels, or others than the model knows."""
    source = loader.source
    labels = loader.batch_at(0)["label"]
    if labels.max() < 0:
        raise UserError(
            f"config: the images of {source.name} have no labels; set model.classes=0 to learn them without"
        )
    needed = max(int(labels.max()) + 1, len(source.label_names or ()))
    if needed > classes:
        raise UserError(f"config: {source.name} has {needed} classes; set model.classes={needed}, not {classes}")


def open_feed(s: settings.Experiment, workdir: str) -> Feed:
    """The feed of a run. Raises UserError if its data cannot be opened, or does not fit the settings."""
    if isinstance(s.model, settings.Multimodal):
        s, found = corpus.resolve(s, workdir)
        return RowFeed(s, corpus.open_rows(s, found, s.sequences.sources), found)
    if isinstance(s.model, settings.SEED):
        return _seed_feed(s, workdir)
    return ImageFeed(s, open_images(s, s.data.source))


def _seed_feed(s: settings.Experiment, workdir: str) -> ImageFeed:
    """The first stage reads captions, and the second where CLIP's text encoder says what images are drawn from. All
    keep what reads them for evaluation.
    """
    ids = captions.resolve(s, workdir)
    loader = open_images(s, s.data.source, caption_ids=ids if s.model.stage == "align" else captions.of_clip(s))
    if getattr(loader.source, "arrays", None):
        raise UserError(
            f"config: model.kind='seed' reads images, and data.source={s.data.source} has none; name theirs"
        )
    return ImageFeed(s, loader, ids)


def images_of(s: settings.Experiment) -> str:
    """The source of images of a run. Raises UserError if a transformer has several, or none."""
    if not isinstance(s.model, settings.Multimodal):
        return s.data.source
    pictures = [part.source for part in s.sequences.sources if part.kind == "pictures"]
    if len(pictures) != 1:
        raise UserError(f"latents: {s.name} has {len(pictures)} sources of pictures; name one with --source")
    return pictures[0]


def open_images(s: settings.Experiment, spec: str, batch_size: int = 0, caption_ids=None) -> Loader:
    """The loader of a source of images for this process.

    Args:
      batch_size: of all processes together; 0: train.batch_size.
      caption_ids: see `Loader`; None: captions are not read, or as bytes if the model takes those.

    Raises:
      UserError: if the source cannot be opened, or the batch does not divide among the processes.
    """
    if length := getattr(s.model, "caption_bytes", 0):
        caption_ids = CaptionBytes(length)
    reader = meshes.reader(s.mesh)
    return Loader(
        open_source(
            spec,
            image_size=s.data.image_size,
            cache_dir=s.data.cache_dir,
            clips=s.data.frames > 0,
            retry_seconds=s.data.retry_seconds,
        ),
        s.data,
        batch_size=batch_size or s.train.batch_size,
        seed=s.seed,
        shard_index=reader.index,
        shard_count=reader.count,
        caption_ids=caption_ids,
    )


def batch_shapes(s: settings.Experiment, model) -> dict:
    """Arrays of a global batch that the step takes: name → (shape, dtype). Needs no data."""
    n = s.train.batch_size
    if isinstance(s.model, settings.Multimodal):
        shapes = {name: ((n, *shape), dtype) for name, (shape, dtype) in model.shapes(s.sequences).items()}
    elif s.data.source.startswith("latents:"):
        shape, dtype = latents.layout(model.codec, s.data.image_size)
        shape = (s.data.frames, *shape) if s.data.frames else shape
        shapes = dict.fromkeys(("latent_mean", "latent_logvar"), ((n, *shape), jnp.dtype(dtype)))
    else:
        picture = (s.data.image_size, s.data.image_size, 3)
        of = {"video": (s.data.frames, *picture)} if s.data.frames else {"image": picture}
        shapes = {name: ((n, *shape), jnp.uint8) for name, shape in of.items()}
    if not isinstance(s.model, settings.Multimodal) and model.classes:
        shapes["label"] = ((n,), jnp.int32)
    if length := getattr(model, "caption_length", 0):
        shapes["caption_ids"] = ((n, length), model.caption_dtype)
    return shapes | {"slot": ((n,), jnp.int32)}


def step_inputs(batches: Iterator[dict], names) -> Iterator[dict]:
    """Batches without what the step does not take."""
    for batch in batches:
        yield {name: batch[name] for name in names}
