"""Large parameters that are split over a mesh, but that a compiled program puts together or adds up whole on a chip.

Of layers in a loop a program gathers one at a time. A gather of all of them at once, or a sum of a whole gradient of
which each chip keeps a part, says that the partitioner lost a sharding on its way; in a large model such an array alone
may be more than a chip has.
"""

import math
import re
from collections.abc import Mapping

import jax

from ddt_jax.scaling.program import Work

_SHARE = 100  # a large parameter has one part in so many of all parameters, or more
_ONE_LAYER = re.compile(r"(^|/)block_\d+/")  # of layers without a loop, each of which is gathered when its turn comes


def find(work: Work, mesh, params) -> list[Mapping]:
    """What is whole, the most bytes first: rows of "parameters" (names of all that have these dimensions), "kind" of
    the collective, "axis", "count", and "bytes" of one.

    Args:
      work: of the program.
      params: its parameters as ShapeDtypeStructs with shardings.

    A parameter is known by its dimensions, in any order and type: activations of the same ones count as well.
    """
    names, rows = _split(params), {}
    for c, count in work.collectives.items():
        if c.kind not in ("all-gather", "all-reduce"):
            continue
        axis, elements = "+".join(c.axes(mesh)) or "none", sum(map(math.prod, c.shapes))
        for shape in c.shapes:
            key = _known_by(shape)
            if key in names:
                size = round(c.bytes * math.prod(shape) / elements)
                row = {"parameters": names[key], "kind": c.kind, "axis": axis, "count": 0, "bytes": size}
                rows.setdefault((key, c.kind, axis, size), row)["count"] += count
    return sorted(rows.values(), key=lambda row: -row["count"] * row["bytes"])


def _split(params) -> dict[tuple[int, ...], list[str]]:
    """Names of large parameters of which each chip has a part, by what they are known by."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    least, found = sum(leaf.size for _, leaf in leaves) / _SHARE, {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_split = leaf.sharding.shard_shape(leaf.shape) != leaf.shape
        if leaf.size >= least and is_split and not _ONE_LAYER.search(name):
            found.setdefault(_known_by(leaf.shape), []).append(name)
    return found


def _known_by(shape):
    return tuple(sorted(n for n in shape if n > 1))
