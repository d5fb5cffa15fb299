"""Parameters alone, without a run: what an import writes and a run starts from.

One array for each parameter of the unrolled model, whatever the run's own layout: layers are stacked, and everything is
cut for its device, while it is read. Nothing but the leaf that is being read is ever held twice. On a pod no host reads
more of local files than its part; of an object store it reads the arrays that have a share in its part, each once.
"""

import json

import jax
import numpy as np
from etils import epath

from ddt_jax.errors import UserError
from ddt_jax.io import atomic, json_object, weights_folder
from ddt_jax.io.weights_folder import Lazy

BESIDE = "source"  # folder beside imported weights with what of theirs is not weights
_STEM, _CONFIG = "weights", "weights.json"


def save(folder, arrays: dict[str, Lazy], config: dict, file_bytes: int = weights_folder.FILE_BYTES) -> None:
    """Writes arrays by the paths of an unrolled model ("blocks/block_0/query/kernel"). config: JSON, what they are."""
    weights_folder.save(folder, arrays, _STEM, file_bytes)
    atomic.write_text(epath.Path(folder) / _CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def holds(folder) -> bool:
    """Whether `save` has finished there."""
    return (epath.Path(folder) / _CONFIG).exists()


def load(folder) -> tuple[dict[str, Lazy], dict]:
    """(arrays by path, config). Raises UserError if the folder holds none."""
    if not holds(folder):
        raise UserError(f"weights: {folder} holds no imported weights ({_CONFIG}); write them with `ddt-jax import`")
    path = epath.Path(folder) / _CONFIG
    try:
        config = json_object.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"weights: {path} is damaged ({error}); write the folder again with `ddt-jax import`"
        ) from error
    return weights_folder.load(folder, _STEM), config


def restore(arrays: dict, abstract):
    """A tree of parameters from arrays by unrolled path.

    Args:
      arrays: `Lazy` or NumPy.
      abstract: tree of ShapeDtypeStruct; with a sharding a leaf becomes a global array, of which only the parts of this
        process are read, without one a NumPy array. Arrays are cast to the leaf's type.

    Raises:
      UserError: naming what is missing, left over or of another shape.
    """
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    places = {name: _places(name, leaf.shape) for name, leaf in ((_name(path), leaf) for path, leaf in leaves)}
    wanted = {key: shape for parts in places.values() for key, shape in parts}
    problems = [f"{key} is missing" for key in wanted.keys() - arrays.keys()]
    problems += [f"{key} has no place" for key in arrays.keys() - wanted.keys()]
    problems += [
        f"{key} is {_by(arrays[key].shape)}, not {_by(shape)}"
        for key, shape in wanted.items()
        if key in arrays and tuple(arrays[key].shape) != shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:4])
        raise UserError(f"weights: {len(problems)} of {len(wanted)} arrays do not fit the model that is set: {shown}")

    def one(path, leaf):
        name = _name(path)
        parts = [arrays[key] for key, _ in places[name]]
        stacked = _SCANNED in name

        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            out = np.empty(leaf.shape, leaf.dtype)
            for i, part in enumerate(parts):
                out[i if stacked else ...] = np.asarray(part)
            return out
        wanted = {_bounds(index, leaf.shape) for index in sharding.addressable_devices_indices_map(leaf.shape).values()}
        shards = {bounds: np.empty([end - begin for begin, end in bounds], leaf.dtype) for bounds in wanted}
        for i, part in enumerate(parts):
            of_part = [bounds for bounds in wanted if not stacked or bounds[0][0] <= i < bounds[0][1]]
            array = np.asarray(part) if of_part else None  # a look may be a read: one for all shards
            for bounds in of_part:
                index = tuple(slice(*b) for b in bounds)
                shards[bounds][i - bounds[0][0] if stacked else ...] = array[index[1:] if stacked else index]
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: shards[_bounds(index, leaf.shape)])

    return jax.tree_util.tree_map_with_path(one, abstract)


def unrolled_arrays(params) -> dict[str, Lazy]:
    """Parameters (plain arrays) as arrays by unrolled path, cut layer by layer when they are looked at."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = _name(path)
        for i, (key, shape) in enumerate(_places(name, leaf.shape)):
            cut = (
                (lambda leaf=leaf, i=i: np.asarray(leaf[i]))
                if _SCANNED in name
                else (lambda leaf=leaf: np.asarray(leaf))
            )
            arrays[key] = Lazy(shape, np.dtype(leaf.dtype), cut)
    return arrays


_SCANNED = "/scanned/block/"


def _places(name, shape) -> list[tuple[str, tuple[int, ...]]]:
    """Paths and shapes, in the unrolled model, of what a leaf holds."""
    if _SCANNED not in name:
        return [(name, tuple(shape))]
    return [(name.replace(_SCANNED, f"/block_{i}/"), tuple(shape[1:])) for i in range(shape[0])]


def _bounds(index, shape) -> tuple[tuple[int, int], ...]:
    """(begin, end) of each axis of a shard."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by(shape) -> str:
    return " x ".join(map(str, shape))
