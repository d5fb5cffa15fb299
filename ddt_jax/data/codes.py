"""Images as codes, with their captions: what `ddt-jax tokenize` writes and the multimodal transformer reads.

    DIR/plan.json                which tokenizer, which records, cut into which shards: written first
    DIR/shard-00000.array_record one shard; DIR/shard-00000.json stands beside it once it is whole, with its SHA-256
    DIR/code_vectors.npy         float32 [codebook_size, d]: what the tokenizer's decoder is given for each code
    DIR/index.json               plan and shards, written when all shards are there; without it nothing is read

A record holds `codes` (one row for each of its images), `index` (its number in the source it was made from) and, where
they are known, `caption`, `label` and a document of its own as `turns` or `parts` (see multimodal/records.py).
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from typing import Any

import numpy as np

from ddt_jax.data import files
from ddt_jax.data.array_record import ArrayRecordSource, write_array_record
from ddt_jax.data.base import BadRecord, Source, parse_spec
from ddt_jax.data.images import prepare
from ddt_jax.data.patience import Patience
from ddt_jax.data.pictures import encoded_images, fields_of
from ddt_jax.errors import UserError
from ddt_jax.io import atomic, json_object
from ddt_jax.settings import Data

FORMAT = 1
_PLAN, _INDEX, _VECTORS = "plan.json", "index.json", "code_vectors.npy"
_SHOWN = 8  # characters of a fingerprint in messages


@dataclass(frozen=True)
class Plan:
    """What the shards of a folder are to hold.

    Attributes:
      tokenizer: fingerprint of the image tokenizer, order included.
      num_tokens: codes of an image, K.
      codebook_size: codes lie in [0, codebook_size).
      image_size: pixels of the images' sides.
      order: in which codes are written: "coarse_to_fine", "fine_to_coarse" or "none" (there is no order in them).
      reversed: they were turned round for that; turn them back before the tokenizer decodes them.
      source: spec of the images.
      records: how many records of the source are looked at.
      shard_records: how many of them a shard is made from.
    """

    tokenizer: str
    num_tokens: int
    codebook_size: int
    image_size: int
    order: str
    reversed: bool
    source: str
    records: int
    shard_records: int
    format: int = FORMAT

    @property
    def shards(self) -> int:
        return -(-self.records // self.shard_records)

    def shard_range(self, shard: int) -> range:
        """Records of the source that a shard is made from."""
        return range(shard * self.shard_records, min((shard + 1) * self.shard_records, self.records))

    def read_codes(self, data: bytes):
        """int32 [n, K] from the bytes of a record."""
        return np.frombuffer(data, self.dtype).reshape(-1, self.num_tokens).astype(np.int32)

    @property
    def dtype(self) -> str:
        return "<u2" if self.codebook_size <= 1 << 16 else "<u4"


@dataclass(frozen=True)
class Shard:
    """A shard that is whole: its records, how many could not be used, and the SHA-256 of its file."""

    name: str
    records: int
    bad: int
    sha256: str


class CodesWriter:
    """Shards of a plan in a folder that may hold some already, from this or another process.

    Raises:
      UserError: the folder holds codes of another plan, is on an object store, or cannot be written.
    """

    def __init__(self, folder, plan: Plan):
        if not files.is_local(str(folder)):
            raise UserError(f"tokenize: {folder} is not a local folder, and ArrayRecord writes local files only")
        self.folder, self.plan = files.path_of(folder), plan
        path = self.folder / _PLAN
        try:
            if path.exists():
                self._check(_read(path, Plan))
            elif (self.folder / _INDEX).exists():
                raise UserError(f"tokenize: {folder} holds codes but no {_PLAN}; use another folder")
            else:
                atomic.write_text(path, json.dumps(asdict(plan), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"tokenize: cannot write to {folder}: {error.strerror or error}") from error

    def _check(self, found):
        if found.tokenizer != self.plan.tokenizer:
            raise UserError(
                f"tokenize: these codes were made by tokenizer {found.tokenizer[:_SHOWN]}…, the run's tokenizer is "
                f"{self.plan.tokenizer[:_SHOWN]}…; use another folder than {self.folder}, or remove it"
            )
        for name, value in asdict(found).items():
            if value != getattr(self.plan, name):
                raise UserError(
                    f"tokenize: {self.folder} was begun with {name}={value}, now it is {getattr(self.plan, name)}; "
                    "use another folder, or what it was begun with"
                )

    def write_vectors(self, vectors_VD) -> None:
        """What the decoder is given for each code, float32 [codebook_size, d]."""
        try:
            with atomic.replacing(self.folder / _VECTORS) as file:
                np.save(file, np.asarray(vectors_VD, np.float32))
        except OSError as error:
            raise UserError(f"tokenize: cannot write to {self.folder}: {error.strerror or error}") from error

    def finished(self, shard: int) -> Shard | None:
        """A shard that is whole and unchanged; None if it has to be made."""
        report, path = self._report(shard), self._path(shard)
        if not report.exists() or not path.exists():
            return None
        try:
            found = _read(report, Shard)
        except UserError:
            return None
        return found if _sha256(path) == found.sha256 else None

    def write(self, shard: int, records: Iterable[dict[str, Any]], count_bad=lambda: 0) -> Shard:
        """Writes a shard from records with `codes` int [n, K].

        Args:
          count_bad: asked when all records have been written.
        """
        path = self._path(shard)
        scratch = path.parent / f".{path.name}.tmp"
        try:
            count = write_array_record(str(scratch), records, self._pack)
            done = Shard(path.name, count, count_bad(), _sha256(scratch))
            scratch.replace(path)
            atomic.write_text(self._report(shard), json.dumps(asdict(done)) + "\n")
        except OSError as error:
            raise UserError(f"tokenize: cannot write to {self.folder}: {error.strerror or error}") from error
        finally:
            scratch.unlink(missing_ok=True)
        return done

    def complete(self) -> list[Shard] | None:
        """Writes the index once every shard is there, and returns the shards; None if some are missing."""
        reports = [self._report(shard) for shard in range(self.plan.shards)]
        if not all(report.exists() for report in reports):
            return None
        shards = [_read(report, Shard) for report in reports]
        index = {"plan": asdict(self.plan), "shards": [asdict(shard) for shard in shards]}
        atomic.write_text(self.folder / _INDEX, json.dumps(index, indent=2) + "\n")
        return shards

    def _pack(self, record):
        import msgpack

        codes = np.asarray(record["codes"])
        if codes.ndim != 2 or codes.shape[1] != self.plan.num_tokens:
            raise ValueError(f"codes of shape {codes.shape}, not [n, {self.plan.num_tokens}]")
        if codes.min() < 0 or codes.max() >= self.plan.codebook_size:
            raise ValueError(f"codes outside [0, {self.plan.codebook_size})")
        return msgpack.packb(record | {"codes": codes.astype(self.plan.dtype).tobytes()})

    def _path(self, shard):
        return self.folder / f"shard-{shard:05d}.array_record"

    def _report(self, shard):
        return self.folder / f"shard-{shard:05d}.json"


class CodesSource(ArrayRecordSource):
    """Records of a folder of codes: see the module. Picklable, like every source.

    Args:
      only: plan and shards, of a folder that need not be complete: its other shards are left out; None: as its index
        says.

    Attributes:
      plan: what made them.

    Raises:
      UserError: there is no such folder, or it is not complete.
    """

    def __init__(
        self,
        folder: str,
        *,
        cache_dir: str = "",
        retry_seconds: float = Data.retry_seconds,
        only: tuple[Plan, tuple[Shard, ...]] | None = None,
    ):
        folder = files.expand(str(folder)).removeprefix("codes:").rstrip("/")
        self.folder = folder
        opening = Patience(f"codes:{folder}", retry_seconds).opening
        self.plan, self.shards = only or opening(lambda: _read_index(folder))
        super().__init__(f"{folder}/shard-*.array_record", cache_dir=cache_dir, retry_seconds=retry_seconds)
        self.name = f"codes:{folder}"
        found = dict(zip((name.rsplit("/", 1)[-1] for name in self._names), self._counts, strict=True))
        for shard in self.shards:
            if found.get(shard.name) != shard.records:
                raise UserError(
                    f"data: {folder}/{shard.name} holds {found.get(shard.name, 0):,} records, its index says "
                    f"{shard.records:,}; run the same `ddt-jax tokenize` again"
                )
        self.records_before = np.cumsum([0, *(shard.records for shard in self.shards)])

    def _find(self, pattern):
        every, known = super()._find(pattern), {shard.name for shard in self.shards}
        return [name for name in every if name.rsplit("/", 1)[-1] in known] or every  # what is missing is told above

    @property
    def num_codes(self) -> int:
        """How many codes there are."""
        return self.plan.codebook_size

    @property
    def origin(self) -> str:
        """What the order of formats is keyed by: the source, as `PictureRecords` calls it."""
        kind, rest, _ = parse_spec(self.plan.source)
        return f"{kind}:{rest}"

    def without_images(self, index):
        """What can be read without decoding images, of which there are none. Raises BadRecord."""
        return self[index]

    def code_vectors(self) -> np.ndarray:
        """Float32 [codebook_size, d]; see the module. Raises UserError if they are not there."""
        path = files.path_of(self.folder) / _VECTORS
        try:
            with path.open("rb") as file:
                vectors = np.load(file)
        except (OSError, ValueError):
            vectors = np.zeros((0, 0))
        if vectors.ndim != 2 or len(vectors) != self.plan.codebook_size:
            raise UserError(f"data: {path} does not hold the vectors of codes; run the same `ddt-jax tokenize` again")
        return vectors

    def __getitem__(self, index):
        import msgpack

        try:
            record = msgpack.unpackb(self.read(index))
            codes = self.plan.read_codes(record["codes"])
        except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
            raise BadRecord(f"not a record of codes ({type(error).__name__})") from None
        if not isinstance(record.get("caption", ""), str):
            raise BadRecord("its caption is no text")
        if not codes.size or codes.max() >= self.plan.codebook_size:
            raise BadRecord(f"codes outside [0, {self.plan.codebook_size})")
        return record | {"codes": codes}


def _read_index(folder):
    path = files.path_of(folder) / _INDEX
    if not path.exists():
        if not (path.parent / _PLAN).exists():
            there = "" if path.parent.exists() else files.nearest_folder(folder)
            raise UserError(f"data: {folder} holds no codes{there}; `ddt-jax tokenize --to {folder}` makes them")
        plan = _read(path.parent / _PLAN, Plan)
        done = len(list(path.parent.glob("shard-*.json")))
        raise UserError(
            f"data: the codes in {folder} are not complete ({done:,} of {plan.shards:,} shards); "
            "run the same `ddt-jax tokenize` again"
        )
    try:
        tree = json_object.loads(path.read_text())
        return _typed(tree["plan"], Plan), tuple(_typed(shard, Shard) for shard in tree["shards"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"data: {path} is damaged ({reason}); run the same `ddt-jax tokenize` again") from None


def _read(path, kind):
    try:
        return _typed(json_object.loads(path.read_text()), kind)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"tokenize: {path} is damaged ({type(error).__name__}: {error}); remove it") from None


def _typed(tree, kind):
    if not isinstance(tree, dict):
        raise ValueError(f"{tree!r:.40} in the place of a {kind.__name__.lower()}")
    if kind is Plan and tree.get("format") != FORMAT:
        raise ValueError(f"format {tree.get('format')}, this version reads {FORMAT}")
    for f in fields(kind):
        value = tree[f.name]
        if type(value) is not f.type or (f.type is int and value < (f.name not in ("records", "bad"))):
            raise ValueError(f"{f.name}={value!r:.40}")
    return kind(**{f.name: tree[f.name] for f in fields(kind)})


def _sha256(path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A record whose images are ready to be encoded, or why it cannot be used."""

    index: int
    images: tuple[np.ndarray, ...] = ()  # uint8 [S, S, 3] each
    fields: dict[str, Any] | None = None  # caption, label, turns, parts
    error: str = ""


def read_images(source: Source, indices: Iterable[int], data: Data) -> Iterator[Prepared]:
    """Records in the order of indices, decoded by `data.threads` threads, without augmentation.

    A record's further images are what its source calls `images`, encoded; its own document `turns` or `parts`.
    """
    data = replace(data, flip=False)
    indices = iter(indices)
    with ThreadPoolExecutor(max(1, data.threads)) as pool:
        waiting = deque(pool.submit(_prepare, source, i, data) for i in islice(indices, 64 * data.threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_prepare, source, i, data) for i in islice(indices, 1))


def _prepare(source, index, data):
    try:
        record = source[index]
        images = tuple(prepare(image, data) for image in encoded_images(record))
    except BadRecord as error:
        return Prepared(index, error=str(error))
    return Prepared(index, images, fields_of(record) | {"index": index})
