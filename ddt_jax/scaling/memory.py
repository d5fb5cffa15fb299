"""What a chip holds while a compiled train step runs, by kind, in bytes."""

import math

import jax


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
    return found | {
        "padding": max(m.argument_size_in_bytes - sum(found.values()), 0),
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
    """Bytes of one device. tree: of ShapeDtypeStructs with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
