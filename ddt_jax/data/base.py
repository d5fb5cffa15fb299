"""What a data source is, and how a spec such as `parquet:/data/train-*.parquet` becomes one.

A source is random access with a length, so that any step's examples can be named by their index. It opens its files
lazily in each process and can be pickled, because worker processes receive a copy.
"""

import difflib
import re
from typing import Any, Protocol, TypedDict

from ddt_jax.errors import UserError
from ddt_jax.settings import Data


class BadRecord(Exception):  # noqa: N818  not an error of the program: the record is counted and redrawn
    """One record cannot be used; the text says why in a few words ("truncated JPEG")."""


class Record(TypedDict, total=False):
    """One example. Only `image`, `video`, or its latent is always there; what a source does not know is absent, never
    empty.

    image: encoded bytes, or uint8 [H, W, 3].
    video: in place of an image, a `data.videos.Clip`.
    latent_mean, latent_logvar: in place of an image, float [h, w, c].
    caption: non-empty text.
    captions: non-empty texts, `caption` the first of them; of an image that has been described several times.
    label: class number.
    meta: whatever else the source knows.
    """

    image: Any
    video: Any
    latent_mean: Any
    latent_logvar: Any
    caption: str
    captions: list[str]
    label: int
    meta: dict


class Source(Protocol):
    """Random access to records.

    Attributes:
      name: the spec's short form, for messages.
      label_names: class names by number, or None.

    One whose records hold arrays in place of an image says so in `arrays`: name → (shape, type); one whose records hold
    a `video`, in `clips`. One of images with several captions each says in `each` whether a record is an "image" with
    its `captions`, or one "caption": then several records are of the same image.
    """

    name: str
    label_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises BadRecord when this record cannot be read."""
        ...

    def describe(self, index: int) -> str:
        """Where the record lives, e.g. `train-00002.parquet row 417`."""
        ...


def class_caption(name: str) -> str:
    """What `?caption=label` writes of a class: "a photo of a deer"."""
    return f"a photo of {'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


class CaptionFromLabel:
    """A source whose captions are made from class names: "a photo of a deer"."""

    def __init__(self, source: Source):
        if not source.label_names:
            raise UserError(f"data: {source.name} has no class names, so ?caption=label has nothing to write")
        self.source = source
        self.name = source.name
        self.label_names = source.label_names
        self.clips = getattr(source, "clips", False)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self._captioned(self.source[index])

    @property
    def without_image(self):
        """(index) → the record without its image, of a source that can do so."""
        read = self.source.without_image
        return lambda index: self._captioned(read(index))

    def _captioned(self, record):
        record = dict(record)
        record.pop("caption", None)
        label = record.get("label", -1)
        if 0 <= label < len(self.label_names):
            record["caption"] = class_caption(self.label_names[label])
        return record

    def describe(self, index):
        return self.source.describe(index)


OPTIONS = {
    "parquet": ("image", "caption", "label", "cache_mb"),
    "webdataset": ("caption",),
    "folder": ("caption",),
    "tfds": ("data_dir", "image", "caption", "label"),
    "arrayrecord": ("caption",),
    "karpathy": ("split", "images", "each", "captions"),
    "latents": (),
    "scenes": (),
    "scenes_edits": (),
    "digits": ("caption",),
    "video": ("caption",),
    "moving_scenes": (),
}
SPLITS = {"scenes": ("train", "heldout"), "scenes_edits": ("train", "heldout"), "digits": ("train", "test")}
SPLITS |= {"moving_scenes": ("train", "heldout")}

# `?` is a wildcard too, so only `?key=value` at the very end counts as options.
_OPTIONS_AT_END = re.compile(r"^(?P<rest>.*?)\?(?P<options>[a-z_]+=[^&?]*(?:&[a-z_]+=[^&?]*)*)$", re.DOTALL)


def nearest(word: str, choices) -> str:
    """`; did you mean X?` when one of the choices is close, else the list of them."""
    return did_you_mean(word, choices) or f"; choose from {', '.join(choices)}"


def did_you_mean(word: str, choices) -> str:
    """The same, but empty when no choice is close."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def parse_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """Splits `kind:rest?key=value&...`.

    Raises:
      UserError: unknown kind, option or split.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or not rest:
        if kind in SPLITS:
            raise UserError(f"data: {spec} names no split; write {kind}:{' or '.join(SPLITS[kind])}")
        raise UserError(f"data: {spec!r} is not a source; write kind:where, e.g. parquet:/data/train-*.parquet")
    if kind == "codes":
        raise UserError(f"data: {spec} holds codes, not images; only a multimodal transformer reads them")
    if kind not in OPTIONS:
        raise UserError(f"data: {kind} in {spec!r} is not a kind of source{nearest(kind, OPTIONS)}")
    options: dict[str, str] = {}
    match = _OPTIONS_AT_END.match(rest)
    if match:
        rest = match["rest"]
        options = dict(pair.split("=", 1) for pair in match["options"].split("&"))
    for key in options:
        if key not in OPTIONS[kind]:
            known = nearest(key, OPTIONS[kind]) if OPTIONS[kind] else "; it takes none"
            raise UserError(f"data: {key} is not an option of {kind}{known}")
    if kind in SPLITS and rest not in SPLITS[kind]:
        raise UserError(f"data: {rest} is not a split of {kind}{nearest(rest, SPLITS[kind])}")
    return kind, rest, options


def open_source(
    spec: str,
    *,
    image_size: int = 32,
    cache_dir: str = "",
    clips: bool = False,
    retry_seconds: float = Data.retry_seconds,
) -> Source:
    """Opens a source.

    Args:
      spec: `kind:rest?options`, see OPTIONS; `${NAME}` and `~` expand. `?caption=label` writes captions from
        class names.
      image_size: side of the pictures that embedded sources draw.
      cache_dir: where offset indices and local copies live; "" = $XDG_CACHE_HOME/ddt_jax.
      clips: whether its records are to hold clips, or images.
      retry_seconds: for how long what fails in a way that passes is read again (`data.patience`).

    Raises:
      UserError: the spec is wrong, nothing matches it, it holds the other of the two, or the data lack what it needs.
    """
    from ddt_jax.data import files

    kind, rest, options = parse_spec(files.expand(spec))
    from_label = options.get("caption") == "label"
    if from_label:
        del options["caption"]
    elif "caption" in options and kind not in ("parquet", "tfds"):
        raise UserError(f"data: {kind} has no columns; the only choice is ?caption=label")
    match kind:
        case "parquet":
            from ddt_jax.data.parquet import ParquetSource

            source = ParquetSource(rest, **options, retry_seconds=retry_seconds)
        case "webdataset":
            from ddt_jax.data.webdataset import WebDatasetSource

            source = WebDatasetSource(rest, cache_dir=cache_dir, retry_seconds=retry_seconds)
        case "folder":
            from ddt_jax.data.folder import FolderSource

            source = FolderSource(rest, retry_seconds=retry_seconds)
        case "tfds":
            from ddt_jax.data.tfds import TfdsSource

            source = TfdsSource(rest, **options, retry_seconds=retry_seconds)
        case "arrayrecord":
            from ddt_jax.data.array_record import ArrayRecordSource

            source = ArrayRecordSource(rest, cache_dir=cache_dir, retry_seconds=retry_seconds)
        case "karpathy":
            from ddt_jax.data.karpathy import KarpathySource

            source = KarpathySource(rest, **options, retry_seconds=retry_seconds)
        case "latents":
            from ddt_jax.data.latents import LatentsSource

            source = LatentsSource(rest, cache_dir=cache_dir, retry_seconds=retry_seconds)
        case "digits":
            from ddt_jax.data.digits import DigitsSource

            source = DigitsSource(rest, image_size)
        case "scenes":
            from ddt_jax.data.scenes import ScenesSource

            source = ScenesSource(rest, image_size)
        case "scenes_edits":
            from ddt_jax.data.scenes_edits import EditsSource

            source = EditsSource(rest, image_size)
        case "video":
            from ddt_jax.data.video_folder import VideoFolderSource

            source = VideoFolderSource(rest, retry_seconds=retry_seconds)
        case "moving_scenes":
            from ddt_jax.data.moving_scenes import MovingScenesSource

            source = MovingScenesSource(rest, image_size)
    if getattr(source, "clips", False) != clips:
        holds, way = ("images, not clips", "=0") if clips else ("clips", ", how many frames of each are learned")
        raise UserError(f"data: {spec} holds {holds}; set data.frames{way}")
    if not len(source):
        raise UserError(f"data: {spec} holds no images")
    return CaptionFromLabel(source) if from_label else source
