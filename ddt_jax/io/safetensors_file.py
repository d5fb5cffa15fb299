"""Safetensors files without holding them: read by mapping or array by array, written array by array.

The format is eight bytes with the length of a header, the header (JSON: name → type, shape, place), the arrays. The
safetensors package does the same but for bfloat16 in NumPy, files that are larger than memory, and object stores.
"""

import json
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from etils import epath

from ddt_jax.errors import UserError
from ddt_jax.io import atomic, json_object

_TYPES = {  # in the order in which the package lays arrays out: wide types first, so that all are aligned
    "I64": np.int64,
    "F64": np.float64,
    "F32": np.float32,
    "I32": np.int32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_LARGEST_HEADER = 100_000_000  # bytes, as in the package


@dataclass(frozen=True)
class Place:
    """Where an array lies: bytes `begin` to `end` of its file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int
    end: int


def load(path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, read-only views of the mapped file; of a file on an object store, of its bytes.

    Raises:
      UserError: if the file is missing, damaged, or has arrays of a type that NumPy and ml_dtypes don't know.
    """
    raw = _bytes_of(path)
    found = _places(path, lambda begin, end: raw[begin:end], len(raw))
    return {name: _array(place, raw[place.begin : place.end]) for name, place in found.items()}


def places(path) -> dict[str, Place]:
    """Where the arrays of a file lie, by name; no more than its header is asked for. Raises UserError as `load`."""
    try:
        size = epath.Path(path).stat().length
    except OSError as error:
        raise _unreadable(path, error) from error
    return _places(path, lambda begin, end: _range(path, begin, end), size)


def read(path, place: Place) -> np.ndarray:
    """The array of a place that `places` gave; no more than its bytes are asked for. Raises UserError as `load`."""
    raw = _range(path, place.begin, place.end)
    if len(raw) != place.end - place.begin:
        raise UserError(f"{path}: ends before byte {place.end}; fetch it again")
    return _array(place, raw)


def save(path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> epath.Path:
    """Writes a file, whole or not at all; same arrays, same bytes, which are those of the safetensors package.

    Args:
      arrays: by name, contiguous or not; one after another is copied to the host.
      metadata: strings for the header.

    Returns:
      the path.
    """
    names = {np.dtype(dtype): name for name, dtype in _TYPES.items()}
    kinds = {name: names[np.dtype(array.dtype)] for name, array in arrays.items()}
    order = sorted(arrays, key=lambda name: (list(_TYPES).index(kinds[name]), name))
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {"dtype": kinds[name], "shape": [*arrays[name].shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of their size
    with atomic.replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return epath.Path(path)


def _bytes_of(path) -> memoryview:
    try:
        if not atomic.is_local(path):
            return memoryview(epath.Path(path).read_bytes())
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:
        raise UserError(f"{path}: is empty; fetch it again") from None
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read: {error.strerror or error}")


def _range(path, begin: int, end: int) -> bytes:
    """Fewer bytes only at the end of the file."""
    try:
        with epath.Path(path).open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)
    except OSError as error:
        raise _unreadable(path, error) from error


def _places(path, part: Callable[[int, int], bytes | memoryview], size: int) -> dict[str, Place]:
    """As `places`, of a file of so many bytes. part: gives those from `begin` to `end`."""
    try:
        (length,) = struct.unpack("<Q", part(0, 8))
        if length > min(_LARGEST_HEADER, size - 8):
            raise ValueError("its header is longer than the file")
        header = json_object.loads(bytes(part(8, 8 + length)))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        strange = [f"{name} of type {e['dtype']}" for name, e in entries.items() if e["dtype"] not in _TYPES]
        found = {} if strange else {name: _place(entry, 8 + length, size) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path}: is no safetensors file, or damaged ({error}); fetch it again") from error
    if strange:
        raise UserError(f"{path}: holds arrays that are not read: {', '.join(strange)}")
    return found


def _place(entry, start: int, size: int) -> Place:
    """start: of the arrays in a file of `size` bytes."""
    dtype, (begin, end) = np.dtype(_TYPES[entry["dtype"]]), entry["data_offsets"]
    count = math.prod(entry["shape"])
    if not 0 <= begin <= end <= size - start or end - begin != count * dtype.itemsize:
        raise ValueError(f"an array of {entry['shape']} at {begin}:{end} of {size - start} bytes")
    return Place(tuple(entry["shape"]), dtype, start + begin, start + end)


def _array(place: Place, raw) -> np.ndarray:
    return np.frombuffer(raw, place.dtype).reshape(place.shape) if len(raw) else np.zeros(place.shape, place.dtype)
