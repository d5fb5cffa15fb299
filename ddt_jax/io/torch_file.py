"""PyTorch's `.pth` and `.pt` files without PyTorch: read by an unpickler that knows only plain data, and written.

A pickle is a program. The unpickler here looks names up in a table of its own and imports nothing, so that a file can
build arrays and containers and do nothing else. Both layouts of `torch.save` are read: the zip archive (since 1.6) and
the stream of pickles before it. Formats as in torch/serialization.py and torch/_utils.py of PyTorch 2.13.
"""

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from ddt_jax.errors import UserError
from ddt_jax.io import atomic

_ALIGNMENT = 64  # of a storage in its file; torch.save writes them so, for those who map the file
_ZIP64_FROM = 1 << 30  # bytes of an entry; below the 2 GiB from which the format needs it
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexDoubleStorage": np.complex128,
    "ComplexFloatStorage": np.complex64,
    "UntypedStorage": np.uint8,  # bytes; the tensor says what they are
}
# Types younger than typed storages: their tensors name them beside an untyped storage.
_NEW_DTYPES = {
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
}


def load(path, within: str = "") -> Any:
    """What a file of `torch.save` holds, tensors as NumPy arrays.

    The arrays are read-only views of the mapped file: nothing is read before it is used, and a file is never held
    twice. It must stay as it is while they are in use. Tensors that share memory share it here too; strides are kept.
    A file on an object store is read into memory.

    Args:
      path: local or remote.
      within: an entry, such as "state_dict" of a trainer's file: if the file holds a dict with a dict there, that one
        is all that is read, and beside it may be objects of any class. They are never made: empty ones stand for them.
    Returns:
      the saved dict, list, tensor, ...; an OrderedDict comes as a dict, a parameter as its tensor. bfloat16 and the
      8-bit floats are types of ml_dtypes.

    Raises:
      UserError: if the file is missing, damaged, or holds anything but tensors, numbers, strings, bytes and lists,
        tuples and dicts of them; it names what was refused. Nothing in the file is run.
    """
    raw = _bytes_of(path)
    try:
        return (_load_zip if raw[:2].tobytes() == b"PK" else _load_legacy)(raw, within)
    except _Refused as error:
        raise UserError(
            f"{path}: holds {error}, which was refused: only tensors and plain data are read; save the weights alone, "
            "torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:
        # A broken pickle can fail in any way, but only inside the unpickler: it calls nothing that is not here.
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: is truncated, damaged or no file of torch.save ({what}); fetch it again") from error


def save(path, tree: dict) -> epath.Path:
    """Writes a dict that `torch.load(path, weights_only=True)` reads, whole or not at all.

    Args:
      tree: str → arrays (NumPy or JAX, whole on this process), numbers, strings, None, or dicts, lists and tuples of
        them. The same array in two places is written once, and comes back as two tensors that share memory.
    Returns:
      the path.

    Raises:
      ValueError: for other values.
    """
    writer = _Writer()
    program = writer.program(tree)
    with atomic.replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        # The name in front is free; the entries and their order are those of torch.save.
        for name, data in (("data.pkl", program), ("byteorder", b"little")):
            _write_entry(archive, file, name, memoryview(data))
        for key, array in enumerate(writer.arrays):
            little = array.astype(array.dtype.newbyteorder("<"), copy=False) if array.dtype.kind in "fiuc" else array
            _write_entry(archive, file, f"data/{key}", memoryview(little.reshape(-1).view(np.uint8)))
        _write_entry(archive, file, "version", memoryview(b"3\n"))
    return epath.Path(path)


class _Refused(Exception):
    """Something in the file that is neither a tensor nor plain data."""


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: np.dtype
    count: int  # elements


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor before its storage is known: the old layout has the storages behind the pickle."""

    storage: _Storage
    dtype: np.dtype
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


class _Named:
    """What a name in a pickle stands for, made anew for each occurrence so that no file can alter it for the next."""

    __slots__ = ("name", "call", "dtype", "storage")

    def __init__(self, name: str, call: Callable | None = None, dtype=None, storage=False):
        self.name, self.call, self.dtype, self.storage = name, call, dtype, storage

    def __call__(self, *args):
        if self.call is None:
            raise _Refused(f"a call of {self.name}")
        return self.call(*args)

    def __setstate__(self, state):
        raise _Refused(f"a changed {self.name}")


class _Opaque:
    """An object of a class that is not read: whatever a pickle does to it leaves no trace."""

    name = ""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def _ignore(self, *args, **kwargs):
        pass

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore


class _OrderedDict(dict):
    """Takes the attributes that modules hang on their state dict (`_metadata`), and forgets them."""

    def __setstate__(self, state):
        pass


def _check_plain_layout(requires_grad, hooks, metadata=None):
    if metadata:
        raise _Refused(f"a tensor with the flags {sorted(map(str, metadata))}")


def _rebuild_v2(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    _check_plain_layout(requires_grad, hooks, metadata)
    return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(strides))


def _rebuild_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None):
    _check_plain_layout(requires_grad, hooks, metadata)
    return _Tensor(storage, dtype.dtype, offset, tuple(shape), tuple(strides))


_CALLS = {
    ("collections", "OrderedDict"): lambda *items: _OrderedDict(*items),
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch._utils", "_rebuild_tensor"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad=True, hooks=None: tensor,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file, encoding="utf-8")  # strings of Python 2
        self._file = file
        self.storages: dict[str, _Storage] = {}

    def load(self):
        """One pickle. Before it is read its memo is looked at: Python makes room up to the highest place that is named,
        and 20 bytes can name one that takes 64 GB.
        """
        begin, places = self._file.tell(), 0
        for opcode, place, _ in pickletools.genops(self._file):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                places += 1
                if place > places:
                    raise ValueError(f"place {place} of a memo that has {places}")
        self._file.seek(begin)
        return super().load()

    def find_class(self, module, name):
        full = f"{module}.{name}"
        if (module, name) in _CALLS:
            return _Named(full, _CALLS[module, name])
        if module in ("torch", "torch.storage", "torch.cuda") and name in _STORAGES:
            return _Named(full, dtype=np.dtype(_STORAGES[name]), storage=True)
        if module == "torch" and name in _NEW_DTYPES:
            return _Named(full, dtype=np.dtype(_NEW_DTYPES[name]))
        # A type, for pickles ask for one. It is refused where it is met in what is read.
        return type("_Opaque", (_Opaque,), {"name": full})

    def persistent_load(self, pid):
        kind, storage_type, key, _, count, *view = pid
        if kind != "storage" or not (isinstance(storage_type, _Named) and storage_type.storage):
            raise _Refused(f"a persistent {kind!r}")
        if any(v is not None for v in view):
            raise _Refused("a view of a storage, as PyTorch before 0.4 wrote")
        return self.storages.setdefault(str(key), _Storage(str(key), storage_type.dtype, int(count)))


def _bytes_of(path) -> np.ndarray:
    """The file as uint8, mapped where it is local."""
    try:
        if not atomic.is_local(path):
            return np.frombuffer(epath.Path(path).read_bytes(), np.uint8)
        with open(path, "rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except ValueError:
        raise UserError(f"{path}: is empty; fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _load_zip(raw, within):
    with zipfile.ZipFile(_Reader(raw)) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    prefix = min((name for name in entries if name.endswith("data.pkl")), key=len)[: -len("data.pkl")]

    def content(name) -> np.ndarray:
        info = entries[prefix + name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        header = raw[info.header_offset : info.header_offset + 30].tobytes()
        # The local header's own lengths count: its extra field, the alignment, is not that of the directory.
        magic, name_length, extra_length = struct.unpack("<4s22xHH", header)
        start = info.header_offset + 30 + name_length + extra_length
        if magic != b"PK\3\4" or start + info.file_size > len(raw):
            raise ValueError(f"{name} lies outside of the file")
        return raw[start : start + info.file_size]

    if prefix + "byteorder" in entries and content("byteorder").tobytes() != b"little":
        raise _Refused("numbers in big-endian order")
    found = _Unpickler(io.BytesIO(content("data.pkl").tobytes())).load()
    return _plain(_part(found, within), lambda storage: content(f"data/{storage.key}"))


def _load_legacy(raw, within):
    file = _Reader(raw)

    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("no magic number")
    _Unpickler(file).load()  # version of the protocol
    if not _Unpickler(file).load().get("little_endian", True):
        raise _Refused("numbers in big-endian order")
    unpickler = _Unpickler(file)
    found = unpickler.load()
    start, contents = 0, {}
    for key in map(str, _Unpickler(file).load()):
        start = start or file.tell()
        # Each storage is its number of elements, then the elements; how long one is, only the pickle says.
        (count,) = struct.unpack("<q", raw[start : start + 8].tobytes())
        end = start + 8 + count * unpickler.storages[key].dtype.itemsize
        if count < 0 or end > len(raw):
            raise ValueError(f"storage {key} ends outside of the file")
        contents[key] = raw[start + 8 : end]
        start = end
    return _plain(_part(found, within), lambda storage: contents[storage.key])


def _part(found, within):
    inner = found.get(within) if within and isinstance(found, dict) else None
    return inner if isinstance(inner, dict) else found


class _Reader(io.RawIOBase):
    """A file over mapped bytes."""

    def __init__(self, raw):
        self.raw, self.at = raw, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: len(self.raw)}[whence]
        if self.at < 0:
            raise OSError("seek before the start")
        return self.at

    def tell(self):
        return self.at

    def readinto(self, buffer):
        found = self.raw[self.at : self.at + len(buffer)]
        buffer[: len(found)] = found.tobytes()
        self.at += len(found)
        return len(found)


def _plain(found, content: Callable[[_Storage], np.ndarray]):
    """What was unpickled with arrays in place of tensors, or `_Refused`. content: storage → its bytes, uint8."""
    done: dict[int, Any] = {}  # keeps what is shared shared, and ends cycles

    def convert(x):
        if id(x) in done:
            return done[id(x)]
        if x is None or type(x) in (bool, int, float, complex, str, bytes):
            return x
        if type(x) in (dict, _OrderedDict):
            if bad := [k for k in x if k is not None and type(k) not in (bool, int, float, str)]:
                raise _Refused(f"a key of type {type(bad[0]).__name__}")
            result = done[id(x)] = {}
            result.update((k, convert(v)) for k, v in x.items())
        elif type(x) is list:
            result = done[id(x)] = []
            result.extend(map(convert, x))
        elif type(x) is tuple:
            result = done[id(x)] = tuple(map(convert, x))
        elif isinstance(x, _Tensor):
            result = done[id(x)] = _array(x, content(x.storage))
        elif isinstance(x, _Storage):
            raise _Refused("a bare storage")
        else:
            named = isinstance(x, _Named | _Opaque) or (isinstance(x, type) and issubclass(x, _Opaque))
            raise _Refused(x.name if named else f"a {type(x).__name__}")
        return result

    return convert(found)


def _array(tensor: _Tensor, raw) -> np.ndarray:
    """A view of a storage's bytes."""
    size, numbers = tensor.dtype.itemsize, (tensor.offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor of shape {tensor.shape} and strides {tensor.strides}")
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, tensor.dtype)
    if (last + 1) * size > min(len(raw), tensor.storage.count * tensor.storage.dtype.itemsize):
        raise ValueError(f"a tensor of shape {tensor.shape} ends outside of its storage")
    strides = [s * size for s in tensor.strides]
    return np.ndarray(tensor.shape, tensor.dtype, buffer=raw.data, offset=tensor.offset * size, strides=strides)


class _Writer:
    """Makes the pickle by hand, for pickle.Pickler only writes names that it can import. Opcodes of protocol 2."""

    def __init__(self):
        self.arrays: list[np.ndarray] = []
        self._keys: dict[int, int] = {}
        self._alive: list = []  # or an id might be used again

    def program(self, tree: dict) -> bytes:
        if not isinstance(tree, dict):
            raise ValueError(f"torch file: a {type(tree).__name__} cannot be saved, only a dict")
        return pickle.PROTO + b"\x02" + self._value(tree) + pickle.STOP

    def _value(self, x) -> bytes:
        if x is None:
            return pickle.NONE
        if isinstance(x, np.generic) and x.dtype.kind in "biuf":
            x = x.item()
        if isinstance(x, bool):
            return pickle.NEWTRUE if x else pickle.NEWFALSE
        if isinstance(x, int):
            if 0 <= x < 2**31:
                return pickle.BININT + struct.pack("<i", x)
            data = pickle.encode_long(x)
            return pickle.LONG1 + bytes([len(data)]) + data
        if isinstance(x, float):
            return pickle.BINFLOAT + struct.pack(">d", x)
        if isinstance(x, str):
            return pickle.BINUNICODE + struct.pack("<I", len(x.encode())) + x.encode()
        if isinstance(x, dict):
            items = b"".join(self._value(k) + self._value(v) for k, v in x.items())
            return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
        if isinstance(x, list):
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(self._value, x)) + pickle.APPENDS
        if isinstance(x, tuple):
            return pickle.MARK + b"".join(map(self._value, x)) + pickle.TUPLE
        if hasattr(x, "__array__"):
            return self._tensor(x)
        raise ValueError(f"torch file: a {type(x).__name__} cannot be saved; only arrays, numbers, strings, containers")

    def _tensor(self, x) -> bytes:
        if id(x) not in self._keys:
            self._keys[id(x)] = len(self.arrays)
            self._alive.append(x)
            self.arrays.append(np.ascontiguousarray(x).reshape(np.shape(x)))
        key = self._keys[id(x)]
        array = self.arrays[key]
        dtype = array.dtype.newbyteorder("=")
        typed = [name for name, known in _STORAGES.items() if known == dtype and name != "UntypedStorage"]
        new = [name for name, known in _NEW_DTYPES.items() if known == dtype]
        if not typed and not new:
            raise ValueError(f"torch file: PyTorch has no tensors of {dtype}")
        storage = _name("torch", typed[0]) if typed else _name("torch.storage", "UntypedStorage")
        count = array.size if typed else array.nbytes
        pid = pickle.MARK + b"".join([self._value("storage"), storage, self._value(str(key)), self._value("cpu")])
        strides, step = [], 1
        for n in reversed(array.shape):
            strides, step = [step, *strides], step * max(n, 1)
        arguments = [
            pid + self._value(count) + pickle.TUPLE + pickle.BINPERSID,
            self._value(0),
            self._value(array.shape),
            self._value(tuple(strides)),
            pickle.NEWFALSE,
            _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,  # no hooks
        ]
        if new:
            arguments.append(_name("torch", new[0]))
        rebuild = _name("torch._utils", "_rebuild_tensor_v3" if new else "_rebuild_tensor_v2")
        return rebuild + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _write_entry(archive, file, name: str, data: memoryview) -> None:
    info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))  # same weights, same file
    info.file_size = data.nbytes
    zip64 = data.nbytes >= _ZIP64_FROM
    # Padding in an extra field, which is two bytes of kind ("FB" as torch.save has it), two of length, and zeros.
    start = file.tell() + 30 + len(info.filename) + (20 if zip64 else 0) + 4
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=zip64) as entry:
        entry.write(data)
