"""Files that are whole or absent: a killed run never leaves half a picture or half a JSON behind."""

import contextlib
import io
import os
from collections.abc import Iterator

from etils import epath

from ddt_jax.errors import UserError


def is_local(path) -> bool:
    """Whether a path lies on a file system (renaming is atomic, appending possible), not on an object store."""
    return "://" not in os.fspath(path)


def write_bytes(path, data: bytes) -> epath.Path:
    """Writes a file, replacing what is there in one move; makes its folder.

    On object stores an upload is atomic by itself.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(path):
        path.write_bytes(data)
        return path
    scratch = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def replacing(path) -> Iterator[io.IOBase]:
    """As `write_bytes` for what is too large to hold twice: a binary file to write to and seek in.

    It takes its place when the block ends without an error. For an object store it is held in memory until then.
    """
    path = epath.Path(path)
    if not is_local(path):
        buffer = io.BytesIO()
        yield buffer
        write_bytes(path, buffer.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(scratch, "wb") as file:
            yield file
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_through(file: io.RawIOBase, data: bytes) -> None:
    """Writes all of it to an unbuffered file: it is out of this process then, and closing has nothing left to do.

    Raises:
      UserError: the disk is full, or whatever else it is that cannot be written to.
    """
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise UserError(f"workdir: cannot write to {file.name}: {error.strerror or error}") from error


def write_text(path, text: str) -> epath.Path:
    """As `write_bytes`, in UTF-8."""
    return write_bytes(path, text.encode())
