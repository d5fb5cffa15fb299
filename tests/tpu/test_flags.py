"""The TPU compiler knows the flags that launch scripts set, and names its chips as `chips.DEVICE_KINDS` does."""

import json
import os
import subprocess
import sys

import pytest

from ddt_jax.scaling import chips, topology, xla_flags

pytestmark = pytest.mark.tpu_compile

# In a process of its own: libtpu reads its flags when it is loaded, and one that it does not know ends the process.
PROGRAM = """
import json, sys
from ddt_jax.scaling import topology
device = topology.devices(topology.parse(sys.argv[1]))[0]
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=SingleDeviceSharding(device))
jax.jit(lambda x: x @ x).lower(x).compile()
print(json.dumps(device.device_kind))
"""
SMALLEST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compiled(chip, flags):
    env = {**os.environ, **topology.ENVIRONMENT, xla_flags.TPU: " ".join(flags)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, SMALLEST[chip]], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("chip", [chip for chip in xla_flags.FLAGS if chips.CHIPS[chip].is_tpu])
def test_the_compiler_takes_all_flags_of_a_chip(chip):
    done = compiled(chip, xla_flags.of(chip))
    assert done.returncode == 0, done.stderr[-2000:]
    assert chips.of_device(json.loads(done.stdout.splitlines()[-1])) == chips.CHIPS[chip]


def test_the_compiler_takes_no_flag_that_it_does_not_know():
    """Or the test above would say nothing."""
    assert compiled("v5e", [*xla_flags.of("v5e"), "--xla_tpu_enable_nothing_of_the_kind=true"]).returncode != 0
