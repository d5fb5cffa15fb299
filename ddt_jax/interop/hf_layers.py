"""How arrays of PyTorch layers lie beside ours: one table for a model, read in both directions.

A row says which of our arrays, by unrolled path (`training/weights.py`), is which of theirs, and in what form.
"""

from math import prod

import numpy as np

from ddt_jax.errors import UserError
from ddt_jax.interop.names import by, folded
from ddt_jax.io.weights_folder import Lazy

# Ours → (theirs, form). Forms of a kernel, theirs being [out, in]: "linear" [in..., out], "heads" [in, heads, out],
# "patches" [row column colour, out] of a convolution; "query", "key" and "value" are "heads", or the bias [heads, out],
# in one array of all three. "flat" is a bias [heads, out] as one row, "plain" anything else: the same values, whatever
# dimensions of 1 there are.
Table = dict[str, tuple[str, str]]
_PARTS = ("query", "key", "value")


def layer(ours: str, theirs: str, form: str = "linear", bias: bool = True) -> Table:
    """A linear map."""
    rows = {f"{ours}/kernel": (f"{theirs}.weight", form)}
    if bias:
        rows[f"{ours}/bias"] = (
            f"{theirs}.bias",
            {"linear": "plain", "patches": "plain", "heads": "flat"}.get(form, form),
        )
    return rows


def norm(ours: str, theirs: str) -> Table:
    """A LayerNorm."""
    return {f"{ours}/scale": (f"{theirs}.weight", "plain"), f"{ours}/bias": (f"{theirs}.bias", "plain")}


def to_ours(table: Table, shapes: dict[str, tuple[int, ...]], found: dict, source: str) -> dict[str, Lazy]:
    """Their arrays as ours, each made when it is looked at.

    Args:
      shapes: of ours; the rows of the table that are wanted.
      found: theirs by name; what no row names is left alone.
      source: what an error calls them.

    Raises:
      UserError: naming what is missing or has another size.
    """
    problems, made = [], {}
    for ours, shape in shapes.items():
        theirs, form = table[ours]
        wanted = _their_shape(form, shape)
        if theirs not in found:
            problems.append(f"{theirs} is missing")
        elif _without_ones(found[theirs].shape) != _without_ones(wanted):
            problems.append(f"{theirs} is {by(found[theirs].shape)}, not {by(wanted)}")
        else:
            made[ours] = Lazy(shape, np.dtype(found[theirs].dtype), _reader(found[theirs], form, shape))
    if problems:
        raise UserError(f"{source}: does not fit the sizes that are set: {'; '.join(folded(problems))}")
    return made


def to_theirs(table: Table, arrays: dict) -> dict[str, np.ndarray]:
    """Our arrays by their names; "query", "key", "value" and "patches" are not written."""
    made = {}
    for ours, array in arrays.items():
        theirs, form = table[ours]
        array = np.asarray(array)
        if form == "linear":
            array = array.reshape(-1, array.shape[-1]).T
        elif form == "heads":
            array = array.reshape(len(array), -1).T
        made[theirs] = np.ascontiguousarray(array).reshape(_their_shape(form, arrays[ours].shape))
    return made


def _their_shape(form: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if form == "linear":
        return (shape[-1], prod(shape[:-1]))
    if form == "heads":
        return (prod(shape[1:]), shape[0])
    if form == "flat":
        return (prod(shape),)
    if form == "patches":
        side = round((shape[0] / 3) ** 0.5)
        return (shape[1], 3, side, side)
    if form in _PARTS:
        return (3 * prod(shape[1:]), shape[0]) if len(shape) == 3 else (3 * prod(shape),)
    return tuple(shape)


def _without_ones(shape) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _reader(array, form: str, shape: tuple[int, ...]):
    def read():
        x = np.asarray(array)
        if form in _PARTS:
            x = np.split(x, 3)[_PARTS.index(form)]
        if form == "patches":
            x = x.transpose(2, 3, 1, 0)
        elif form != "plain" and len(shape) > 1 and x.ndim == 2:
            x = x.T
        return np.ascontiguousarray(x).reshape(shape)

    return read
