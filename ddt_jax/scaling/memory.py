"""What a chip holds while a compiled train step runs, by kind, in bytes, and what waits for it with its host."""

import math

import jax

from ddt_jax.training import offload


def by_kind(compiled, abstract, batch) -> dict[str, int]:
    """Bytes of one device.

    Args:
      compiled: the step, of (state, batch).
      abstract, batch: its arguments as ShapeDtypeStructs with shardings.

    Returns:
      "parameters", "optimizer", "average", "other_state" and "batch", as their shardings say; "padding", what tiles of
      the device add to them; "temporary", activations and gradients above all; "outputs" that take no argument's
      place; "code".
    """
    m, found = compiled.memory_analysis(), of_arguments(abstract, batch)
    # A CPU has one memory, and its compiler's count one kind of arguments.
    held = m.argument_size_in_bytes - (0 if m.host_argument_size_in_bytes else of_hosts(abstract))
    return found | {
        "padding": max(held - sum(found.values()), 0),
        "temporary": m.temp_size_in_bytes,
        "outputs": max(m.output_size_in_bytes - m.alias_size_in_bytes, 0),
        "code": m.generated_code_size_in_bytes,
    }


def of_arguments(abstract, batch) -> dict[str, int]:
    """The first five of `by_kind`, for which nothing has to be compiled."""
    return {
        "parameters": of_tree(abstract.params),
        "optimizer": of_tree(abstract.opt_state),
        "average": of_tree(abstract.ema),
        "other_state": of_tree((abstract.extra, abstract.step, abstract.rng, abstract.bad_steps)),
        "batch": of_tree(batch),
    }


def of_tree(tree) -> int:
    """Bytes in the memory of one device. tree: of ShapeDtypeStructs with shardings."""
    return sum(_bytes(x) for x in jax.tree.leaves(tree) if not offload.on_host(x.sharding))


def of_hosts(tree) -> int:
    """Bytes of one device's part that wait in the memory of its host."""
    return sum(_bytes(x) for x in jax.tree.leaves(tree) if offload.on_host(x.sharding))


def _bytes(x):
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
