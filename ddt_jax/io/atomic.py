"""Files that are whole or absent: a killed run never leaves half a picture or half a JSON behind."""

import os

from etils import epath


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


def write_text(path, text: str) -> epath.Path:
    """As `write_bytes`, in UTF-8."""
    return write_bytes(path, text.encode())
