"""Arrays that wait in the memory of the hosts, and are on their chips only while a step uses them.

An optimizer's moments are used once in a step, when all gradients are there and what activations took is free again.
Each array says itself where it lies: by the memory kind of its sharding, and where a program is traced by its type.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

HOST = "pinned_host"  # memory kind of a host's pages that a chip reads and writes by itself


def on_host(sharding: Sharding) -> bool:
    return sharding.memory_kind == HOST


def fetched(tree):
    """A tree of traced arrays, of which those of the hosts are copied to the chips."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if _waits(x) else x, tree)


def late(change: Callable, norm, held, found):
    """`change(held, found)` with what waits for it in `held` fetched, and put back after it.

    It is a branch of the program, which turns on `norm`: a compiler takes it for one that may not be taken. Else it
    would fetch as early as it can, and a chip would hold moments and activations at the same time after all.

    Args:
      change: → (what becomes of `held`, a tree of new arrays).
      norm: float32, not negative, or NaN: known when nothing else is to be done before.
      held: a tree of traced arrays; where none of them waits, `change` is all there is.
    """
    if not any(map(_waits, jax.tree.leaves(held))):
        return change(held, found)

    def branch(held, found):
        new, rest = change(fetched(held), found)
        back = lambda x, old: jax.device_put(x, jax.memory.Space.Host) if _waits(old) else x  # noqa: E731
        return jax.tree.map(back, new, held), rest

    def never(held, found):
        _, rest = jax.eval_shape(branch, held, found)
        return held, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)

    return jax.lax.cond(norm < 0, never, branch, held, found)


def apart(tree):
    """A tree of arrays, of which those of the hosts are copies: for who reads them while the next step takes theirs.

    A write in the background copies what lies on chips, but looks at pages of the host where they are; a step that is
    then given these to reuse is refused by GPUs.
    """
    return jax.tree.map(lambda x: _copy(x) if isinstance(x, jax.Array) and on_host(x.sharding) else x, tree)


def _copy(x):
    parts = [jax.device_put(s.data, s.data.sharding, may_alias=False) for s in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)


def _waits(x) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host
