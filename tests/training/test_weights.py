"""Weights without a run: into scanned and unrolled trees, whole or cut over a mesh; what does not fit is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.io import weights_folder
from ddt_jax.nn import blocks
from ddt_jax.training import weights

UNROLLED = {
    "head": np.arange(8, dtype=np.float32),
    "blocks": {f"block_{i}": {"w": np.arange(8, dtype=np.float32).reshape(2, 4) + 10 * i} for i in range(12)},
}
SCANNED = jax.tree.map(np.asarray, blocks.scanned(UNROLLED))


def abstract(tree, spec=None):
    mesh = meshes.make_mesh(settings.Mesh(fsdp=8))
    sharding = lambda x: None if spec is None else NamedSharding(mesh, PartitionSpec(*(None,) * (x.ndim - 1), spec))  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), tree)


@pytest.mark.parametrize("source", [UNROLLED, SCANNED], ids=["from unrolled", "from scanned"])
@pytest.mark.parametrize("target", [UNROLLED, SCANNED], ids=["to unrolled", "to scanned"])
def test_layouts_convert_on_the_way(tmp_path, source, target):
    weights.save(tmp_path, weights.unrolled_arrays(source), {"kind": "test"}, file_bytes=100)
    arrays, config = weights.load(tmp_path)
    assert config == {"kind": "test"} and "blocks/block_11/w" in arrays
    jax.tree.map(np.testing.assert_array_equal, weights.restore(arrays, abstract(target)), target)


def test_a_device_gets_its_part():
    tree = {"blocks": {"scanned": {"block": {"w": np.arange(48, dtype=np.float32).reshape(3, 2, 8)}}}}
    placed = weights.restore(weights.unrolled_arrays(tree), abstract(tree, "fsdp"))
    leaf = placed["blocks"]["scanned"]["block"]["w"]
    assert {s.data.shape for s in leaf.addressable_shards} == {(3, 2, 1)}
    np.testing.assert_array_equal(leaf, tree["blocks"]["scanned"]["block"]["w"])


@pytest.mark.parametrize("spec", ["fsdp", None])
def test_an_array_is_looked_at_once_for_all_devices(spec):
    """Where it lies on an object store, each look reads it."""
    looks, layers = [], {f"blocks/block_{i}/w": np.arange(16, dtype=np.float32).reshape(2, 8) + i for i in range(3)}
    arrays = {
        name: weights_folder.Lazy(x.shape, x.dtype, lambda x=x, name=name: looks.append(name) or x)
        for name, x in (layers | {"head": np.arange(8, dtype=np.float32)}).items()
    }
    mesh = meshes.make_mesh(settings.Mesh(fsdp=8))
    cut = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    stack = jax.ShapeDtypeStruct((3, 2, 8), jnp.bfloat16, sharding=cut(None, None, spec))
    head = jax.ShapeDtypeStruct((8,), np.float32, sharding=cut(spec))
    found = weights.restore(arrays, {"blocks": {"scanned": {"block": {"w": stack}}}, "head": head})
    assert sorted(looks) == sorted(arrays)
    placed = found["blocks"]["scanned"]["block"]["w"]
    assert placed.dtype == jnp.bfloat16 and placed.sharding == stack.sharding
    np.testing.assert_array_equal(placed, np.stack([*layers.values()]))
    np.testing.assert_array_equal(found["head"], np.arange(8))


def test_what_does_not_fit_is_named_in_one_line():
    arrays = weights.unrolled_arrays(UNROLLED)
    arrays["extra"] = arrays.pop("head")
    arrays["blocks/block_3/w"] = np.zeros((2, 5), np.float32)
    with pytest.raises(UserError) as error:
        weights.restore(arrays, abstract(SCANNED))
    text = str(error.value)
    assert "\n" not in text and "3 of 13 arrays" in text
    assert "extra has no place" in text and "head is missing" in text
    assert "blocks/block_3/w is 2 x 5, not 2 x 4" in text
