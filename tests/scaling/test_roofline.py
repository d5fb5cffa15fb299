"""The three terms of an estimate, from work that is given, on pods whose figures are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from ddt_jax.scaling import roofline, topology
from ddt_jax.scaling.program import Collective, Work


def pod(name, slices=1):
    """(topology, a mesh of one axis over its chips in the order of their coordinates)."""
    found = topology.parse(name, slices)
    devices = np.array(
        [
            SimpleNamespace(slice_index=s, coords=(*reversed(at),))
            for s in range(slices)
            for at in np.ndindex(*reversed(found.sides))
        ]
    )
    return found, SimpleNamespace(devices=devices, axis_names=("fsdp",))


def test_the_longest_term_bounds_the_step():
    found, mesh = pod("v5p:4x4x4")
    work = Work(flops=459e12, hbm_bytes=2 * 2.77e12)
    e = roofline.estimate(work, mesh, found)
    assert (e["compute_seconds"], e["memory_seconds"], e["communication_seconds"]) == pytest.approx((1, 2, 0))
    assert e["step_seconds"] == pytest.approx(2) and e["bound"] == "memory" and "host_seconds" not in e
    waits = roofline.estimate(work, mesh, found, host_bytes=45_000_000_000)
    assert waits["host_seconds"] == waits["step_seconds"] == pytest.approx(3) and waits["bound"] == "host"


@pytest.mark.parametrize(
    ("name", "slices", "group", "kind", "seconds"),
    [
        # A whole side is a ring: both links of it bring a part.
        ("v5p:4x4x4", 1, range(4), "all-gather", 3 / 4 / (2 * 90e9)),
        ("v5p:4x4x4", 1, range(4), "all-reduce", 2 * 3 / 4 / (2 * 90e9)),
        ("v5p:4x4x4", 1, range(64), "reduce-scatter", 63 / 64 / (6 * 90e9)),
        # Half a side is a line, and so is the side of a small slice.
        ("v5p:4x4x4", 1, range(2), "all-gather", 1 / 2 / 90e9),
        ("v6e:4x4", 1, range(4), "all-gather", 3 / 4 / 90e9),
        ("v6e:16x16", 1, range(16), "all-gather", 15 / 16 / (2 * 90e9)),
        # Two slices: inside first, then every chip takes its share over the network.
        ("v5p:4x4x4", 2, (0, 64), "all-reduce", 2 * 1 / 2 / 6.25e9),
        ("v5p:4x4x4", 2, range(128), "all-gather", 63 / 64 / (6 * 90e9) + 1 / 2 / (64 * 6.25e9)),
        # GPUs of a host, and of several.
        ("h100:8x4", 1, range(8), "all-gather", 7 / 8 / 450e9),
        ("h100:8x4", 1, range(32), "all-gather", 7 / 8 / 450e9 + 3 / 4 / (8 * 50e9)),
        ("h100:8x4", 1, (0, 8), "collective-permute", 1 / 50e9),
    ],
)
def test_a_collective_takes_what_its_links_allow(name, slices, group, kind, seconds):
    found, mesh = pod(name, slices)
    assert roofline.seconds_of(Collective(kind, 10**9, tuple(group)), mesh, found) == pytest.approx(1e9 * seconds)
