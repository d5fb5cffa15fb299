"""WebDataset shards (tar) with random access by an index of offsets.

A shard's headers are read once; where each member's bytes lie is kept in the cache folder under a name made of path,
size and modification time, so a changed shard is indexed anew. Members with one name and several extensions are one
sample: an image (.jpg, .png, ...), its caption (.txt), its class (.cls), or both in a .json.
"""

import io
import json
import sys
import tarfile
import time

import numpy as np

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, Record
from ddt_jax.data.patience import Patience, is_passing
from ddt_jax.errors import UserError
from ddt_jax.io import json_object
from ddt_jax.settings import Data

VERSION = 1
PARTS = ("image", "txt", "cls", "json")
_UNPACK = {"gz": "gunzip -k", "tgz": "gunzip -k", "bz2": "bunzip2 -k", "xz": "unxz -k", "zst": "zstd -dk"}
_MAGIC = {b"\x1f\x8b": "gz", b"BZ": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zst"}


class WebDatasetSource:
    """Samples of all shards that match a glob, in the order of the shards' names and of the images in them.

    Attributes:
      ignored: members that were left out, by reason.

    Raises:
      UserError: no shard, a compressed or damaged one, or no image in them.
    """

    def __init__(self, pattern: str, *, cache_dir: str = "", retry_seconds: float = Data.retry_seconds):
        self.name = f"webdataset:{pattern}"
        self._patience = Patience(self.name, retry_seconds)
        self._paths = self._patience.opening(lambda: files.match_files(pattern))
        for path in self._paths:
            self._patience.opening(lambda path=path: _refuse_compressed(path))

        def shard(i, path):
            return self._patience.opening(lambda: _load_or_build(path, cache_dir, i, len(self._paths)))

        shards = [shard(i, path) for i, path in enumerate(self._paths)]
        self._keys = [keys for keys, _, _ in shards]
        self._offsets = [offsets for _, offsets, _ in shards]
        self._by_file = files.ByFile([len(offsets) for offsets in self._offsets])
        self.ignored: dict[str, int] = {}
        for _, _, ignored in shards:
            for reason, count in ignored.items():
                self.ignored[reason] = self.ignored.get(reason, 0) + count
        self.label_names = files.class_names_beside(self._paths[0])
        self._handles = files.Handles()

    def __len__(self):
        return len(self._by_file)

    def describe(self, index):
        shard, row = self._by_file.locate(index)
        return f"{self._paths[shard].rsplit('/', 1)[-1]} sample {self._keys[shard][row].decode('utf-8', 'replace')}"

    def __getitem__(self, index) -> Record:
        image = self._read(*self._by_file.locate(index), "image")
        return Record(image=image) | self.without_image(index)

    def without_image(self, index) -> Record:
        """The same without `image`, which is not read. Raises BadRecord."""
        shard, row = self._by_file.locate(index)
        record = Record()
        text, label, extra = (self._read(shard, row, part) for part in PARTS[1:])
        if extra is not None:
            _add_json(record, extra)
        if text is not None:
            record["caption"] = files.read_text(text, "caption")
        if label is not None:
            try:
                record["label"] = int(label)
            except ValueError:
                raise BadRecord(f"class {label[:20]!r} is not a number") from None
        if not record.get("caption"):
            record.pop("caption", None)
        return record

    def _read(self, shard, row, part):
        offset, size = (int(x) for x in self._offsets[shard][row, PARTS.index(part)])
        if offset < 0:
            return None
        if size > (files.MAX_IMAGE_BYTES if part == "image" else files.MAX_TEXT_BYTES):
            raise BadRecord(f"{part if part == 'image' else f'.{part}'} of {size} bytes")
        path = self._paths[shard]
        try:
            where = f"{path.rsplit('/', 1)[-1]} at byte {offset}"
            data = self._patience.record(lambda: self._handles.read(path, offset, size), where)
        except OSError as error:
            raise BadRecord(f"shard cannot be read ({error.strerror or error})") from None
        if len(data) != size:
            raise BadRecord(f"shard ends inside .{part}")
        return data


def _add_json(record, data):
    try:
        fields = json_object.loads(data)
    except ValueError:
        raise BadRecord(".json is not an object") from None
    caption, label = (fields.get("caption") or fields.get("text")), fields.get("label", fields.get("cls"))
    if isinstance(caption, str):
        # JSON can write half of a surrogate pair, which is no text.
        record["caption"] = files.read_text(caption.encode("utf-8", "surrogatepass"), "caption")
    if isinstance(label, int):
        record["label"] = label


def _refuse_compressed(path):
    with files.path_of(path).open("rb") as file:
        head = file.read(6)
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if kind:
        command = _UNPACK[kind]
        raise UserError(f"data: {path} is compressed, which allows no random access; unpack it: {command} {path}")


def _load_or_build(path, cache_dir, number, total):
    """(keys, offsets int64 [n, parts, 2], ignored) of a shard, from the cache when it has them."""
    mark = files.fingerprint(path)
    cached = files.cache_folder(cache_dir) / "webdataset" / f"{path.rsplit('/', 1)[-1]}-{mark}.npz"
    if cached.exists():
        try:
            return _load(cached, mark)
        except Exception:  # a damaged cache file of any kind: it is only a cache
            print(f"data: index {cached} is damaged and is built again", file=sys.stderr)
    index = build_index(path, f"indexing shard {number + 1} of {total} ")
    keys, offsets, ignored = index
    if not len(keys):
        found = f"; it ignored {_listed(ignored)}" if ignored else ""
        raise UserError(f"data: {path} holds no images ({', '.join(files.IMAGE_EXTENSIONS)}){found}")

    def write(file):
        buffer = io.BytesIO()  # np.savez seeks, remote files may not
        info = json.dumps({"version": VERSION, "mark": mark, "ignored": ignored})
        np.savez(buffer, keys=keys, offsets=offsets, info=np.array(info))
        file.write(buffer.getbuffer())

    try:
        files.write_atomically(cached, write)
    except OSError as error:
        print(f"data: index of {path} could not be kept in {cached.parent} ({error})", file=sys.stderr)
    return index


def _load(cached, mark):
    with np.load(io.BytesIO(cached.read_bytes()), allow_pickle=False) as arrays:
        info = json.loads(str(arrays["info"]))
        keys, offsets = arrays["keys"], arrays["offsets"]
    if info["version"] != VERSION or info["mark"] != mark or offsets.shape != (len(keys), len(PARTS), 2):
        raise ValueError("index of another file")
    return keys, offsets, info["ignored"]


def _listed(ignored):
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(ignored.items()))


def build_index(path: str, title: str = "indexing "):
    """Reads a shard's headers.

    Returns:
      keys: bytes [n], names without extension, in the order of the images.
      offsets: int64 [n, 4, 2], (offset, size) of image, txt, cls, json; -1 where there is none.
      ignored: reason -> how many members.

    Raises:
      UserError: the archive is damaged or cut off.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    ignored: dict[str, int] = {}
    progress = _Progress(f"data: {title}{path.rsplit('/', 1)[-1]}")
    with files.path_of(path).open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                count = end = 0
                while member := tar.next():
                    if member.size < 0 or tar.offset <= end:  # else a damaged one is read for ever
                        raise tarfile.ReadError("its members overlap")
                    end = tar.offset
                    tar.members.clear()  # tarfile keeps every header otherwise
                    progress(count := count + 1)
                    reason = _why_ignored(member) or _add(samples, member)
                    if reason:
                        ignored[reason] = ignored.get(reason, 0) + 1
                end = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, OSError, EOFError, RecursionError, MemoryError) as error:
            if is_passing(error):
                raise
            raise UserError(f"data: {path} is damaged or cut off ({error}); fetch it again") from None
        # tarfile takes a header that it cannot read for the end of the archive.
        file.seek(end)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise UserError(f"data: {path} is damaged at byte {end}; fetch it again")
    without = sum("image" not in parts for parts in samples.values())
    if without:
        ignored["samples without an image"] = without
    kept = [(key, parts) for key, parts in samples.items() if "image" in parts]
    kept.sort(key=lambda sample: sample[1]["image"])
    offsets = np.array([[parts.get(part, (-1, 0)) for part in PARTS] for _, parts in kept], np.int64)
    progress.end(f"{len(kept):,} images" + (f", ignored {_listed(ignored)}" if ignored else ""))
    names = np.array([key.encode("utf-8", "surrogateescape") for key, _ in kept], dtype=np.bytes_)
    return names, offsets.reshape(-1, len(PARTS), 2), ignored


def _why_ignored(member):
    if member.isdir():
        return None
    if member.issym() or member.islnk():
        return "links"
    if not member.isreg() or member.issparse():
        return "special members"
    if member.name.startswith("/"):
        return "absolute paths"
    if ".." in member.name.split("/"):
        return "paths with .."
    return None


def _add(samples, member):
    """Enters a member into its sample; returns why it was ignored, if it was."""
    folder, _, name = member.name.rpartition("/")
    key, dot, extension = name.partition(".")
    if member.isdir() or not key:
        return None if member.isdir() else "hidden files"
    extension = extension.lower()
    part = "image" if extension in files.IMAGE_EXTENSIONS else extension
    if part not in PARTS:
        return f".{extension} members" if dot else "members without extension"
    parts = samples.setdefault(f"{folder}/{key}" if folder else key, {})
    if part in parts:
        return "second members of one kind"
    parts[part] = (member.offset_data, member.size)
    return None


class _Progress:
    """One line on stderr, rewritten on a terminal, written once at the end elsewhere."""

    def __init__(self, title):
        self._title = title
        self._next = time.monotonic() + 0.5
        self._live = sys.stderr.isatty()

    def __call__(self, count):
        if self._live and count % 256 == 0 and time.monotonic() > self._next:
            self._next = time.monotonic() + 0.5
            print(f"\r{self._title}: {count:,} members", end="", file=sys.stderr, flush=True)

    def end(self, text):
        start = "\r\x1b[K" if self._live else ""
        print(f"{start}{self._title}: {text}", file=sys.stderr, flush=True)
