"""The TPU's kernel, run by the interpreter, equals dense attention, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.nn import spans
from ddt_jax.nn.attention import attend
from ddt_jax.nn.attention_tpu import _block, attend_splash, fits, planned_share

B, H, G, S, E = 2, 2, 1, 256, 8
DEVICES = jax.devices()
DOCUMENT = np.where(np.arange(S) < np.array([[150], [40]]), 0, np.array([[150], [40]])).astype(np.int32)
IMAGE_END = np.zeros((B, S), np.int32)
IMAGE_END[0, 20:84], IMAGE_END[1, 100:164] = 84, 164


def packed_skip_causal():
    """Two documents, of which the second has two clean blocks in its text and their noised copies behind it."""
    start, end, start2, end2 = np.zeros((4, B, S), np.int32)
    start[:], end[:] = DOCUMENT[1], np.arange(S) + 1
    for block, copy in ((60, 180), (100, 220)):
        end[0, block : block + 32] = block + 32
        end[0, copy : copy + 32] = block
        start2[0, copy : copy + 32], end2[0, copy : copy + 32] = copy, copy + 32
    return spans.Spans(*map(jnp.asarray, (start, end, start2, end2)), reach=31, second=32)


CASES = {
    "packed": spans.causal(S, start=jnp.asarray(DOCUMENT)),
    "images in packed documents": spans.bidirectional(jnp.asarray(IMAGE_END), start=DOCUMENT, longest=64),
    "nothing in one example": spans.key_prefix(jnp.array([130, 0])),
    "skip-causal, known": spans.skip_causal(2, 64),
    "skip-causal in packed documents": packed_skip_causal(),
}


QUICK = "skip-causal in packed documents"


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != QUICK)])
def test_equals_dense_forwards_and_backwards(name):
    rng = np.random.default_rng(0)
    qkv = tuple(rng.normal(size=(B, heads, S, E)).astype(np.float32) for heads in (H, G, G))

    def outcome(attention):
        def loss(*qkv):
            out = attention(*qkv)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)

    visible, cap = CASES[name], 2.0 if name == "packed" else 0.0
    dense = outcome(lambda *qkv: attend(*qkv, visible, soft_cap=cap, method="dense"))
    ours = outcome(lambda q, k, v: attend_splash(q * E**-0.5, k, v, visible, cap, interpret=True))
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_what_the_kernel_cannot_do_is_refused():
    assert fits(256, 256, spans.causal(256)) and not fits(200, 200, spans.causal(200))
    assert not fits(2**15, 2**15, spans.causal(2**15))
    two = spans.Spans(*np.zeros((4, 1, 1), np.int32))
    assert not fits(256, 256, two)
    q = jnp.zeros((1, 1, 200, 8))
    with pytest.raises(ValueError, match="multiples of 128 rows"):
        attend_splash(q, q, q, spans.causal(200), 0.0)


@pytest.mark.parametrize(
    ("rows", "reach", "parts"),
    [(1024, 0, 1), (1024, 255, 1), (2048, 1, 1), (4096, 0, 1), (384, 100, 1), (1024, 0, 4), (4096, 255, 2)],
)
def test_planned_share_is_that_of_tiles_in_which_anything_is_seen(rows, reach, parts):
    high, wide = _block(rows // parts), _block(rows)
    seen = np.arange(rows)[None] <= np.arange(rows)[:, None] + reach
    tiles = seen.reshape(rows // high, high, rows // wide, wide).any((1, 3))
    assert planned_share(rows, rows, reach, parts) == tiles.mean()


def test_a_row_over_several_devices_is_that_of_one():
    """Each has its queries, and plans for them alone: the tiles of the first are fewer than those of the last."""
    rng = np.random.default_rng(0)
    qkv = [rng.normal(size=(B, heads, S, E)).astype(np.float32) for heads in (H, G, G)]
    visible, mesh = CASES["images in packed documents"], meshes.make_mesh(settings.Mesh(fsdp=1, context=2), DEVICES[:2])

    def outcome(attention, *qkv):
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(jnp.sin(attention(*qkv))), argnums=(0, 1, 2)))(*qkv)

    dense = outcome(lambda *qkv: attend(*qkv, visible, method="dense"), *qkv)
    with jax.set_mesh(mesh):
        ours = outcome(lambda q, k, v: attend_splash(q * E**-0.5, k, v, visible, 0.0, interpret=True), *qkv)
        with pytest.raises(ValueError, match="got 64 queries and 128 keys"):
            attend_splash(*(x[:, :, :128] for x in qkv), spans.causal(128), 0.0)
    for got, expected in zip(ours, dense, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)
