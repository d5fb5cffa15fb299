"""From arrays over a mesh to this process's rows, and from each process's rows to those of all.

Legend: B rows of a batch on this process, N rows of all processes.
"""

import jax
import numpy as np

from ddt_jax import mesh as meshes
from ddt_jax.evaluation.frechet import Moments


def local_rows(array, by_rows) -> np.ndarray:
    """This process's rows of a global array, in order.

    Args:
      by_rows: sharding with which the rows of the batch were put.
    """
    if array.is_fully_addressable:
        return np.asarray(array)
    if not array.sharding.is_equivalent_to(by_rows, array.ndim):  # the compiler chose another layout
        array = jax.jit(lambda x: x, out_shardings=by_rows)(array)
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def valid_rows(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Columns over the rows of all batches and processes whose column `valid` says so.

    Raises:
      ValueError: if there are none.
    """
    if not rows:
        raise ValueError("evaluation: there are no images")
    table = columns({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    valid = table.pop("valid")
    if not valid.any():
        raise ValueError("evaluation: there are no valid images")
    if "commitment" in table:
        # A mean over the global batch, which padding on any process would have entered: such batches are left out.
        padded = np.isin(table["batch"], table["batch"][~valid])
        table["commitment"] = np.where(padded, np.nan, table["commitment"])
    return {name: column[valid] for name, column in table.items()}


def columns(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns [B, ...] of each process, equally long on all of them, as columns [N, ...] on every process.

    Of processes that share their rows, by the mesh that is set, one is asked.
    """
    if jax.process_count() == 1:
        return table
    from jax.experimental import multihost_utils

    # float64 does not pass through JAX arrays; its bytes do.
    as_bytes = {name: np.frombuffer(v.tobytes(), np.uint8).reshape(len(v), -1) for name, v in table.items()}
    asked = list(meshes.reader().processes)
    gathered = {name: v[asked] for name, v in multihost_utils.process_allgather(as_bytes).items()}
    return {
        name: np.ascontiguousarray(gathered[name]).view(v.dtype).reshape(-1, *v.shape[1:]) for name, v in table.items()
    }


def added(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums over the rows of each process as sums over those of all."""
    return {name: v.sum(axis=0) for name, v in columns({name: v[None] for name, v in sums.items()}).items()}


def moments(of: Moments | None, features: int) -> Moments | None:
    """Moments over the examples of all processes. None: this process has none, or none of them has any."""
    if jax.process_count() == 1:
        return of
    of = of or Moments(0, np.zeros(features), np.zeros((features, features)))
    table = columns({"count": np.array([of.count]), "mean": of.mean[None], "scatter": of.scatter[None]})
    parts = [Moments(int(n), m, s) for n, m, s in zip(*table.values(), strict=True) if n]
    return sum(parts[1:], parts[0]) if parts else None


def agreed(value: int) -> int:
    """What process 0 says."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
