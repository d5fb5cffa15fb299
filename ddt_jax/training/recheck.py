"""A step that is done twice, on other devices of the same hosts, to find a device that computes wrongly.

Nothing else notices one: its numbers are finite and plausible. Each shard is computed by the next device of its host,
by the same program; on hosts with one device the same one repeats it, which finds faults that come and go.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from ddt_jax.errors import UserError
from ddt_jax.training.checksum import checksums
from ddt_jax.training.state import TrainState
from ddt_jax.training.tokenizer_step import compile_step


class Recheck:
    """Repeats steps on rotated devices. Needs memory for a second state, and compiles a second time.

    Args:
      step: the pure step.
      shardings: of the state.
      mesh: of the run.
    """

    def __init__(self, step: Callable, shardings: TrainState, mesh: Mesh):
        self._next = _rotation(mesh)
        self._mesh = Mesh(
            np.vectorize(self._next.get, otypes=[object])(mesh.devices), mesh.axis_names, axis_types=mesh.axis_types
        )
        self._step = compile_step(step, jax.tree.map(self._placed, shardings), self._mesh)

    def begin(self, state: TrainState, batch: dict) -> dict[str, str]:
        """Does the step on copies of its inputs. Returns the checksums of what comes out, for `end`."""
        with jax.set_mesh(self._mesh):
            return checksums(self._step(*jax.tree.map(self._move, (state, batch))))

    def end(self, step: int, again: dict[str, str], result: tuple[TrainState, dict]) -> None:
        """Compares with what the run's own devices gave. Raises UserError if one bit differs."""
        found = checksums(result)
        differing = [name for name, value in found.items() if again[name] != value]
        if differing:
            raise UserError(
                f"train: step {step} gives other bits on rotated devices in {len(differing)} of {len(found)} arrays "
                f"(first: {differing[0]}): a device computes wrongly, or in an order of its own (docs/survival.md); "
                "the newest checkpoint is from before"
            )

    def _placed(self, sharding):
        return NamedSharding(self._mesh, sharding.spec, memory_kind=sharding.memory_kind)

    def _move(self, x):
        there = {d: SingleDeviceSharding(n, memory_kind=x.sharding.memory_kind) for d, n in self._next.items()}
        parts = [jax.device_put(s.data, there[s.device], may_alias=False) for s in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, self._placed(x.sharding), parts)


def _rotation(mesh: Mesh) -> dict:
    """Each device of the mesh → the next one of its host."""
    hosts = {}
    for device in mesh.devices.flat:
        hosts.setdefault(device.process_index, []).append(device)
    return {a: b for devices in hosts.values() for a, b in zip(devices, devices[1:] + devices[:1], strict=True)}
