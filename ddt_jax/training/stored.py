"""A checkpoint as it lies on a disk: its files and, a block at a time, its arrays. No device and no model is needed.

Orbax keeps the arrays of a tree in one OCDBT database, `STEP/state`, as zarr arrays named after their paths; this
module is the only one that knows so. `STEP/files.json` is ours: the size and SHA-256 of every other file, written when
the checkpoint has been read back (`training/readback.py`).

Storage that fails for a while is no damage: what passes is read again for some seconds, and then Away is raised.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import tensorstore
from etils import epath

from ddt_jax.data import patience
from ddt_jax.errors import Away
from ddt_jax.io import atomic, json_object
from ddt_jax.training.checksum import as_hex, part_sums

LIST = "files.json"
READ_BACK = "readback."  # files of hosts that have read their part; they last until the list is written
_CHUNK = 1 << 22  # bytes hashed at once
_NODES = 1 << 26  # bytes of the database's own nodes that are kept: without them every array is looked up from the root
_OPENING = 64  # arrays that are opened at once
_AHEAD = 1 << 26  # bytes that are read while earlier ones are summed up; a larger block is read alone
_PATIENCE = 30.0  # seconds for which a read that fails in a way that passes is tried again

T = TypeVar("T")


class Damaged(Exception):
    """A checkpoint, or a part of one, is not what was saved. Its text says what, without the step."""


def patiently(read: Callable[[], T], what, seconds: float = _PATIENCE) -> T:
    """What `read` gives, tried again while what it raises passes; what else it raises, at once.

    Args:
      what: is read, for the message.

    Raises:
      Away: if there is no time left.
    """
    end, tries = time.monotonic() + seconds, 0
    while True:
        try:
            return read()
        except Exception as error:
            if not _passes(error):
                raise
            left = end - time.monotonic()
            if left <= 0:
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                so_long = f", for {seconds:g} s now" if seconds else ""
                raise Away(
                    f"checkpoint: {what} cannot be read{so_long}: {reason}; start the same command again when the "
                    "storage is back"
                ) from error
        tries += 1
        time.sleep(min(left, patience.wait(tries)))


def _passes(error: Exception) -> bool:
    """As `data.patience.is_passing`; TensorStore makes a ValueError of everything, with the words of the system or of
    a service.
    """
    if isinstance(error, ValueError):
        return patience.says_passing(str(error)) or str(error).startswith(("UNAVAILABLE:", "DEADLINE_EXCEEDED:"))
    return patience.is_passing(error)


def is_there(path) -> bool:
    """Whether a path is there. Where the file system does not answer, `exists` says no; here that raises Away."""
    if not atomic.is_local(path):
        return path.exists()
    try:
        patiently(lambda: os.stat(path), path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class Stored:
    """One checkpoint. Whatever reads raises Away where the storage stays away.

    Args:
      folder: WORKDIR/checkpoints/STEP.
    """

    def __init__(self, folder):
        self.folder = epath.Path(folder)
        self._names = None
        self._stores = {}
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _NODES}})

    def meta(self) -> dict:
        """What was saved beside the arrays: format, step, checksums, metrics, config. Raises Damaged."""
        try:
            found = json_object.loads(self._text("meta", "metadata"))
            found["format"], found["checksums"].keys()
            return found
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise Damaged(f"meta/metadata cannot be read ({type(error).__name__})") from error

    def names(self) -> list[str]:
        """Paths of the arrays, as `checksums` names them. Raises Damaged."""
        return list(self._paths())

    def open(self, name: str):
        """The TensorStore of an array. Raises Damaged."""
        if name not in self._stores:

            def opened():
                opening = self._opening(name)
                with _damage(name):
                    return opening.result()

            self._stores[name] = patiently(opened, self.folder / name)
        return self._stores[name]

    def _opening(self, name):
        """The future of an array's TensorStore. Raises Damaged."""
        if name not in self._paths():
            raise Damaged(f"{name} is missing")
        base = f"{self.folder}/state/"
        base = base if "://" in base else f"file://{base}"
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{self._paths()[name]}/"}
        with _damage(name):
            return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True, context=self._context)

    def read(self, name: str, where: tuple[slice, ...] = ()) -> np.ndarray:
        """An array, or the block of it that slices with bounds select. Raises Damaged."""
        store = self.open(name)

        def block():
            with _damage(name):
                return np.asarray(store[where].read().result() if where else store.read().result())

        return patiently(block, self.folder / name)

    def blocks(self, name: str) -> Iterator[tuple[slice, ...]]:
        """Slices that cover an array, each one stored chunk. Raises Damaged."""
        store = self.open(name)
        chunk = store.chunk_layout.read_chunk.shape or store.shape  # none for a scalar
        for at in np.ndindex(*(-(-n // c) for n, c in zip(store.shape, chunk, strict=True))):
            yield tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(at, chunk, store.shape, strict=True))

    def sums_of(self, parts: dict[str, list]) -> dict[str, np.ndarray]:
        """What blocks of arrays, given by slices, add to the checksums of these, uint32 [2] each. Some are read while
        others are summed up. Raises Damaged.
        """
        return patiently(lambda: self._sums_of(parts), self.folder)

    def _sums_of(self, parts):
        names, reading, ahead = list(parts), deque(), 0
        totals = {name: np.zeros(2, np.uint32) for name in names}

        def finish():
            name, where, future = reading.popleft()
            with _damage(name):
                block = np.asarray(future.result())
            totals[name] += part_sums(block, tuple(s.start for s in where), self._stores[name].shape)
            return block.nbytes

        for first in range(0, len(names), _OPENING):
            some = names[first : first + _OPENING]
            opening = {name: self._opening(name) for name in some if name not in self._stores}
            for name, future in opening.items():
                with _damage(name):
                    self._stores[name] = future.result()
            for name in some:
                store = self._stores[name]
                for where in parts[name]:
                    with _damage(name):
                        view = store[where]
                    size = view.size * store.dtype.numpy_dtype.itemsize
                    while reading and ahead + size > _AHEAD:
                        ahead -= finish()
                    reading.append((name, where, view.read()))
                    ahead += size
        while reading:
            finish()
        return totals

    def array_problems(self) -> list[str]:
        """Which arrays are not those that were saved; reads all of them. Raises Damaged where that cannot be told."""
        saved, found = self.meta()["checksums"], []
        if different := sorted(saved.keys() ^ set(self.names())):
            return [f"{name} is missing" for name in different]
        for name, value in saved.items():
            try:
                same = as_hex(self.sums_of({name: list(self.blocks(name))})[name]) == value
            except Damaged as error:
                found.append(str(error))
            else:
                found += [] if same else [f"{name} is not what was saved"]
        return found

    def hashes(self, part: int = 0, parts: int = 1) -> dict[str, list]:
        """Name → [bytes, SHA-256] of every `parts`th file from the `part`th on, the list itself left out."""
        names = patiently(self._files, self.folder)
        return {name: list(self._hash(name)) for name in names[part::parts]}

    def _hash(self, name):
        return patiently(lambda: _hash(self.folder / name), self.folder / name)

    def _text(self, *names):
        path = self.folder.joinpath(*names)
        return patiently(path.read_text, path)

    def write_list(self, files: dict[str, list]) -> None:
        """Writes the list of files: from now on the checkpoint counts as read back."""
        files = dict(sorted(files.items()))
        atomic.write_text(self.folder / LIST, json.dumps({"files": files, "sha256": _digest(files)}) + "\n")

    @property
    def is_read_back(self) -> bool:
        return is_there(self.folder / LIST)

    def listed(self) -> dict[str, list]:
        """The list of files. Raises Damaged if it is not as it was written."""
        try:
            found = json_object.loads(self._text(LIST))
            if found["sha256"] == _digest(found["files"]):
                return found["files"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise Damaged(f"{LIST} is not as it was written")

    def file_problem(self, part: int = 0, parts: int = 1) -> str | None:
        """The first file that is not as it was when the checkpoint was read back, None if all are.

        Raises:
          Damaged: if the list itself cannot be trusted: then it says nothing about the others.
        """
        for name, (size, sha) in list(self.listed().items())[part::parts]:
            try:
                found = self._hash(name)
            except OSError:
                return f"{name} is missing or cannot be read"
            if found[0] != size:
                return f"{name} has {found[0]:,} bytes, not {size:,}"
            if found[1] != sha:
                return f"{name} is not as it was written"
        return None

    @property
    def bytes(self) -> int:
        return sum((self.folder / name).stat().length for name in self._files())

    def _files(self):
        names = (str(p.relative_to(self.folder)) for p in _walk(self.folder))
        return sorted(name for name in names if name != LIST and not name.startswith((READ_BACK, ".")))

    def _paths(self):
        if self._names is None:
            try:
                tree = json_object.loads(self._text("state", "_METADATA"))["tree_metadata"]
                entries = [e for e in tree.values() if not e["value_metadata"]["skip_deserialize"]]
                keys = [[str(k["key"]) for k in e["key_metadata"]] for e in entries]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise Damaged(f"state/_METADATA cannot be read ({type(error).__name__})") from error
            self._names = {"/".join(k): ".".join(k) for k in keys}
        return self._names


@contextmanager
def _damage(name):
    """What the layers below raise about an array, as Damaged, but for what passes."""
    try:
        yield
    except Exception as error:
        if _passes(error):
            raise
        first = (str(error).splitlines() or ["no message"])[0]
        raise Damaged(f"{name} cannot be read ({type(error).__name__}: {first})"[:300]) from error


def _walk(folder):
    """Files of a folder and those in it; epath, which knows object stores, has no `**`."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _hash(path) -> tuple[int, str]:
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            sha.update(data)
            size += len(data)
    return size, sha.hexdigest()


def _digest(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
