"""How a parameter is declared: once, with its initializer, logical axes and how it is optimized, in one box.

The box is Flax metadata that works under `nn.scan`. It exists only at initialisation: `split` takes the tree apart into
plain arrays, which is all that steps and checkpoints see, and the declarations, from which shardings and parameter
groups are made.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
from flax.core import meta

LAYERS = "layers"  # logical name of the axis that nn.scan adds


@dataclass(frozen=True)
class Declaration:
    """What a parameter is, apart from its value.

    Attributes:
      axes: one logical name per dimension, None for a dimension that is never sharded. `mesh.RULES` maps them.
      decay: whether weight decay applies.
      group: which optimizer may take it. "matrix" goes to Muon where that is chosen, "other" to AdamW,
        "discriminator" to an Adam of its own that is clipped by itself, "frozen" to none.
      matrix: for "matrix": which dimensions the linear map reads and which it writes, counted from the end so that a
        layer axis in front changes nothing; dimensions in neither are independent matrices.
      lr_scale: factor on the learning rate.
      reads: which dimensions a linear map reads, counted as in `matrix`, which says it for a "matrix"; () for what is
        no map: a table that is looked up, a gain, a bias.
      fixed_spread: whether a map starts with the same spread however much it reads; else with one of 1 / √fan-in.
      update_scale: factor on an update without its decay; initial_scale: on the first value. Both are 1 where they are
        declared: `training.transfer` sets them.
    """

    axes: tuple[str | None, ...]
    decay: bool = True
    group: Literal["matrix", "other", "discriminator", "frozen"] = "other"
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    lr_scale: float = 1.0
    reads: tuple[int, ...] = ()
    fixed_spread: bool = False
    update_scale: float = 1.0
    initial_scale: float = 1.0

    def __post_init__(self):
        if (self.group == "matrix") != (self.matrix is not None):
            raise ValueError(f"group {self.group!r} and matrix {self.matrix} do not go together")
        if any(d >= 0 for dims in (*(self.matrix or ()), self.reads) for d in dims):
            raise ValueError(f"dimensions are counted from the end (negative), got {self.matrix or self.reads}")


@flax.struct.dataclass
class Box(meta.AxisMetadata):
    """A parameter value with its declaration."""

    value: Any
    declaration: Declaration = flax.struct.field(pytree_node=False)

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        axes = list(self.declaration.axes)
        axes.insert(index, params.get(meta.PARTITION_NAME, LAYERS))
        return self.replace(declaration=replace(self.declaration, axes=tuple(axes)))

    def remove_axis(self, index, params):
        axes = list(self.declaration.axes)
        del axes[index]
        return self.replace(declaration=replace(self.declaration, axes=tuple(axes)))


def declare(init: Callable, axes: tuple[str | None, ...], **how) -> Callable:
    """An initializer whose result carries its declaration; for `self.param(name, declare(...), shape, dtype)`.

    Args:
      init: (key, shape, dtype) → array.
      axes: logical name of each dimension.
      **how: the other fields of `Declaration`.
    """
    declaration = Declaration(axes=tuple(axes), **how)

    def boxed(key, shape, *args, **kwargs):
        if len(shape) != len(axes):
            raise ValueError(f"a parameter of shape {shape} is declared with axes {axes}")
        return Box(init(key, shape, *args, **kwargs), declaration)

    return boxed


def is_box(x) -> bool:
    return isinstance(x, Box)


def in_group(boxed, group: str):
    """A boxed tree whose parameters are all in one optimizer group other than "matrix"."""

    def one(box):
        return box.replace(declaration=replace(box.declaration, group=group, matrix=None))

    return jax.tree.map(one, boxed, is_leaf=is_box)


def missing(boxed):
    """A boxed tree, abstract or not, with NaN for its values: of what a file will hold, so that a run that never got it
    can't go unnoticed.
    """

    def one(box):
        return box.replace(value=jnp.full(box.value.shape, jnp.nan, box.value.dtype))

    return jax.tree.map(one, boxed, is_leaf=is_box)


def split(boxed):
    """A boxed tree as (values, declarations), two trees of the same structure.

    Raises:
      ValueError: if a leaf carries no declaration.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        if not is_box(leaf):
            raise ValueError(f"parameter {jax.tree_util.keystr(path)} is not declared with params.declare")
    values = jax.tree.map(lambda b: b.value, boxed, is_leaf=is_box)
    declarations = jax.tree.map(lambda b: b.declaration, boxed, is_leaf=is_box)
    return values, declarations
