"""Pods by name: `v5p:8x8x8`, `v6e:16x16`, `h100:8x16`, and the abstract devices that programs are compiled for.

A TPU's numbers are the sides of its slice; a GPU's are GPUs of a host and hosts. The real TPU compiler needs no TPU,
only libtpu. Of GPUs there are fake devices of the CPU's compiler.
"""

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass

from ddt_jax.errors import UserError
from ddt_jax.scaling.chips import CHIPS, Chip

MOST_FAKE_DEVICES = 512  # each of them costs this machine threads and memory
# libtpu reads these when it is loaded; without them it looks for a TPU, complains that there is none, and lets no
# second process beside this one compile.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Topology:
    """A pod.

    Attributes:
      kind: a key of CHIPS.
      sides: of a TPU slice; of GPUs (of a host, hosts).
      slices: so many of them, joined by the data centre's network.
    """

    kind: str
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.sides) * self.slices

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.sides))}"

    def __str__(self):
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"


def parse(text: str, slices: int = 1) -> Topology:
    """A pod by its name. Raises UserError, in one line, for what is none."""
    kind, colon, shape = text.strip().lower().partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology {text}: there is no chip {kind!r}; choose from {', '.join(CHIPS)}")
    example = {2: "16x16", 3: "8x8x8", 0: "8x16"}[CHIPS[kind].torus]
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"--topology {text}: sides are missing; write {kind}:{example}")
    sides = tuple(map(int, shape.split("x")))
    torus = CHIPS[kind].torus
    if torus and len(sides) != torus:
        raise UserError(f"--topology {text}: a slice of {kind} has {torus} sides, as {kind}:{example}")
    if not torus:
        if len(sides) > 2 or sides[0] > 8:
            raise UserError(
                f"--topology {text}: {kind} takes GPUs of a host (at most 8) and hosts, as {kind}:{example}"
            )
        sides = (*sides, 1)[:2]
    if slices < 1:
        raise UserError(f"--slices {slices}: there is at least one")
    if slices > 1 and not torus:
        raise UserError(f"--slices {slices}: only TPUs come in slices; write the hosts of {kind} into --topology")
    return Topology(kind, sides, slices)


def devices(topology: Topology) -> list:
    """Abstract devices of TPUs, or fake ones of the CPU in place of GPUs.

    To be called before JAX has a backend.

    Raises:
      UserError: if libtpu is not installed or has no such slice, or there are more GPUs than can be faked.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")
    if not topology.chip.is_tpu:
        return _fake(topology.chips)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {topology.name}: the TPU compiler is not installed; pip install 'ddt-jax[tpu]' into an "
            "environment of its own"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **slices)
    except Exception as error:  # what libtpu raises has no class of its own
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {topology.name}: the TPU compiler has no such slice: {reason}") from error
    return list(described.devices)


def _fake(count: int) -> list:
    import jax

    if count > MOST_FAKE_DEVICES:
        raise UserError(
            f"--topology: {count} GPUs are more than the {MOST_FAKE_DEVICES} that are faked here; name fewer hosts and "
            "--rows N: what a GPU holds does not change along mesh.data"
        )
    with contextlib.suppress(RuntimeError):  # there is a backend already, as in tests: what it has must do
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(f"--topology: {count} fake devices are needed, this process has {len(found)}; set fewer hosts")
    return found[:count]
