"""Folders of safetensors files with an index, as Hugging Face writes large models: arrays are read when asked for.

So a model that is larger than memory goes from one folder to another array by array.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from etils import epath

from ddt_jax.errors import UserError
from ddt_jax.io import atomic, json_object, safetensors_file

FILE_BYTES = 5_000_000_000  # of one file, as in Hugging Face's


@dataclass(frozen=True)
class Lazy:
    """An array that is made each time that it is looked at, and not kept."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def __array__(self, dtype=None, copy=None):
        array = self.make()
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"made {array.dtype} {array.shape} instead of {self.dtype} {self.shape}")
        return array if dtype is None else array.astype(dtype)


def load(folder, stem: str = "model") -> dict[str, Lazy]:
    """The arrays of a folder by name: of all files in its index, or of its one file.

    Raises:
      UserError: if there is neither, or the index and its files disagree.
    """
    folder = epath.Path(folder)
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.exists():
        try:
            placed = json_object.loads(index.read_text())["weight_map"]
            files = sorted(set(placed.values()))
            if strange := [file for file in files if not isinstance(file, str) or "/" in file or file in ("", "..")]:
                raise ValueError(f"{strange[0]!r} is no file beside it")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: is no index of safetensors files ({error}); fetch it again") from error
    elif single.exists():
        placed, files = None, [single.name]
    else:
        raise UserError(f"{folder}: holds neither {index.name} nor {single.name}")
    found = {}
    for file in files:
        names = (safetensors_file.load if atomic.is_local(folder) else safetensors_file.places)(folder / file)
        found |= {name: Lazy(x.shape, x.dtype, _reader(folder / file, name, x)) for name, x in names.items()}
    wrong = sorted(found.keys() ^ (placed or found).keys())
    if wrong:
        raise UserError(f"{index}: it and its files disagree on {', '.join(wrong[:4])}; fetch the folder again")
    return found


def _reader(path, name, found):
    if isinstance(found, safetensors_file.Place):  # on an object store: of its file, only the array's own bytes
        return lambda: safetensors_file.read(path, found)
    # The file is mapped anew each time: pages of a mapping that stays would count as memory of this process.
    return lambda: safetensors_file.load(path)[name]


def save(folder, arrays: dict, stem: str = "model", file_bytes: int = FILE_BYTES) -> None:
    """Writes arrays (`Lazy` or not) in their order, into as few files as hold file_bytes each, and the index last."""
    folder = epath.Path(folder)
    files: list[dict] = [{}]
    for name, array in arrays.items():
        if files[-1] and sum(x.nbytes for x in files[-1].values()) + array.nbytes > file_bytes:
            files.append({})
        files[-1][name] = array
    for old in folder.glob(f"{stem}*.safetensors*") if folder.exists() else ():
        old.unlink()  # an index must not find the files of another model
    if len(files) == 1:
        safetensors_file.save(folder / f"{stem}.safetensors", files[0], {"format": "pt"})
        return
    placed = {}
    for i, part in enumerate(files):
        file = f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors"
        safetensors_file.save(folder / file, part, {"format": "pt"})
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in arrays.values())}, "weight_map": placed}
    atomic.write_text(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
