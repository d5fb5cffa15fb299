"""Parquet files in Hugging Face image layout: a struct column {bytes, path}, or a plain binary column; or of text.

Random access works by row group: the footers say which rows a group holds, and decoded groups stay in memory up to a
limit (`?cache_mb=`, per process). A data set that fits is decoded once. One that does not is decoded again and again
when it is read in shuffled order, a whole group for each image: write it as ArrayRecord for that.
"""

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, Record
from ddt_jax.data.patience import Patience, is_passing
from ddt_jax.errors import UserError
from ddt_jax.io import json_object
from ddt_jax.settings import Data

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
CAPTION_NAMES = ("caption", "text", "prompt", "description")
LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label")


class Columns(NamedTuple):
    """Which columns to read. `image`: None of files of text; `image_is_struct`: the bytes are in a field of it."""

    image: str | None
    image_is_struct: bool
    caption: str | None
    label: str | None
    label_names: tuple[str, ...] | None

    def to_read(self):
        image = f"{self.image}.bytes" if self.image and self.image_is_struct else self.image
        return [column for column in (image, self.caption, self.label) if column]


def find_columns(schema, where: str, image=None, caption=None, label=None, *, images: bool = True) -> Columns:
    """Finds the columns by Hugging Face's metadata, then by shape and name; an argument names one instead.

    Args:
      images: whether there must be a column of them; if not, there must be one of text, and no other is read.

    Raises:
      UserError: there is no such column, or a named one does not exist.
    """
    import pyarrow as pa

    def is_binary(type_):
        return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)

    def is_text(type_):
        return pa.types.is_string(type_) or pa.types.is_large_string(type_)

    def is_struct(type_):
        return (
            pa.types.is_struct(type_) and type_.get_field_index("bytes") >= 0 and is_binary(type_.field("bytes").type)
        )

    types = {field.name: field.type for field in schema}
    listed = ", ".join(f"{name} ({'struct' if pa.types.is_struct(t) else t})" for name, t in types.items())
    for option, name in (("image", image), ("caption", caption), ("label", label)):
        if name is not None and name not in types:
            raise UserError(f"data: {where} has no column {name} (option {option}); it has {listed}")
    features = _features(schema)
    if not images:
        caption = caption or next((n for n in CAPTION_NAMES if n in types and is_text(types[n])), None)
        if caption is None or not is_text(types[caption]):
            raise UserError(f"data: {where} has no column of text; it has {listed}; name one with ?caption=")
        return Columns(None, False, caption, None, None)
    # In order of trust: what the metadata call an image, the struct's shape, a usual name, the only binary column.
    images = [name for name in types if features.get(name, {}).get("_type") == "Image"]
    images += [name for name in types if is_struct(types[name])]
    binaries = [name for name in types if is_binary(types[name])]
    images += [name for name in IMAGE_NAMES if name in binaries] + (binaries if len(binaries) == 1 else [])
    image = image or next(iter(images), None)
    if image is None or not (is_struct(types[image]) or is_binary(types[image])):
        raise UserError(f"data: {where} has no image column; it has {listed}; name a binary one with ?image=")
    if caption and not is_text(types[caption]):
        raise UserError(f"data: column {caption} of {where} holds {types[caption]}, not text")
    if label and not pa.types.is_integer(types[label]):
        raise UserError(f"data: column {label} of {where} holds {types[label]}, not whole numbers")
    caption = caption or next((n for n in CAPTION_NAMES if n in types and is_text(types[n])), None)
    classes = [name for name in types if features.get(name, {}).get("_type") == "ClassLabel"]
    classes += [name for name in LABEL_NAMES if name in types]
    label = label or next((n for n in classes if pa.types.is_integer(types[n])), None)
    names = features.get(label, {}).get("names") if label else None
    return Columns(image, is_struct(types[image]), caption, label, tuple(names) if names else None)


def _features(schema) -> dict[str, dict]:
    """What Hugging Face's metadata say about the columns; nothing where they are damaged, for names are enough."""
    try:
        metadata = json_object.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {}).items()
    except (ValueError, AttributeError):
        return {}
    return {name: feature for name, feature in features if isinstance(feature, dict)}


class ParquetSource:
    """Rows of all files that match a glob, in the order of their names.

    Raises:
      UserError: no file, a missing column, or a file that is not Parquet.
    """

    def __init__(
        self,
        pattern: str,
        *,
        image=None,
        caption=None,
        label=None,
        cache_mb: str = "1024",
        images: bool = True,
        retry_seconds: float = Data.retry_seconds,
    ):
        if not cache_mb.isdigit():
            raise UserError(f"data: cache_mb={cache_mb} is not a number of MiB")
        self.name = f"parquet:{pattern}"
        self._patience = Patience(self.name, retry_seconds)
        self._paths = self._patience.opening(lambda: files.match_files(pattern))
        self._budget = int(cache_mb) << 20
        with ThreadPoolExecutor(16) as pool:  # footers of a remote set are many small round trips
            read = lambda path: self._patience.opening(lambda: _footer(path))  # noqa: E731
            footers = list(pool.map(read, self._paths))
        self._columns = None
        for path, (_, schema) in zip(self._paths, footers, strict=True):
            columns = find_columns(schema, path.rsplit("/", 1)[-1], image, caption, label, images=images)
            if self._columns and columns.to_read() != self._columns.to_read():
                first = self._paths[0].rsplit("/", 1)[-1]
                raise UserError(
                    f"data: {path} has columns {columns.to_read()}, {first} has {self._columns.to_read()}; "
                    "use one glob for each layout"
                )
            self._columns = self._columns or columns
        self.label_names = self._columns.label_names
        if self._columns.label and not self.label_names:
            self.label_names = files.class_names_beside(self._paths[0])
        self._by_file = files.ByFile([sum(rows) for rows, _ in footers])
        self._groups = [files.ByFile(rows) for rows, _ in footers]
        self._open_process_state()

    def _open_process_state(self):
        self._lock = threading.Lock()
        self._readers = OrderedDict()
        self._cache = OrderedDict()  # (file, group, column of images or None) -> list of columns
        self._cached_bytes = 0

    def __getstate__(self):
        private = ("_lock", "_readers", "_cache", "_cached_bytes")
        return {key: value for key, value in self.__dict__.items() if key not in private}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open_process_state()

    def __len__(self):
        return len(self._by_file)

    def describe(self, index):
        file, row = self._by_file.locate(index)
        return f"{self._paths[file].rsplit('/', 1)[-1]} row {row}"

    def __getitem__(self, index) -> Record:
        return self._record(index, self._columns)

    def without_image(self, index) -> Record:
        """The same without `image`, whose column is not read. Raises BadRecord."""
        return self._record(index, self._columns._replace(image=None))

    def _record(self, index, wanted) -> Record:
        file, row = self._by_file.locate(index)
        group, row = self._groups[file].locate(row)
        try:
            columns = self._group(file, group, wanted, self.describe(index))
            image, caption, label = (column and column[row].as_py() for column in columns)
        except (ValueError, IndexError) as error:  # a text that is not UTF-8, or fewer rows than the footer says
            raise BadRecord(f"corrupt row ({str(error).splitlines()[0]})") from None
        if image is None and wanted.image:
            raise BadRecord("no image bytes")
        record = Record(image=image) if wanted.image else Record()
        if caption and caption.strip():
            record["caption"] = caption.strip()
        if label is not None:
            record["label"] = label
        return record

    def _group(self, file, group, columns, where):
        """Columns (image, caption, label) of a row group; None for one that is not wanted, or that the files lack."""
        key = file, group, columns.image
        with self._lock:
            found = self._kept(key)
        return found or self._patience.record(lambda: self._read(key, columns), where)

    def _kept(self, key):
        entry = self._cache.get(key)
        if entry is None:
            return None
        self._cache.move_to_end(key)
        return entry[0]

    def _read(self, key, columns):
        import pyarrow as pa

        file, group, _ = key
        with self._lock:
            if found := self._kept(key):  # another thread has read it meanwhile
                return found
            try:
                table = self._reader(file).read_row_group(group, columns=columns.to_read(), use_threads=False)
            except Exception as error:
                if is_passing(error):
                    self._readers.pop(file, None)  # its handle may be stale
                    raise
                # OSError: its word for a page it can't decode; UnicodeDecodeError: of a name, where a file has changed.
                if not isinstance(error, OSError | pa.ArrowException | UnicodeDecodeError):
                    raise
                damaged = not isinstance(error, pa.ArrowNotImplementedError)  # a struct of more than 2 GiB is not
                what = "corrupt row group" if damaged else "row group cannot be read"
                raise BadRecord(f"{what} ({str(error).splitlines()[0]})") from None
            names = (columns.image, columns.caption, columns.label)
            found = [_combined(table.column(name)) if name else None for name in names]
            if columns.image and columns.image_is_struct:
                found[0] = found[0].flatten()[0]
            self._cache[key] = (found, table.nbytes)
            self._cached_bytes += table.nbytes
            while self._cached_bytes > self._budget and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1][1]
            return found

    def _reader(self, file):
        reader = self._readers.get(file)
        if reader is None:
            reader = self._readers[file] = _open(self._paths[file])
            if len(self._readers) > files.MAX_OPEN_FILES:
                self._readers.popitem(last=False)[1].close()
        else:
            self._readers.move_to_end(file)
        return reader


def _combined(column):
    """One array, which is indexed faster; the chunks where that would pass the 2 GiB that its type allows."""
    import pyarrow as pa

    try:
        return column.combine_chunks()
    except pa.ArrowInvalid:
        return column


def _open(path):
    import pyarrow.parquet as pq

    if files.is_local(path):
        return pq.ParquetFile(path)  # not mapped: a file that is cut off meanwhile would end the process (SIGBUS)
    return pq.ParquetFile(files.path_of(path).open("rb"))


def _footer(path):
    """(rows of each group, schema) of one file."""
    import pyarrow as pa

    try:
        with _open(path) as file:
            metadata = file.metadata
            return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], file.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last one: a column's name that is no text
        if is_passing(error):
            raise
        raise UserError(f"data: {path} is not a readable Parquet file ({str(error).splitlines()[0]})") from None
