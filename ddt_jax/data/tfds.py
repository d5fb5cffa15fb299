"""Data sets prepared by TensorFlow Datasets, through its `data_source`, which needs no TensorFlow.

`tfds:NAME/SPLIT?data_dir=DIR`; NAME may carry a config and a version (`name/config:1.0.0`). Nothing is downloaded: the
set must have been prepared there in the `array_record` format.
"""

import os

import numpy as np

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, Record, did_you_mean
from ddt_jax.data.parquet import CAPTION_NAMES, LABEL_NAMES
from ddt_jax.data.patience import Patience, is_passing
from ddt_jax.errors import UserError
from ddt_jax.settings import Data


class TfdsSource:
    """Examples of one split.

    Raises:
      UserError: the set is not there, is in another file format, or has no image feature.
    """

    def __init__(
        self,
        spec: str,
        *,
        data_dir: str | None = None,
        image=None,
        caption=None,
        label=None,
        retry_seconds: float = Data.retry_seconds,
    ):
        self._set, _, self._split = spec.rpartition("/")
        if not self._set:
            raise UserError(f"data: tfds:{spec} names no split; write tfds:{spec}/train")
        self.name = f"tfds:{spec}"
        self._patience = Patience(self.name, retry_seconds)
        self._data_dir = os.path.expanduser(data_dir) if data_dir else None
        try:
            builder = self._builder()
            features = dict(builder.info.features.items())
            self._image, self._caption, self._label = self._find(features, image, caption, label)
            splits = sorted(builder.info.splits)
            if not splits:  # the library knows the set, but nobody has prepared it
                raise UserError(f"data: {self._set} is not in {builder.data_path.parent}; {self._way_out()}")
            if self._split.partition("[")[0] not in splits:
                raise UserError(f"data: {self._set} has no split {self._split}; it has {', '.join(splits)}")
            self._length = len(self._source())
        except UserError:
            raise
        except NotImplementedError as error:  # its word for file formats without random access
            reason = str(error).splitlines()[0]
            raise UserError(f"data: {self.name} must be prepared with --file_format=array_record ({reason})") from None
        except Exception as error:  # its errors have no common type and run over many lines
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"data: {self.name} cannot be opened ({reason}); {self._way_out()}") from None
        names = getattr(features.get(self._label), "names", None)
        self.label_names = tuple(names) if names else None

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}

    def _way_out(self):
        name = self._set.partition("/")[0].partition(":")[0]
        if self._data_dir and files.path_of(self._data_dir).is_dir():
            there = sorted(path.name for path in files.path_of(self._data_dir).iterdir())
            if name not in there and did_you_mean(name, there):
                return did_you_mean(name, there).removeprefix("; ")
        return f"run `tfds build {name} --file_format=array_record` or set ?data_dir="

    def _builder(self):
        import tensorflow_datasets as tfds

        return tfds.builder(self._set, data_dir=self._data_dir)

    def _source(self):
        if "_opened" not in self.__dict__:
            import tensorflow_datasets as tfds

            builder = self._builder()
            features = dict(builder.info.features.items())
            # Our own decoder counts what is corrupt, so encoded images stay as they are.
            skip = isinstance(features[self._image], tfds.features.Image)
            decoders = {self._image: tfds.decode.SkipDecoding()} if skip else None
            self._opened = builder.as_data_source(split=self._split, decoders=decoders)
        return self._opened

    def _find(self, features, image, caption, label):
        import tensorflow_datasets as tfds

        listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        for option, name in (("image", image), ("caption", caption), ("label", label)):
            if name is not None and name not in features:
                raise UserError(f"data: {self.name} has no feature {name} (option {option}); it has {listed}")

        def is_pixels(feature):
            shape = getattr(feature, "shape", None) or ()
            return len(shape) == 3 and shape[2] in (1, 3) and feature.np_dtype == np.uint8

        def has(kind, names=()):
            found = [name for name, feature in features.items() if isinstance(feature, kind)]
            return [name for name in names if name in found] or ([] if names else found)

        image = image or next(iter(has(tfds.features.Image)), None)
        image = image or next((name for name, feature in features.items() if is_pixels(feature)), None)
        if image is None:
            raise UserError(f"data: {self.name} has no image feature; it has {listed}")
        caption = caption or next(iter(has(tfds.features.Text, CAPTION_NAMES)), None)
        label = label or next(iter(has(tfds.features.ClassLabel)), None)
        integers = [name for name, feature in features.items() if np.issubdtype(_dtype(feature), np.integer)]
        label = label or next((name for name in LABEL_NAMES if name in integers), None)
        return image, caption, label

    def __len__(self):
        return self._length

    def describe(self, index):
        return f"{self._set}/{self._split} example {index}"

    def _read(self, index):
        try:
            return self._source()[index]
        except (RuntimeError, ValueError) as error:
            if is_passing(error):
                self.__dict__.pop("_opened", None)  # its handles may be stale
                raise
            raise BadRecord(f"corrupt example ({str(error).splitlines()[0]})") from None

    def __getitem__(self, index) -> Record:
        example = self._patience.record(lambda: self._read(index), self.describe(index))
        image = example[self._image]
        if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 1:
            image = np.repeat(image, 3, axis=2)
        record = Record(image=image)
        if self._caption:
            caption = example[self._caption]
            caption = files.read_text(caption, "caption") if isinstance(caption, bytes) else str(caption).strip()
            if caption:
                record["caption"] = caption
        if self._label and int(example[self._label]) >= 0:
            record["label"] = int(example[self._label])
        return record


def _dtype(feature):
    return getattr(feature, "np_dtype", None) or np.object_
