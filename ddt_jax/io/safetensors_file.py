"""Safetensors files without holding them: read by mapping, written array by array.

The format is eight bytes with the length of a header, the header (JSON: name → type, shape, place), the arrays. The
safetensors package does the same but for bfloat16 in NumPy, files that are larger than memory, and object stores.
"""

import json
import math
import mmap
import struct

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


def load(path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, read-only views of the mapped file; of a file on an object store, of its bytes.

    Raises:
      UserError: if the file is missing, damaged, or has arrays of a type that NumPy and ml_dtypes don't know.
    """
    raw = _bytes_of(path)
    try:
        (length,) = struct.unpack("<Q", raw[:8])
        if length > min(_LARGEST_HEADER, len(raw) - 8):
            raise ValueError("its header is longer than the file")
        header, data = json_object.loads(bytes(raw[8 : 8 + length])), raw[8 + length :]
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        strange = [f"{name} of type {e['dtype']}" for name, e in entries.items() if e["dtype"] not in _TYPES]
        arrays = {} if strange else {name: _array(entry, data) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path}: is no safetensors file, or damaged ({error}); fetch it again") from error
    if strange:
        raise UserError(f"{path}: holds arrays that are not read: {', '.join(strange)}")
    return arrays


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
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _array(entry, data) -> np.ndarray:
    dtype, (begin, end) = np.dtype(_TYPES[entry["dtype"]]), entry["data_offsets"]
    count = math.prod(entry["shape"])
    if not 0 <= begin <= end <= len(data) or end - begin != count * dtype.itemsize:
        raise ValueError(f"an array of {entry['shape']} at {begin}:{end} of {len(data)} bytes")
    return np.frombuffer(data[begin:end], dtype).reshape(entry["shape"]) if count else np.zeros(entry["shape"], dtype)
