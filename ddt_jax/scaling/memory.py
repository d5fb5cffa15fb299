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
        "parameters": _bytes(abstract.params),
        "optimizer": _bytes(abstract.opt_state),
        "average": _bytes(abstract.ema),
        "other_state": _bytes((abstract.extra, abstract.step, abstract.rng, abstract.bad_steps)),
        "batch": _bytes(batch),
    }


def _bytes(tree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
