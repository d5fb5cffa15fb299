"""Pods by name, and what is said of names that are none."""

import importlib.util

import pytest

from ddt_jax.errors import UserError
from ddt_jax.scaling import topology
from ddt_jax.scaling.chips import CHIPS


@pytest.mark.parametrize(
    ("text", "slices", "chips", "name"),
    [
        ("v5p:8x8x8", 1, 512, "v5p:8x8x8"),
        ("V6E:16x16", 2, 512, "v6e:16x16"),
        ("h100:8x16", 1, 128, "h100:8x16"),
        ("h200:8", 1, 8, "h200:8x1"),
    ],
)
def test_pods_have_as_many_chips_as_their_sides_say(text, slices, chips, name):
    pod = topology.parse(text, slices)
    assert (pod.chips, pod.name) == (chips, name)


@pytest.mark.parametrize(
    ("text", "slices", "says"),
    [
        ("v7x:2x2", 1, "no chip 'v7x'; choose from v5e, v5p"),
        ("v5p", 1, "write v5p:8x8x8"),
        ("v5p:8x8", 1, "has 3 sides"),
        ("v6e:16x0", 1, "write v6e:16x16"),
        ("v6e:16x16x1", 1, "has 2 sides"),
        ("h100:16", 1, "at most 8"),
        ("h100:8x2x2", 1, "and hosts"),
        ("h100:8", 2, "only TPUs come in slices"),
        ("v5p:2x2x1", 0, "--slices 0"),
    ],
)
def test_what_is_no_pod_is_refused_in_one_line(text, slices, says):
    with pytest.raises(UserError) as error:
        topology.parse(text, slices)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_without_the_tpu_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ddt-jax\[tpu\]'"):
        topology.devices(topology.parse("v5p:2x2x1"))


def test_more_gpus_than_can_be_faked_are_refused():
    with pytest.raises(UserError, match="1024 GPUs are more than"):
        topology.devices(topology.parse("h100:8x128"))


def test_every_chip_says_where_its_figures_are_from():
    for chip in CHIPS.values():
        assert chip.source and chip.network_bandwidth < chip.link_bandwidth < chip.hbm_bandwidth < chip.peak_flops
