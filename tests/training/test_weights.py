"""Weights without a run: into scanned and unrolled trees, whole or cut over a mesh; what does not fit is named."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
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
