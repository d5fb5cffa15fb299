"""Published checkpoints, tensor by tensor: where each one of a file lies in our state, in both directions.

A `Table` collects what a model's module says of its tensors. Every tensor of a file has one place, so that what was
read is written again with the same names and the same bytes (of fp32 files; half precision is read too and written as
fp32). Nothing is skipped: all tensors that do not fit come in one error.

Legend: D input width, H heads, R roles (of query, key, value), E head dimension.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ddt_jax.errors import UserError
from ddt_jax.interop import names
from ddt_jax.io import torch_file

FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))


@dataclass(frozen=True)
class Place:
    """A leaf of our state, or a part of it, such as one layer where layers are stacked.

    Attributes:
      path: from {"params", "extra"} on, steps joined by "/".
      index: on the leaf's first axes; () for all of it.
    """

    path: str
    index: tuple[int, ...] = ()

    def __truediv__(self, name: str) -> "Place":
        return replace(self, path=f"{self.path}/{name}")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a published file and the places of our state that it becomes.

    Attributes:
      key, shape: in the file.
      places: of our state.
      split: the file's array → one array per place; None for a place that is only read, to write the file.
      join: arrays at the places → the file's; None if it has to be left out.
      types: that it may have in a file.
      optional: there must be all tensors of this kind, or none.
    """

    key: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    split: Callable
    join: Callable
    types: tuple[np.dtype, ...] = FLOATS
    optional: bool = False


@dataclass(frozen=True)
class Format:
    """A kind of files.

    Attributes:
      kind: what errors call them.
      within: the name of the state dict in a file of their trainer.
      tensors: (settings of the model, {"params", "extra"} of which only shapes are used) → all tensors of a file, in
        its order. Raises UserError for settings that such files do not fit.
    """

    kind: str
    within: str
    tensors: Callable[[Any, Any], list[Tensor]]

    def read(self, path) -> dict[str, np.ndarray]:
        """The tensors in a file: a plain state dict, or a trainer's dict that has one beside what is not looked at.

        Raises:
          UserError: if the file cannot be read or has neither.
        """
        found = torch_file.load(path, within=self.within)
        if not isinstance(found, dict) or not any(isinstance(value, np.ndarray) for value in found.values()):
            raise UserError(f"{self.kind}: {path} holds no tensors by name, nor a dict of them under {self.within!r}")
        return found

    def check(self, arrays: dict, tensors: list[Tensor], source: str = "the arrays") -> None:
        """Raises UserError naming what is missing, left over, of another shape or no float. source: the file."""
        wanted = {tensor.key: tensor for tensor in tensors}
        missing = wanted.keys() - arrays.keys()
        optional = {tensor.key for tensor in tensors if tensor.optional}
        if missing >= optional:
            missing -= optional
        problems = [f"{key} is missing" for key in sorted(missing)]
        problems += [f"{key} has no place" for key in sorted(arrays.keys() - wanted.keys(), key=str)]
        for key, tensor in wanted.items():
            if key in arrays and (wrong := misfit(arrays[key], tensor)):
                problems.append(f"{key} {wrong}")
        if problems:
            raise UserError(
                f"{self.kind}: {source} does not fit the sizes that are set, {len(problems)} of {len(wanted)} tensors: "
                f"{'; '.join(names.folded(problems))}; a config with its sizes goes in --config"
            )

    def to_arrays(self, tree, model) -> dict[str, np.ndarray]:
        """The tensors of a file. tree: {"params", "extra"} of arrays; model: settings. Raises as `tensors`."""
        leaves = dict(_leaves(tree))

        def at(place):
            leaf = leaves[place.path]
            return np.asarray(leaf[place.index] if place.index else leaf)

        arrays = {tensor.key: tensor.join(*map(at, tensor.places)) for tensor in self.tensors(model, tree)}
        return {key: array for key, array in arrays.items() if array is not None}


def misfit(array, tensor: Tensor) -> str:
    """What is wrong with a value of a file in the place of a tensor; "" if nothing is."""
    if not isinstance(array, np.ndarray):
        return "is no tensor"
    if array.shape != tensor.shape:
        return f"is {names.by(array.shape)}, not {names.by(tensor.shape)}"
    if array.dtype not in tensor.types:
        return f"is of type {array.dtype}{', not float32' if tensor.types == FLOATS else ''}"
    return ""


def fill(arrays: dict, tensors: list[Tensor], tree, put: Callable[[np.ndarray, Any], Any] | None = None):
    """Our state with a file's tensors in it.

    Args:
      arrays: that `Format.check` let pass.
      tensors: of a `Table`.
      tree: {"params", "extra"} of arrays. Leaves that the file says nothing about stay: the codec, for instance.
      put: (array, leaf it replaces) → leaf; None for NumPy arrays in the leaf's type.

    Returns:
      A tree like `tree`.
    """
    put = put or (lambda value, leaf: value.astype(leaf.dtype))
    sources = defaultdict(list)
    for tensor in tensors:
        for number, place in enumerate(tensor.places):
            if tensor.key in arrays:
                sources[place.path].append((place.index, tensor, number))

    def one(path, leaf):
        whole = None
        for index, tensor, number in sources[_name(path)]:
            if (part := tensor.split(arrays[tensor.key])[number]) is None:
                continue
            if not index:
                return put(part, leaf)
            if whole is None:  # one leaf at a time: its parts are copied once
                whole = np.empty(leaf.shape, leaf.dtype)
            whole[index] = part
        return leaf if whole is None else put(whole, leaf)

    return jax.tree_util.tree_map_with_path(one, tree)


class Table:
    """Collects tensors, in the file's order.

    Args:
      tree: {"params", "extra"}; only shapes are used.
    """

    def __init__(self, tree):
        self.leaves = {name: tuple(leaf.shape) for name, leaf in _leaves(tree)}
        self.tensors: list[Tensor] = []

    def shape(self, place: Place) -> tuple[int, ...]:
        return self.leaves[place.path][len(place.index) :]

    def add(self, key, shape, place, split, join):
        self.tensors.append(Tensor(key, shape, (place,), lambda y: (split(y),), join))

    def reshaped(self, key, shape, place):
        ours = self.shape(place)
        self.add(key, shape, place, lambda y: y.reshape(ours), lambda x: x.reshape(shape))

    def dense(self, name, place, inputs=1, bias=True):
        """inputs: leading dimensions that our kernel reads. Theirs is (out, in)."""
        ours = self.shape(place / "kernel")
        read, write = prod(ours[:inputs]), prod(ours[inputs:])
        self.add(
            f"{name}.weight",
            (write, read),
            place / "kernel",
            lambda y: y.T.reshape(ours),
            lambda x: x.reshape(read, write).T,
        )
        if bias:
            self.reshaped(f"{name}.bias", (write,), place / "bias")

    def pair(self, name, place, first, second):
        """An MLP of two linear maps."""
        self.dense(f"{name}.{first}", place / "up")
        self.dense(f"{name}.{second}", place / "down")

    def norm(self, name, place, bias=True):
        self.reshaped(f"{name}.weight", self.shape(place / "scale"), place / "scale")
        if bias:
            self.reshaped(f"{name}.bias", self.shape(place / "bias"), place / "bias")

    def heads(self, name, *places):
        """Ours [D, H, R, E], perhaps in several arrays that share the roles; theirs packs (R, H, E) by D."""
        kernels = tuple(place / "heads/kernel" for place in places)
        biases = tuple(place / "heads/bias" for place in places)
        roles = [self.shape(kernel)[2] for kernel in kernels]
        d, h, _, e = self.shape(kernels[0])
        r, cuts = sum(roles), np.cumsum(roles)[:-1]
        self.tensors.append(
            Tensor(
                f"{name}.weight",
                (r * h * e, d),
                kernels,
                lambda y: np.split(y.reshape(r, h, e, d).transpose(3, 1, 0, 2), cuts, axis=2),
                lambda *xs: np.concatenate(xs, axis=2).transpose(2, 1, 3, 0).reshape(r * h * e, d),
            )
        )
        self.tensors.append(
            Tensor(
                f"{name}.bias",
                (r * h * e,),
                biases,
                lambda y: np.split(y.reshape(r, h, e).transpose(1, 0, 2), cuts, axis=1),
                lambda *xs: np.concatenate(xs, axis=1).transpose(1, 0, 2).reshape(-1),
            )
        )


def _leaves(tree):
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
