"""The splash kernel compiles for a TPU, over a mesh, with gradients: one interval per row and two; rows in parts."""

import pytest

from tests.tpu.test_compile import chips  # noqa: F401 - a fixture

pytestmark = pytest.mark.tpu_compile


@pytest.mark.parametrize(
    "kind",
    ["images in packed documents", "images in packed documents, over context", "skip-causal in packed documents"],
)
def test_splash_attention_compiles_with_gradients(chips, kind):  # noqa: F811
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from ddt_jax import mesh as meshes
    from ddt_jax import settings
    from ddt_jax.nn import spans
    from ddt_jax.nn.attention import attend

    b, s = 4, 2048
    over = "context" if kind.endswith("context") else "tensor"
    mesh = meshes.make_mesh(settings.Mesh(fsdp=2, **{over: 2}), chips)
    by_head = NamedSharding(mesh, PartitionSpec(meshes.BATCH, "tensor", "context"))
    by_row = NamedSharding(mesh, PartitionSpec(meshes.BATCH))
    q, k = (jax.ShapeDtypeStruct((b, h, s, 128), jnp.bfloat16, sharding=by_head) for h in (8, 2))
    row = jax.ShapeDtypeStruct((b, s), jnp.int32, sharding=by_row)

    def loss(q, k, v, start, end, start2, end2):
        if kind.startswith("images"):
            visible = spans.bidirectional(end, start=start, longest=256)
        else:
            visible = spans.Spans(start, end, start2, end2, reach=255, second=256)
        return jnp.sum(attend(q, k, v, visible, method="splash").astype(jnp.float32))

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k, *[row] * 4).compile()
    assert "tpu_custom_call" in compiled.as_text()
    if over == "context":  # a device has half of the queries, and all keys
        kernels = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
        assert any("bf16[2,8,1024,128]" in line and "bf16[2,2,2048,128]" in line for line in kernels)
    assert compiled.memory_analysis().temp_size_in_bytes < b * 8 * s * s / 4  # less than bits of all pairs, per chip
