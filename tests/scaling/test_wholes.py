"""What of large parameters a program holds whole: by hand, layer by layer, at once, and as a sum of gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.nn import blocks, embeddings, mmdit, quantize_l2, spans, unet
from ddt_jax.nn.layers import Dense
from ddt_jax.scaling import program, wholes
from ddt_jax.training.state import shardings_of, unbox

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


@pytest.fixture(scope="module")
def over_both():
    return meshes.make_mesh(settings.Mesh(fsdp=4, tensor=2), jax.devices())


def gradients(mesh, module, *inputs):
    """(work of a module's gradients, its parameters): everything lies where training has it.

    Args:
      inputs: of the module, arrays with examples in front; the sum of its squared output is what is differentiated.
    """
    boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    shardings, _ = shardings_of(boxed, mesh)
    params = jax.tree.map(lambda x, sh: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sh), unbox(boxed), shardings)

    def loss(params, *inputs):
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(module.apply({"params": params}, *inputs)))

    rows = meshes.batch_sharding(mesh)
    step = jax.jit(jax.grad(loss), in_shardings=(shardings, *(rows for _ in inputs)), out_shardings=shardings)
    with jax.set_mesh(mesh):
        text = step.lower(params, *inputs).compile().as_text()
    return program.read(text, mesh.size), params


class Joint(nn.Module):
    """MMDiT blocks over the tokens and patches of some examples, in a loop."""

    @nn.compact
    def __call__(self, tokens_BKD, x_BND, condition_BD):
        make = functools.partial(blocks.JointBlock, 2)
        stack = blocks.Stack(make, depth=3, scan=True, remat="full")
        k, n = tokens_BKD.shape[1], x_BND.shape[1]
        return stack((tokens_BKD, x_BND), condition_BD, condition_BD, spans.full(k + n))


@pytest.mark.slow
def test_layers_of_an_mmdit_are_gathered_one_by_one(over_both):
    x = jnp.zeros((4, 4, WIDTH))
    work, params = gradients(over_both, Joint(), x, x, x[:, 0])
    assert "scanned" in params["Stack_0"] and not work.unknown_loops
    assert wholes.find(work, over_both, params) == []
    assert (
        max(work.collectives[c] for c in work.collectives if c.kind == "all-gather") >= 3 * 2
    )  # forwards, and again backwards


class FromTables(nn.Module):
    """Selftok's encoder: queries begin as a table, whose width lies over `fsdp` as the rows do."""

    @nn.compact
    def __call__(self, x_BND):
        b, n, d = x_BND.shape
        queries_BND = jnp.broadcast_to(embeddings.learned(self, "queries", n, d), x_BND.shape)
        x_BND = Dense((d,), ("patch", "embed"))(x_BND) + embeddings.learned(self, "places", n, d)
        make = functools.partial(mmdit.QueryBlock, 2, 2)
        features_1NF = embeddings.released_sinusoids(mmdit.token_positions(n))[None]
        return blocks.Stack(make, depth=2, scan=True)((x_BND, queries_BND), features_1NF)


def test_no_chip_adds_up_products_of_all_rows():
    """Else each multiplies the part of the width that it has of a table, for the rows of all, and rows travel."""
    mesh, rows = meshes.make_mesh(settings.Mesh(data=1, fsdp=8), jax.devices()), 4096
    work, params = gradients(mesh, FromTables(), jnp.zeros((rows, 16, WIDTH)))
    of_parameters = sum(x.size * 4 for x in jax.tree.leaves(params))
    assert max(c.bytes for c in work.collectives) <= of_parameters < rows * 16 * WIDTH * 4 / 8


@pytest.mark.slow
def test_kernels_of_a_unet_are_gathered_for_a_part_of_their_channels(over_both):
    """Their channels in lie over `fsdp`, those out over `tensor`: no chip puts all of a kernel together."""
    module = unet.ResidualBlock(WIDTH)
    work, params = gradients(over_both, module, jnp.zeros((4, 4, 4, 48)), jnp.zeros((4, 16)))
    assert wholes.find(work, over_both, params) == []
    gathered = {shape for c in work.collectives if c.kind == "all-gather" for shape in c.shapes}
    assert {(3, 3, 48, WIDTH // 2), (3, 3, WIDTH // 2, WIDTH)} <= gathered


def test_a_codebook_that_gradients_move_is_put_together_nowhere(over_both):
    """SEED's: codes lie over `tensor`, images over `fsdp`. A chip looks up its own codes and adds up their gradient."""
    mesh = over_both
    shapes = jax.eval_shape(quantize_l2.Codebook(64, 8).init, jax.random.key(0))["params"]
    over, _ = shardings_of(shapes, mesh)
    vectors = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=over["vectors"])
    z_BKD = jax.ShapeDtypeStruct((8, 4, 8), jnp.float32, sharding=meshes.batch_sharding(mesh))

    def loss(codes_VD, z_BKD):
        quantized, _, loss = quantize_l2.quantize(codes_VD, z_BKD)
        return jnp.sum(loss) + jnp.sum(jnp.sin(quantized))

    step = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(over["vectors"], z_BKD.sharding))
    with jax.set_mesh(mesh):
        text = step.lower(vectors, z_BKD).compile().as_text()
    work = program.read(text, 8)
    assert over["vectors"].spec == P("tensor", None)
    assert wholes.find(work, mesh, {"codebook": {"vectors": vectors}}) == []
    assert max(c.bytes for c in work.collectives) == 64 * 8 * 4 / 2
