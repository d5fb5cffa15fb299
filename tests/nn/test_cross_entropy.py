"""Cross-entropy in chunks equals the naive one in value and gradient, in less memory, and moves the head once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.nn.cross_entropy import cross_entropy

B, R, D, V = 8, 8, 16, 48


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    h, head = rng.normal(size=(B, R, D)), rng.normal(size=(V, D))
    weights = rng.integers(0, 3, (B, R)) / 2
    return h.astype(dtype), head.astype(dtype), rng.integers(0, V, (B, R)).astype(np.int32), weights.astype(np.float32)


def naive(h, head, targets, weights, z_loss=0.0, soft_cap=0.0):
    logits = (h @ head.T).astype(jnp.float32)
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    log_total = jax.nn.logsumexp(logits, axis=-1)
    nll = log_total - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * log_total**2)), nll


def chunked(*args, chunk=6, **options):  # 6 divides neither all rows nor those of a device
    total, rows = cross_entropy(*args, chunk=chunk, **options)
    return total, rows.nll


OPTIONS = [{}, {"z_loss": 0.1}, {"soft_cap": 2.0}, {"z_loss": 0.1, "soft_cap": 2.0}]


def assert_same(ours, expected):
    for got, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("options", OPTIONS)
def test_equals_naive_in_value_and_gradient(options):
    def outcome(loss):
        # The cotangent is not 1, as where a step divides by its counts.
        scaled = lambda *args: tuple(0.37 * x for x in loss(*args, **options))  # noqa: E731
        return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))(*inputs())

    assert_same(outcome(chunked), outcome(naive))
    assert_same(jax.jit(lambda *args: chunked(*args, **options))(*inputs()), naive(*inputs(), **options))


@pytest.mark.parametrize(("rows", "vocabulary", "held"), [(5_000, 900, 4_660), (5_000, 40_000, 256), (40, 900, 40)])
def test_a_chunk_of_no_given_size_holds_four_million_logits_or_256_rows(rows, vocabulary, held):
    shapes = ((1, rows, 2), np.float32), ((vocabulary, 2), np.float32), ((1, rows), np.int32), ((1, rows), np.float32)
    text = str(jax.make_jaxpr(cross_entropy)(*(jax.ShapeDtypeStruct(*x) for x in shapes)))
    assert f"f32[{held},{vocabulary}]" in text


def test_rows_of_no_weight_count_for_nothing():
    h, head, targets, weights = inputs()
    gradient = jax.jit(jax.grad(lambda h, w: chunked(h, w, targets, weights)[0], (0, 1)))
    before, after = gradient(h, head), gradient(np.where(weights[..., None] == 0, 50 * h, h), head)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_row_is_right_where_no_other_id_is_more_likely():
    h, head, targets, weights = inputs()
    best = np.argmax(h @ head.T, axis=-1).astype(np.int32)
    mixed = np.where(weights > 0, best, (best + 1) % V)
    _, rows = cross_entropy(h, head, mixed, weights, chunk=6)
    np.testing.assert_array_equal(rows.right, weights > 0)


def test_big_logits_do_not_overflow():
    h, head, targets, weights = inputs()
    assert np.isfinite(jax.grad(lambda h: chunked(h, head, targets, weights)[0])(1e4 * h)).all()


def test_loss_is_fp32_and_gradients_have_the_type_of_their_arrays():
    h, head, targets, weights = inputs(jnp.bfloat16)
    head = head.astype(np.float32)
    (total, _), gradients = jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True)(h, head, targets, weights)
    assert (total.dtype, *(g.dtype for g in gradients)) == (np.float32, jnp.bfloat16, np.float32)


def sharded(sizes, loss, shape=(B, R, D, V)):
    """The compiled gradient of a loss on a mesh of 8 devices, and its arguments' shardings."""
    mesh = meshes.make_mesh(sizes)
    b, r, d, v = shape
    head = NamedSharding(mesh, meshes.partition(("vocab", "embed"), (v, d), mesh)[0])
    rows = meshes.batch_sharding(mesh)
    kinds = ((b, r, d), jnp.float32, rows), ((v, d), jnp.float32, head), ((b, r), jnp.int32, rows)
    args = [jax.ShapeDtypeStruct(s, t, sharding=p) for s, t, p in (*kinds, ((b, r), jnp.float32, rows))]
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        return jax.jit(gradient, out_shardings=((whole, rows), (rows, head))).lower(*args).compile(), args


MESHES = {
    "fsdp": settings.Mesh(fsdp=8),
    "fsdp and tensor": settings.Mesh(fsdp=4, tensor=2),
    "data, fsdp and tensor": settings.Mesh(data=2, fsdp=2, tensor=2),
    "tensor": settings.Mesh(fsdp=1, tensor=8),
    "context": settings.Mesh(fsdp=2, context=4),
}


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES.keys())
def test_the_same_on_every_mesh(sizes):
    compiled, args = sharded(sizes, lambda *args: chunked(*args, z_loss=0.1, soft_cap=2.0))
    placed = [jax.device_put(x, like.sharding) for x, like in zip(inputs(), args, strict=True)]
    expected = jax.value_and_grad(naive, argnums=(0, 1), has_aux=True)(*inputs(), z_loss=0.1, soft_cap=2.0)
    assert_same(compiled(*placed), expected)


def test_odd_batches_rows_and_vocabularies_that_a_mesh_does_not_divide_still_work():
    h, head, targets, weights = inputs()
    with jax.set_mesh(meshes.make_mesh(settings.Mesh(fsdp=2, context=4))):
        odd = (h[:, :5], head, targets[:, :5], weights[:, :5])
        assert_same(jax.jit(chunked)(*odd), naive(*odd))
    odd = (h[:3], head[:47], np.minimum(targets[:3], 46), weights[:3])
    with jax.set_mesh(meshes.make_mesh(settings.Mesh(fsdp=4, tensor=2))):
        assert_same(jax.jit(chunked)(*odd), naive(*odd))
        odd = (h, head[:47], np.minimum(targets, 46), weights)
        assert_same(jax.jit(chunked)(*odd), naive(*odd))


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(program):
    """(kind, elements of the result, whether inside a loop) of each collective in a compiled program's text."""
    bodies, name = {}, None
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) (?:\(.*)?.*\{$", line):
            name, bodies[header.group(1)] = header.group(1), []
        elif name:
            bodies[name].append(line)
    inside = {
        n for lines in bodies.values() for line in lines for n in re.findall(r"(?:body|condition)=%?([\w.-]+)", line)
    }
    pending = list(inside)
    while pending:  # what a loop's body calls is inside it too
        for line in bodies[pending.pop()]:
            called = set(re.findall(r"%([\w.-]+)", line)) & bodies.keys() - inside
            inside |= called
            pending += called
    found = []
    for computation, lines in bodies.items():
        for line in lines:
            if match := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line):
                shapes = re.findall(r"\w+\[([\d,]*)\]", match.group(1))
                sizes = [int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes]
                found.append((match.group(2), max(sizes), computation in inside))
    return found


def count_of(found, kind, inside, at_least):
    return sum(f[0] == kind and f[2] == inside and f[1] >= at_least for f in found)


@pytest.mark.parametrize("name", ["fsdp", "fsdp and tensor", "data, fsdp and tensor"])
def test_the_head_is_gathered_once_and_its_gradient_scattered_once(name):
    sizes = MESHES[name]
    found = collectives(sharded(sizes, chunked, (B, 64, D, V))[0].as_text())
    head = V * D // sizes.tensor
    assert count_of(found, "all-gather", False, head) == 1
    assert count_of(found, "reduce-scatter", False, 1) == 1
    # Per chunk, the tensor axis exchanges the largest logit, sum and target of each row: nothing else.
    assert all(kind == "all-reduce" and size <= 2 * 6 for kind, size, inside in found if inside)
    assert any(inside for *_, inside in found) == (sizes.tensor > 1)


def test_left_to_the_compiler_the_loop_would_hold_collectives():
    """The count above can tell."""

    def loss(h, head, targets, weights):
        def one(total, row):
            return total + naive(*row[:1], head, *row[1:])[0], None

        rows = [jnp.moveaxis(x, 1, 0) for x in (h, targets, weights)]
        return jax.lax.scan(one, jnp.float32(0), tuple(rows))[0], targets

    found = collectives(sharded(settings.Mesh(fsdp=8), loss, (B, 64, D, V))[0].as_text())
    assert sum(size >= V * D // 8 for _, size, inside in found if inside) >= 1


@pytest.mark.slow
def test_temporary_memory_at_full_size_is_an_eighth():
    """4,096 tokens and 193k ids, compiled and not run; without the head's own gradient."""
    n, d, v = 4096, 64, 193_000
    args = [jax.ShapeDtypeStruct(s, t) for s, t in (((1, n, d), jnp.float32), ((v, d), jnp.float32))]
    args += [jax.ShapeDtypeStruct((1, n), t) for t in (jnp.int32, jnp.float32)]

    def temporary(loss):
        gradient = jax.jit(jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1)))
        return gradient.lower(*args).compile().memory_analysis().temp_size_in_bytes

    ours = temporary(lambda *args: cross_entropy(*args)) - 4 * v * d
    assert ours <= temporary(naive) / 8
