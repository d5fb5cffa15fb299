"""What of large parameters a program holds whole: by hand, layer by layer, at once, and as a sum of gradients."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ddt_jax.scaling import program, wholes

P = PartitionSpec
LAYERS, WIDTH = 6, 64


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def found(mesh, local, out, names=("blocks/scanned/up",)):
    """Rows of a step over stacked matrices that are split over fsdp, and a whole one beside them."""
    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    whole = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P()))
    run = jax.shard_map(local, mesh=mesh, in_specs=P(None, "fsdp"), out_specs=out, check_vma=False)
    text = jax.jit(run).lower(w).compile().as_text()
    params = {"other": whole}
    for name in names:
        *folders, last = name.split("/")
        at = params
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = w
    return wholes.find(program.read(text, 8), mesh, params)


def gathered(w):
    return jax.lax.all_gather(w, "fsdp", axis=w.ndim - 2, tiled=True)


def test_layers_that_are_gathered_one_by_one_are_none(mesh):
    def local(w):
        return jax.lax.scan(lambda x, w: (x @ (gathered(w) @ gathered(w).T), None), jnp.ones((8, WIDTH)), w)[0]

    assert found(mesh, local, P("fsdp")) == []


def test_layers_that_are_gathered_at_once_are_found_with_their_bytes(mesh):
    def local(w):
        return gathered(w).transpose(2, 0, 1)

    row = {"kind": "all-gather", "axis": "fsdp", "count": 1, "bytes": LAYERS * WIDTH * 32 * 4}
    assert found(mesh, local, P("data")) == [{"parameters": ["blocks/scanned/up"], **row}]
    # The matrix of a layer that has no others beside it in a stack is gathered when its turn comes.
    assert found(mesh, local, P("data"), ("block_0/up",)) == []
    both = found(mesh, local, P("data"), ("block_0/up", "head"))
    assert both == [{"parameters": ["head"], **row}]


def test_a_gradient_that_is_added_up_whole_is_found(mesh):
    def local(w):
        return jax.lax.psum(gathered(w).transpose(2, 0, 1) * jax.lax.axis_index("data"), ("data", "fsdp"))

    kinds = {row["kind"]: row["axis"] for row in found(mesh, local, P())}
    assert kinds == {"all-gather": "fsdp", "all-reduce": "data+fsdp"}
