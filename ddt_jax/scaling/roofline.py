"""How long a step takes if nothing but one limit holds it back: an estimate, from what chips can do on paper.

    compute        products / peak
    memory         bytes of HBM / bandwidth
    communication  Σ over collectives, one after the other; those of different axes do not overlap here
    host           bytes that wait in the memory of the host / bandwidth to it; they come while others go

The step takes at least the longest of them: as if the compiler hid the others behind it. Real steps are slower.

What a group of n devices takes for a whole of V bytes is that of a ring in both directions (scaling-book, chapter 3):
V (n - 1) / n over its bandwidth to gather or to scatter, twice that to reduce, a quarter to change places. A group with
members in several slices or hosts does it inside of them first, then each chip takes its share over the network.
"""

from collections.abc import Mapping

from ddt_jax.scaling.program import Collective, Work
from ddt_jax.scaling.topology import Topology

_TIMES = {"all-reduce": 2.0, "all-to-all": 0.25}


def estimate(work: Work, mesh, topology: Topology, host_bytes: int = 0) -> dict:
    """Seconds of a step: "compute_seconds", "memory_seconds", "communication_seconds", "step_seconds", the longest of
    them, and "bound", its name; "host_seconds" where something waits there.

    Args:
      host_bytes: of a chip, that a step fetches from the memory of its host, and puts back.
    """
    chip = topology.chip
    seconds = {
        "compute": work.flops / chip.peak_flops,
        "memory": work.hbm_bytes / chip.hbm_bandwidth,
        "communication": sum(n * seconds_of(c, mesh, topology) for c, n in work.collectives.items()),
    }
    if host_bytes:
        seconds["host"] = host_bytes / chip.host_bandwidth
    bound = max(seconds, key=seconds.get)
    return {f"{name}_seconds": value for name, value in seconds.items()} | {
        "step_seconds": seconds[bound],
        "bound": bound,
    }


def seconds_of(collective: Collective, mesh, topology: Topology) -> float:
    """Of one run of a collective."""
    where = [_place(i, mesh, topology) for i in collective.group]
    parts = {part for part, _ in where}
    inside = [at for part, at in where if part == where[0][0]]
    chip, whole = topology.chip, collective.bytes * _TIMES.get(collective.kind, 1.0)
    if collective.kind == "collective-permute":
        return collective.bytes / (chip.network_bandwidth if len(parts) > 1 else chip.link_bandwidth)
    seconds = 0.0
    if len(inside) > 1:
        seconds += whole * (len(inside) - 1) / len(inside) / _bandwidth(inside, topology)
    if len(parts) > 1:
        seconds += whole * (len(parts) - 1) / len(parts) / (chip.network_bandwidth * len(inside))
    return seconds


def _place(number: int, mesh, topology: Topology) -> tuple[int, tuple[int, ...]]:
    """(slice or host, coordinates in it) of a device by its number in the mesh."""
    if not topology.chip.is_tpu:
        return number // topology.sides[0], (number % topology.sides[0],)
    device = mesh.devices.flat[number]
    return getattr(device, "slice_index", 0) or 0, tuple(device.coords)


def _bandwidth(places, topology: Topology) -> float:
    """Bytes per second into each of some chips of one slice or host. A side of the torus that a group fills is a ring,
    reached from both ends; a part of a side is a line.
    """
    chip = topology.chip
    if not chip.is_tpu:
        return chip.link_bandwidth
    closed = 16 if chip.torus == 2 else 4  # shorter sides of a slice have no links around
    ways = 0
    for side, at in zip(topology.sides, zip(*places, strict=True), strict=False):
        extent = len(set(at))
        ways += 0 if extent == 1 else 2 if extent == side >= closed else 1
    return ways * chip.link_bandwidth


def collectives(work: Work, mesh, topology: Topology) -> list[Mapping]:
    """What devices say to each other in a step, the longest first: of each kind and axis "count", "bytes" of all of
    them on a device, "largest" of one, and estimated "seconds".
    """
    found = {}
    for c, count in work.collectives.items():
        axis = "+".join(c.axes(mesh)) or "none"
        row = found.setdefault((c.kind, axis), {"kind": c.kind, "axis": axis, "count": 0, "bytes": 0, "largest": 0})
        row["count"] += count
        row["bytes"] += count * c.bytes
        row["largest"] = max(row["largest"], c.bytes)
        row["seconds"] = row.get("seconds", 0.0) + count * seconds_of(c, mesh, topology)
    return sorted(found.values(), key=lambda row: -row["seconds"])
