"""Meshes and the rules that lay parameters over them, on 8 fake devices."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError


def test_axes_are_auto_and_minus_one_takes_the_rest():
    mesh = meshes.make_mesh(settings.Mesh(tensor=2))
    assert dict(mesh.shape) == {"replica": 1, "data": 1, "fsdp": 4, "tensor": 2, "context": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    "sizes",
    [
        settings.Mesh(fsdp=3),
        settings.Mesh(data=3),
        settings.Mesh(data=-1),
        settings.Mesh(fsdp=0),
        settings.Mesh(fsdp=16),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(sizes):
    with pytest.raises(UserError) as error:
        meshes.make_mesh(sizes)
    assert "\n" not in str(error.value)


def slices_of_tpus(count, *sides):
    """Devices as a TPU's runtime describes them."""
    common = {"platform": "tpu", "device_kind": "TPU v5", "core_on_chip": 0, "process_index": 0}
    return [
        SimpleNamespace(**common, slice_index=number, coords=tuple(reversed(at)))
        for number in range(count)
        for at in np.ndindex(*reversed(sides))
    ]


def test_slices_are_parts_of_the_replica_axis():
    placed = meshes._placed([4, 1, 4, 1, 1], slices_of_tpus(2, 2, 2, 2))
    assert np.vectorize(lambda d: d.slice_index)(placed[:, 0, :, 0, 0]).tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    with pytest.raises(UserError, match=r"mesh.replica=1 does not divide over 2 slices; set mesh.replica=2"):
        meshes._placed([1, 1, 16, 1, 1], slices_of_tpus(2, 2, 2, 2))


def test_an_axis_may_take_a_part_of_a_side():
    placed = meshes._placed([1, 2, 32, 1, 1], slices_of_tpus(1, 4, 4, 4))
    assert len({d.coords for d in placed.flat}) == 64


def test_rules_split_what_divides_and_report_what_does_not():
    mesh = meshes.make_mesh(settings.Mesh(fsdp=4, tensor=2))
    assert meshes.partition(("embed", "mlp"), (8, 6), mesh) == (PartitionSpec("fsdp", "tensor"), [])
    spec, missed = meshes.partition(("embed", "mlp"), (8, 5), mesh, "w")
    assert spec == PartitionSpec("fsdp", None)
    assert [str(m) for m in missed] == ["w: dimension 1 of 5 is not split over tensor=2"]


def test_two_dimensions_on_one_axis_and_unknown_names_are_errors():
    mesh = meshes.make_mesh(settings.Mesh())
    with pytest.raises(ValueError, match="two dimensions on the mesh axis 'fsdp'"):
        meshes.partition(("embed", "embed"), (8, 8), mesh)
    with pytest.raises(ValueError, match="no rule"):
        meshes.partition(("embd",), (8,), mesh)


def test_batch_must_divide_over_the_batch_axes():
    mesh = meshes.make_mesh(settings.Mesh(data=2, fsdp=2, tensor=2))
    meshes.check_batch(8, mesh, "train.batch_size")
    with pytest.raises(UserError, match="train.batch_size=6 does not divide over 4 devices"):
        meshes.check_batch(6, mesh, "train.batch_size")


@dataclass(frozen=True)
class Device:
    id: int
    process_index: int


def mesh_of(hosts, shape):
    """A mesh whose devices, in order, are of these hosts."""
    devices = [Device(number, int(host)) for number, host in enumerate(hosts)]
    return Mesh(np.array(devices, object).reshape(shape), meshes.AXES)


def over_hosts(of_each, *shape):
    """A mesh whose hosts have so many devices, one host after the other."""
    return mesh_of(np.arange(math.prod(shape)) // of_each, shape)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 8, 1, 1), [[0], [1]]),
        ((1, 1, 2, 2, 2), [[0], [1]]),
        ((1, 1, 1, 8, 1), [[0, 1]]),
        ((1, 2, 1, 1, 8), [[0, 1], [2, 3]]),
        ((2, 1, 2, 2, 4), [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
    ids=str,
)
def test_hosts_that_hold_the_same_rows_read_the_same(shape, groups):
    assert meshes.readers(over_hosts(4, *shape)) == groups


def test_rows_of_a_host_may_lie_apart():
    """As on a torus: hosts are squares of it, and rows of devices go through several of them."""
    hosts = [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert meshes.readers(mesh_of(hosts, (1, 1, 4, 4, 1))) == [[0, 1], [2, 3]]
    assert meshes.readers(mesh_of(hosts, (1, 1, 16, 1, 1))) == [[0], [1], [2], [3]]  # of host 0 parts 0, 1, 4 and 5


def test_hosts_that_share_only_some_of_their_rows_are_refused():
    message = "mesh.tensor=6 x mesh.context=1 hosts share some of their rows and not all of them; .* divide 4, a host's"
    with pytest.raises(UserError, match=message):
        meshes.check_batch(8, over_hosts(4, 1, 1, 2, 6, 1), "train.batch_size")


def test_a_host_knows_its_part_and_who_speaks_for_it(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    found = meshes.reader(over_hosts(4, 1, 2, 1, 8, 1))
    assert found == meshes.Reader(1, 2, (0, 2)) and not found.leads
    assert meshes.reader() == meshes.Reader(3, 4, (0, 1, 2, 3)) and meshes.reader().leads  # no mesh is set


def test_a_flag_is_on_every_device():
    mesh = meshes.make_mesh(settings.Mesh(data=2, fsdp=2, tensor=2))
    placed, shape = meshes.put_flag(True, mesh), meshes.flag_shape(mesh)
    assert placed.sum() == 8 and [s.data.shape for s in placed.addressable_shards] == [(1,)] * 8
    assert (placed.shape, placed.dtype, placed.sharding) == (shape.shape, shape.dtype, shape.sharding)


def test_put_batch_keeps_rows_in_order():
    mesh = meshes.make_mesh(settings.Mesh(data=2, fsdp=4))
    x = jnp.arange(16).reshape(16, 1)
    placed = meshes.put_batch({"x": jax.device_get(x)}, mesh)["x"]
    assert (placed == x).all()
    assert len({str(s.index) for s in placed.addressable_shards}) == 8


@pytest.mark.parametrize(
    "sizes", [settings.Mesh(data=2, fsdp=2, tensor=2), settings.Mesh(fsdp=2, context=4)], ids=["tensor", "context"]
)
def test_a_table_over_a_mesh_gives_the_same_rows_and_gradient(sizes):
    generator = np.random.default_rng(0)
    table, weight = (generator.normal(size=size).astype(np.float32) for size in ((24, 12), (8, 4, 12)))
    ids = generator.integers(0, 24, (8, 4)).astype(np.int32)
    axes = ("vocab", "embed")

    def loss(table, ids):
        x = meshes.constrain_positions(meshes.look_up(table, ids, axes, jnp.float32))
        return jnp.sum(jnp.asarray(weight) * x), x

    (_, expected), expected_gradient = jax.value_and_grad(loss, has_aux=True)(table, ids)
    mesh = meshes.make_mesh(sizes, jax.devices())
    split = NamedSharding(mesh, meshes.partition(axes, table.shape, mesh)[0])
    with jax.set_mesh(mesh):
        run = jax.jit(
            jax.value_and_grad(loss, has_aux=True),
            in_shardings=(split, meshes.batch_sharding(mesh)),
            out_shardings=(None, split),
        )
        (_, x), gradient = run(table, ids)
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6)
