"""Operations are counted as written, loops and gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ddt_jax.scaling import flops


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_a_product_of_matrices_and_its_gradients():
    x, w = shape(3, 5), shape(5, 7)
    once = 2 * 3 * 5 * 7
    assert flops.count(jnp.matmul, x, w) == once
    assert flops.count(jax.grad(lambda x, w: jnp.sum(jnp.matmul(x, w) ** 2), argnums=(0, 1)), x, w) == 3 * once


def test_what_is_computed_again_counts_again():
    def loss(w, x):
        h = jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w) @ w))(w, x)
        return jnp.sum(h**2)

    x, w, once = shape(3, 5), shape(5, 5), 2 * 3 * 5 * 5
    plain = flops.count(lambda w, x: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w) ** 2), w, x)
    assert plain == 2 * once
    # Four products of gradients, less that for x; the first product again and, for its sine, the second.
    assert flops.count(jax.grad(loss), w, x) == (2 + 2 + 3) * once


def test_a_loop_counts_as_often_as_it_turns():
    w = shape(5, 5)

    def scanned(w):
        return jax.lax.scan(lambda x, _: (x @ w, None), w, length=6)[0]

    def turned(w):
        return jax.lax.fori_loop(0, 6, lambda _, x: x @ w, w)

    assert flops.count(scanned, w) == flops.count(turned, w) == 6 * 2 * 5**3


def test_the_dearest_branch_counts():
    w = shape(5, 5)
    branches = lambda w: jax.lax.cond(w[0, 0] > 0, lambda w: w @ w @ w, lambda w: w @ w, w)  # noqa: E731
    assert flops.count(branches, w) == 2 * 2 * 5**3


def test_what_no_result_needs_does_not_count():
    w = shape(5, 5)

    @jax.jit
    def run(w):
        turned, _ = jax.lax.scan(lambda x, _: (x @ w, x @ w @ w), w, length=3)
        return turned, (w @ w).shape[0]

    assert flops.count(run, w) == 3 * 2 * 5**3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_and_its_gradients(stride, groups):
    x, w = shape(2, 8, 8, 4), shape(3, 3, 4 // groups, 6)

    def run(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=dims, feature_group_count=groups
        )

    once = 2 * 2 * (8 // stride) ** 2 * 6 * 9 * 4 // groups
    assert flops.count(run, x, w) == once
    both = flops.count(jax.grad(lambda x, w: jnp.sum(run(x, w) ** 2), argnums=(0, 1)), x, w)
    assert both == pytest.approx(3 * once, rel=1e-6)


def test_every_device_of_a_mesh_counts():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    run = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert flops.count(run, shape(16, 5), shape(5, 7)) == 2 * 16 * 5 * 7


def test_agrees_with_the_compiler_where_nothing_loops():
    def network(x, w, v):
        return jnp.sum(jax.nn.softmax(jnp.tanh(x @ w) @ v))

    arrays = [np.ones(dims, np.float32) for dims in ((64, 256), (256, 256), (256, 128))]
    theirs = jax.jit(network).lower(*arrays).compile().cost_analysis()["flops"]
    assert flops.count(network, *arrays) == pytest.approx(theirs, rel=0.05)
