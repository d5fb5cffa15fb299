"""Steps that are done twice, on other devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.training.recheck import Recheck
from ddt_jax.training.tokenizer_step import compile_step


def step(state, batch):
    wrong = jnp.sin(batch["x"].astype(jnp.float32))
    return {"w": state["w"] * 0.9 + wrong.mean(0)}, {"loss": wrong.sum()}


@pytest.mark.parametrize("count", [1, 8])
def test_a_step_on_the_next_devices_gives_the_same_bits_and_leaves_its_inputs_alone(count):
    mesh = meshes.make_mesh(settings.Mesh(), jax.devices()[:count])
    shardings = {"w": NamedSharding(mesh, PartitionSpec("fsdp"))}
    state = jax.device_put({"w": jnp.linspace(0, 1, 16)}, shardings)
    batch = meshes.put_batch({"x": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)}, mesh)
    recheck = Recheck(step, shardings, mesh)
    moved = recheck._move(state["w"])
    assert [s.device for s in moved.addressable_shards] == [*jax.devices()[1:count], jax.devices()[0]]
    np.testing.assert_array_equal(moved, state["w"])

    again = recheck.begin(state, batch)
    with jax.set_mesh(mesh):
        result = compile_step(step, shardings, mesh)(state, batch)  # its inputs are still there
    recheck.end(5, again, result)
    wrong = jnp.nextafter(result[0]["w"], jnp.inf)
    with pytest.raises(UserError, match=r"step 5 gives other bits .* in 1 of 2 arrays \(first: 0/w\)"):
        recheck.end(5, again, ({"w": wrong}, result[1]))
