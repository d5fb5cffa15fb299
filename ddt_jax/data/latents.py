"""A cache of latents: what a frozen codec makes of every image of a source, written once and read in place of images.

A folder holds shards in ArrayRecord (`latents-00000-of-00012.arrayrecord`) and `latents.json`, which says of what they
are the latents, made how, and whether all are there. A record is a msgpack map: `mean` and `logvar` of the codec's
posterior as raw bytes, the record's `index` in the source, and its `caption` and `label` where there are any. Of a clip
it holds all frames one after another, so that one folder serves any `data.frames`, `frame_step` and `clip_start`.
"""

import math
import os
import tempfile

import ml_dtypes
import numpy as np

from ddt_jax.data import files
from ddt_jax.data.array_record import ArrayRecordSource
from ddt_jax.data.base import BadRecord, Record
from ddt_jax.errors import UserError
from ddt_jax.io import json_object
from ddt_jax.settings import Data

INDEX = "latents.json"
_MOST = (
    1 << 26
)  # values of a latent: an index that speaks of more is damaged, and room for them is made before any is read
TYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def shard_name(shard: int, shards: int) -> str:
    return f"latents-{shard:05d}-of-{shards:05d}.arrayrecord"


def pack(mean, logvar, *, index: int, label: int = -1, caption: str = "") -> bytes:
    """One record as bytes. mean, logvar: [h, w, c], of a clip [F, h, w, c]; label: -1 for none."""
    import msgpack

    fields = {"mean": mean.tobytes(), "logvar": logvar.tobytes(), "index": int(index)}
    if label >= 0:
        fields["label"] = int(label)
    if caption:
        fields["caption"] = caption
    return msgpack.packb(fields)


def write_shard(path, records) -> int:
    """Writes packed records to a file that is whole or absent, and returns how many; path: epath, local or not."""
    from array_record.python.array_record_module import ArrayRecordWriter

    count = 0
    with tempfile.TemporaryDirectory() as elsewhere:  # the library writes local files only
        local = files.is_local(str(path))
        scratch = (path.parent if local else files.path_of(elsewhere)) / f".{path.name}.{os.getpid()}.tmp"
        try:
            writer = ArrayRecordWriter(str(scratch), "group_size:1")
            try:
                for record in records:
                    writer.write(record)
                    count += 1
            finally:
                writer.close()
            if local:
                scratch.replace(path)
            else:
                scratch.copy(path, overwrite=True)
        finally:
            scratch.unlink(missing_ok=True)
    return count


def read_index(folder: str) -> dict | None:
    """What `latents.json` of a folder says; None where there is none.

    Raises:
      UserError: if it cannot be read.
    """
    path = files.path_of(folder) / INDEX
    if not path.exists():
        return None
    try:
        found = json_object.loads(path.read_text())
        if _is_index(found):
            return found
    except (OSError, ValueError):
        pass
    raise UserError(f"data: {path} cannot be read as the index of latents; remove the folder and write it again")


def _is_index(found: dict) -> bool:
    shape, counts, names = found.get("shape"), found.get("counts"), found.get("label_names")
    return (
        isinstance(found.get("identity"), dict)
        and isinstance(found.get("source"), str)
        and isinstance(shape, list)
        and len(shape) == 3
        and all(type(n) is int and n > 0 for n in shape)
        and math.prod(shape) <= _MOST
        and found.get("dtype") in [*TYPES]
        and type(found.get("shards")) is int
        and type(found.get("clips", False)) is bool
        and isinstance(counts, dict)
        and all(type(n) is int and n >= 0 for n in counts.values())
        and (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)))
    )


def check_identity(folder: str, found: dict, wanted: dict) -> None:
    """Raises UserError naming what differs between how latents were made and how they are wanted."""
    differing = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if differing:
        name, values = differing[0], [str(x.get(differing[0])) for x in (found, wanted)]
        shown = f" ({values[0]}, here {values[1]})" if max(map(len, values)) <= 40 else ""  # not a hash
        raise UserError(
            f"data: the latents in {folder} were made with other {name}{shown}; write new ones with "
            "`ddt-jax latents` to another folder, or go back to the settings they were made with"
        )


class LatentsSource:
    """Records of `latent_mean` and `latent_logvar` [h, w, c], in the order of the source they were made of; of clips
    [F, h, w, c], F as long as each is.

    Attributes:
      identity: how they were made, see `check_identity`. origin: name of the source they were made of.
      clips: whether they are of clips.
      arrays: name → (shape, type) of what a record holds in place of an image or of a frame.

    Raises:
      UserError: if the folder holds no latents, or not all of them yet.
    """

    def __init__(self, folder: str, *, cache_dir: str = "", retry_seconds: float = Data.retry_seconds):
        self.name = f"latents:{folder}"
        index = read_index(folder)
        if index is None:
            raise UserError(
                f"data: {folder} has no {INDEX}; write it with `ddt-jax latents --config FILE --to {folder}`"
            )
        if len(index["counts"]) < index["shards"]:
            raise UserError(
                f"data: {folder} has {len(index['counts'])} of {index['shards']} shards; "
                "the same `ddt-jax latents` goes on"
            )
        self.identity, self.origin, self.clips = index["identity"], index["source"], index.get("clips", False)
        self._shape, self._type = tuple(index["shape"]), TYPES[index["dtype"]]
        self.arrays = {name: (self._shape, self._type) for name in ("latent_mean", "latent_logvar")}
        shards = f"{folder.rstrip('/')}/latents-*.arrayrecord"
        self._records = ArrayRecordSource(shards, cache_dir=cache_dir, retry_seconds=retry_seconds)
        total = sum(index["counts"].values())
        if len(self._records) != total:
            raise UserError(
                f"data: {folder} holds {len(self._records):,} latents, not the {total:,} that its {INDEX} names; "
                "remove the folder and write it again"
            )
        self.label_names = tuple(index["label_names"]) if index.get("label_names") else None

    def __len__(self):
        return len(self._records)

    def describe(self, index):
        return self._records.describe(index)

    def __getitem__(self, index) -> Record:
        import msgpack

        data = self._records.read(index)
        try:
            fields = msgpack.unpackb(data)
            record = Record(meta={"index": fields["index"]})
            for name in self.arrays:
                array = np.frombuffer(fields[name.removeprefix("latent_")], self._type)
                record[name] = array.reshape((-1, *self._shape) if self.clips else self._shape)
        except (KeyError, AttributeError, TypeError, ValueError, msgpack.UnpackException) as error:
            raise BadRecord(f"not a latent ({type(error).__name__})") from None
        return record | {name: fields[name] for name in ("caption", "label") if name in fields}
