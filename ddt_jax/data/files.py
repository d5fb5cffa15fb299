"""Files of a source: finding them, reading pieces of them, and where derived files live.

Everything goes through `etils.epath`, so `gs://` and `s3://` paths work; local files take the fast way (pread, mmap).
"""

import hashlib
import os
import re
import threading
import uuid
from collections import OrderedDict
from pathlib import Path as LocalPath

import numpy as np

from ddt_jax.data.base import SPLITS, did_you_mean, parse_spec
from ddt_jax.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "pnm", "tif", "tiff")
MAX_OPEN_FILES = 256  # per process; the usual limit of a shell is 1024
# What is larger is no record of anything and must not be held in memory.
MAX_TEXT_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 30
MAX_VIDEO_BYTES = 1 << 32


def expand(spec: str) -> str:
    """Replaces `${NAME}` by the environment and a leading `~`; `${DDT_JAX_DATA}` has a default."""

    def value(match):
        name = match[1]
        if name in os.environ:
            return os.environ[name]
        beside = LocalPath(__file__).resolve().parents[3] / "shared" / "data"
        if name == "DDT_JAX_DATA" and beside.is_dir():
            return str(beside)
        raise UserError(f"data: the environment variable {name} in {spec} is not set")

    spec = re.sub(r"\$\{(\w+)\}", value, spec)
    kind, colon, rest = spec.partition(":")
    return kind + colon + os.path.expanduser(rest) if rest.startswith("~") else spec


def identity(spec: str) -> str:
    """The same for every way to write one source: absolute, every option included. For keys of caches."""
    kind, rest, options = parse_spec(expand(spec))
    if kind not in (*SPLITS, "tfds") and is_local(rest):  # else it is a name
        rest = os.path.abspath(rest)
    return repr((kind, rest, sorted(options.items())))


def is_local(path: str) -> bool:
    return "://" not in path


def path_of(path: str):
    from etils import epath

    return epath.Path(path)


def remote_error(path: str, error: Exception) -> UserError:
    """Says which package a remote path needs."""
    package = {"gs": "'ddt-jax[gcs]'", "s3": "'ddt-jax[s3]'", "az": "adlfs"}.get(path.split("://")[0], "fsspec")
    return UserError(f"data: {path} cannot be opened ({str(error).strip()}); run: pip install {package}")


def match_files(pattern: str) -> list[str]:
    """All files that match, sorted.

    Raises:
      UserError: none does; the message names what is nearest.
    """
    try:
        found = _match(pattern)
        if found:
            return found
        raise UserError(f"data: no file matches {pattern}{_what_is_there(pattern)}")
    except ImportError as error:
        raise remote_error(pattern, error) from None


def _match(pattern: str) -> list[str]:
    wildcard = re.search(r"[*?\[]", pattern)
    if not wildcard:
        path = path_of(pattern)
        if path.is_dir():
            raise UserError(f"data: {pattern} is a folder; name its files, e.g. {pattern.rstrip('/')}/*")
        return [pattern] if path.exists() else []
    cut = pattern.rfind("/", 0, wildcard.start())
    root, rest = (pattern[:cut] or "/", pattern[cut + 1 :]) if cut >= 0 else (".", pattern)
    return sorted(str(path) for path in path_of(root).glob(rest) if not path.name.startswith("."))


def _what_is_there(pattern: str) -> str:
    folder, _, name = pattern.rpartition("/")
    folder = folder or "."
    if re.search(r"[*?\[]", folder):
        return ""
    if not path_of(folder).is_dir():
        return nearest_folder(folder)
    names = sorted(path.name for path in path_of(folder).iterdir())
    if not names:
        return f"; {folder} is empty"
    shown = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
    return did_you_mean(name, names) or f"; {folder} holds {shown}"


def nearest_folder(folder: str) -> str:
    """`; there is no folder F; did you mean G?`"""
    parent, _, name = folder.rstrip("/").rpartition("/")
    if not path_of(parent or "/").is_dir():
        return f"; there is no folder {folder}"
    names = sorted(path.name for path in path_of(parent or "/").iterdir())
    return f"; there is no folder {folder}{did_you_mean(name, names)}"


def class_names_beside(path: str) -> tuple[str, ...] | None:
    """Names from a `classes.txt` in the file's folder, one per line."""
    names = path_of(path).parent / "classes.txt"
    if not names.exists():
        return None
    return tuple(line.strip() for line in names.read_text().splitlines() if line.strip())


def read_text(data: bytes, what: str) -> str:
    """Decodes a caption or a label.

    Raises:
      BadRecord: it is not UTF-8.
    """
    from ddt_jax.data.base import BadRecord

    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadRecord(f"{what} is not UTF-8") from None


class Handles:
    """Positioned reads from many files with few open handles, shared by the threads of one process. Picklable."""

    def __init__(self):
        self._open: OrderedDict[str, object] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return (Handles, ())  # handles belong to a process

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only at the end of the file. Raises OSError, or what a store raises."""
        with self._lock:
            handle = self._open.get(path)
            if handle is None:
                handle = self._open[path] = _Local(path) if is_local(path) else _Remote(path)
                if len(self._open) > MAX_OPEN_FILES:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
        try:
            return handle.read(offset, size)
        except Exception:  # a handle that went stale stays so: the next try opens another
            with self._lock:
                if self._open.get(path) is handle:
                    del self._open[path]
            raise

    def close(self):
        with self._lock:
            self._open.clear()


class _Local:
    """A file open for positioned reads, by any number of threads at once. Closed when nobody holds it any more: what
    `Handles` has let go may still be read.
    """

    def __init__(self, path):
        self._number = None
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset, size):
        return os.pread(self._number, size, offset)

    def __del__(self, close=os.close):  # at the end of Python the module may have gone
        if self._number is not None:
            close(self._number)


class _Remote:
    """The same of a store, for one thread after another: its place in the file is shared."""

    def __init__(self, path):
        self._lock, self._file = threading.Lock(), None
        self._file = path_of(path).open("rb")

    def read(self, offset, size):
        with self._lock:
            self._file.seek(offset)
            return self._file.read(size)

    def __del__(self):
        if self._file is not None:
            self._file.close()


def cache_folder(cache_dir: str):
    """The folder for derived files, as a path; not created."""
    if cache_dir:
        return path_of(os.path.expanduser(cache_dir))
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return path_of(home) / "ddt_jax"


def fingerprint(path: str) -> str:
    """Changes when the file does: path, size, modification time, and both ends where a store tells no time."""
    stat = path_of(path).stat()
    full = os.path.abspath(path) if is_local(path) else path
    mtime = os.stat(path).st_mtime_ns if is_local(path) else int(stat.mtime or 0)
    parts = [full.encode(), str(stat.length).encode(), str(mtime).encode()]
    if not mtime:
        with path_of(path).open("rb") as file:
            parts.append(file.read(4096))
            file.seek(max(0, stat.length - 4096))
            parts.append(file.read(4096))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def write_atomically(path, write) -> None:
    """`write(file)` into a sibling, then rename: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class ByFile:
    """Maps a record index to (file, index inside it)."""

    def __init__(self, counts):
        self.ends = np.cumsum(np.asarray(counts, np.int64))

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self.ends, index, side="right"))
        return file, int(index - (self.ends[file - 1] if file else 0))
