"""ArrayRecord files: the format for shuffled reading of sets that do not fit in memory.

A record is a msgpack map: `image` (encoded bytes, or the raw pixels of uint8 [H, W, 3] with `shape`), and where
they are known `caption` (text) and `label` (integer). Other keys come back under `meta`.
"""

import errno
import os
import resource
import shutil
import sys
import threading
from collections import OrderedDict

import numpy as np

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, Record
from ddt_jax.data.patience import Patience, is_passing
from ddt_jax.errors import UserError
from ddt_jax.settings import Data


def pack(record) -> bytes:
    """One record as bytes; `unpack` is its inverse."""
    import msgpack

    fields = {key: value for key, value in record.items() if key != "meta"} | dict(record.get("meta", {}))
    if isinstance(fields.get("image"), np.ndarray):
        image = np.asarray(fields["image"], order="C")
        if image.dtype != np.uint8:
            raise ValueError(f"image of {image.dtype}, not uint8")
        fields |= {"image": image.tobytes(), "shape": list(image.shape)}
    if "label" in fields:
        fields["label"] = int(fields["label"])
    return msgpack.packb(fields)


def unpack(data: bytes) -> Record:
    """Raises BadRecord when the bytes are not a record."""
    import msgpack

    try:
        fields = msgpack.unpackb(data)
        image, shape = fields.pop("image"), fields.pop("shape", None)
        if shape is not None:
            image = np.frombuffer(image, np.uint8).reshape(shape)
        record = Record(image=image)
        caption, label = fields.pop("caption", None), fields.pop("label", None)
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError, msgpack.UnpackException) as error:
        raise BadRecord(f"not a record ({type(error).__name__})") from None
    if isinstance(caption, str) and caption.strip():
        record["caption"] = caption.strip()
    if isinstance(label, int):
        record["label"] = label
    if fields:
        record["meta"] = fields
    return record


def write_array_record(path: str, records, to_bytes=pack) -> int:
    """Writes records (see `pack`) to a local file that can be read at random; returns how many."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    count = 0
    try:
        for record in records:
            writer.write(to_bytes(record))
            count += 1
    finally:
        writer.close()
    return count


class ArrayRecordSource:
    """Records of all files that match a glob, in the order of their names.

    The library reads local files only; remote ones are copied once into the cache folder.

    Raises:
      UserError: no file, or one that is not ArrayRecord.
    """

    def __init__(self, pattern: str, *, cache_dir: str = "", retry_seconds: float = Data.retry_seconds):
        self.name = f"arrayrecord:{pattern}"
        self._patience = Patience(self.name, retry_seconds)
        self._names = self._patience.opening(lambda: self._find(pattern))
        self._paths = [self._local(path, cache_dir) for path in self._names]
        self.label_names = files.class_names_beside(self._names[0])
        self._open_process_state()
        self._counts = [self._patience.opening(lambda i=i: self._count(i)) for i in range(len(self._paths))]
        self._by_file = files.ByFile(self._counts)

    def _find(self, pattern) -> list[str]:
        return files.match_files(pattern)

    def _count(self, file) -> int:
        try:
            return self._reader(file).num_records()
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise UserError(
                f"data: {self._names[file]} cannot be opened: {error.strerror.lower()}, this process may have "
                f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}; raise the limit, e.g. ulimit -n 4096"
            ) from None

    def _local(self, path, cache_dir):
        return path if files.is_local(path) else self._patience.opening(lambda: _local_copy(path, cache_dir))

    def _open_process_state(self):
        self._lock = threading.Lock()
        self._readers = OrderedDict()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_readers")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open_process_state()

    def __len__(self):
        return len(self._by_file)

    def describe(self, index):
        file, row = self._by_file.locate(index)
        return f"{self._names[file].rsplit('/', 1)[-1]} record {row}"

    def __getitem__(self, index) -> Record:
        return unpack(self.read(index))

    def read(self, index) -> bytes:
        """A record as it was written. Raises BadRecord, and UserError as `Patience.record`."""
        file, row = self._by_file.locate(index)
        return self._patience.record(lambda: self._read(file, row), self.describe(index))

    def _read(self, file, row):
        with self._lock:
            try:
                return self._reader(file).read([row])[0]
            except OSError as error:
                if is_passing(error):
                    raise
                raise BadRecord(f"its file cannot be opened ({error.strerror})") from None
            except (RuntimeError, ValueError, IndexError, UserError) as error:  # the last: its file has gone meanwhile
                if is_passing(error):
                    self._readers.pop(file, None)  # its handle may be stale
                    raise
                raise BadRecord(f"corrupt record ({str(error).splitlines()[0]})") from None

    def _reader(self, file):
        reader = self._readers.get(file)
        if reader is None:
            from array_record.python.array_record_module import ArrayRecordReader

            # Read-ahead is for streaming; here every read is a jump.
            reader = ArrayRecordReader(self._paths[file], options="readahead_buffer_size:0")
            if not reader.ok():  # it raises nothing and says that there are no records
                _look_at_both_ends(self._paths[file])
                raise UserError(f"data: {self._names[file]} is cut off, damaged or not an ArrayRecord file")
            self._readers[file] = reader
            if len(self._readers) > files.MAX_OPEN_FILES:
                self._readers.popitem(last=False)[1].close()
        else:
            self._readers.move_to_end(file)
        return reader


def _look_at_both_ends(path):
    """The library does not say why it cannot open a file. Raises OSError if the way to it fails, or this process has
    too many files open, and passes on else.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            file.read(1)
            file.seek(-1, os.SEEK_END)
            file.read(1)
    except OSError as error:
        if is_passing(error) or error.errno == errno.EMFILE:
            raise


def _local_copy(path, cache_dir):
    local = files.cache_folder(cache_dir) / "files" / f"{files.fingerprint(path)}-{path.rsplit('/', 1)[-1]}"
    if not files.is_local(str(local)):
        raise UserError(f"data: data.cache_dir={cache_dir} must be a local folder to read {path}")
    if not local.exists():
        print(f"data: copying {path} to {local.parent}", file=sys.stderr)
        with files.path_of(path).open("rb") as remote:
            files.write_atomically(local, lambda file: shutil.copyfileobj(remote, file, 1 << 20))
    return str(local)
