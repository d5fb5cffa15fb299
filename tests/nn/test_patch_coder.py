"""Coders between latents and rows: shapes, sizes as published, and that an image stays by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import params as declared
from ddt_jax.nn.patch_coder import make_coder

LINEAR, UNET = settings.LinearCoder(), settings.UNetCoder(width=16, blocks=1)


def latents(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def abstract(coder, side=8):
    """Shapes of the parameters, in their boxes."""
    x = jnp.zeros((1, 1, side, side, coder.channels))
    return jax.eval_shape(lambda: coder.init(jax.random.key(0), x, jnp.zeros((1, 1))))["params"]


def make(config, patch, channels=3, width=10):
    """A coder and random parameters, none of them zero, so that nothing is hidden by what starts at zero."""
    coder = make_coder(config, patch, channels, width)
    rng = np.random.default_rng(1)
    shapes = declared.split(abstract(coder))[0]
    fill = lambda x: rng.normal(size=x.shape, scale=x.shape[-2] ** -0.5 if x.ndim > 1 else 0.3)  # noqa: E731
    return coder, {"params": jax.tree.map(lambda x: fill(x).astype(np.float32), shapes)}


def encode(coder, variables):
    return jax.jit(lambda x, t: coder.apply(variables, x, t, method="encode"))


def decode(coder, variables):
    return jax.jit(lambda rows, way: coder.apply(variables, rows, way, (8, 8), method="decode"))


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("config", [LINEAR, UNET], ids=["linear", "unet"])
def test_an_image_becomes_rows_and_an_image_again(config, patch):
    coder, variables = make(config, patch)
    x, t = jax.ShapeDtypeStruct((2, 3, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    rows, way = jax.eval_shape(encode(coder, variables), x, t)
    assert rows.shape == (2, 3, (8 // patch) ** 2, 10)
    out = jax.eval_shape(decode(coder, variables), rows, way)
    assert out.shape == x.shape and out.dtype == jnp.float32


def test_rows_that_know_their_places_add_a_vector_of_each():
    coder = make_coder(settings.LinearCoder(places=True), 2, 3, 10, rows=16)
    plain, variables = make(LINEAR, 2)
    table = np.arange(160, dtype=np.float32).reshape(16, 10)
    variables = {"params": variables["params"] | {"places": table}}
    x, t = latents((2, 3, 8, 8, 3)), jnp.full((2, 3), 0.5)
    rows, bare = encode(coder, variables)(x, t)[0], encode(plain, variables)(x, t)[0]
    np.testing.assert_allclose(rows - bare, np.broadcast_to(table, (2, 3, 16, 10)), atol=1e-4)
    values, at = latents((2, 4, 12)), np.array([[3, 1, 0, 15], [2, 2, 2, 2]])
    some = coder.apply(variables, values, t[0, :2], at, method="read")
    bare = plain.apply(variables, values, t[0, :2], method="read")
    np.testing.assert_allclose(some - bare, table[at], atol=1e-4)


@pytest.mark.parametrize("config", [LINEAR, UNET], ids=["linear", "unet"])
def test_rows_and_outputs_are_of_one_image_and_know_its_noise_level(config):
    coder, variables = make(config, 2)
    x, t = latents((2, 3, 8, 8, 3)), jnp.full((2, 3), 0.5)

    @jax.jit
    def run(x, t):
        rows, way = coder.apply(variables, x, t, method="encode")
        return rows, coder.apply(variables, jnp.tanh(rows), way, (8, 8), method="decode")

    before = run(x, t)
    for after in (run(x.at[1, 2].add(1.0), t), run(x, t.at[1, 2].set(0.25))):
        for a, b in zip(before, after, strict=True):
            changed = np.asarray(jnp.any(a != b, axis=tuple(range(2, a.ndim))))
            np.testing.assert_array_equal(changed, [[0, 0, 0], [0, 0, 1]])


def test_linear_rows_are_the_map_of_their_window_plus_the_vector_of_the_noise_level():
    """By hand: sinusoids 256 → D → SiLU → D, and one linear map of the window (row, column, channel)."""
    coder, variables = make(LINEAR, 2)
    p = jax.tree.map(np.asarray, variables["params"])
    x, t = latents((1, 1, 8, 8, 3)), 0.3
    angle = 1000 * t * np.exp(-np.log(10_000) * np.arange(128) / 128)
    h = np.concatenate([np.cos(angle), np.sin(angle)]) @ p["time"]["up"]["kernel"] + p["time"]["up"]["bias"]
    time = (h / (1 + np.exp(-h))) @ p["time"]["down"]["kernel"] + p["time"]["down"]["bias"]
    window = np.asarray(x)[0, 0, 2:4, 4:6].reshape(-1)  # second row of patches, third column
    rows, way = encode(coder, variables)(x, jnp.full((1, 1), t))
    expected = window @ p["into"]["kernel"] + p["into"]["bias"] + time
    np.testing.assert_allclose(rows[0, 0, 1 * 4 + 2], expected, rtol=1e-3, atol=1e-4)
    out = decode(coder, variables)(rows, way)
    values = expected @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(out[0, 0, 2:4, 4:6].reshape(-1), values, rtol=1e-3, atol=1e-3)


def test_the_way_down_reaches_the_way_up_past_the_rows():
    coder, variables = make(UNET, 4)
    x, t = latents((1, 1, 8, 8, 3)), jnp.full((1, 1), 0.5)
    down, up = encode(coder, variables), decode(coder, variables)
    rows, way = down(x, t)
    assert np.abs(up(rows, way) - up(rows, down(x + 1, t)[1])).max() > 1e-3


@pytest.mark.parametrize("config", [LINEAR, UNET], ids=["linear", "unet"])
def test_a_fresh_coder_puts_out_zero(config):
    coder = make_coder(config, 2, 3, 10)
    x, t = latents((1, 2, 8, 8, 3)), jnp.full((1, 2), 0.5)

    @jax.jit
    def fresh():
        return coder.apply({"params": declared.split(coder.init(jax.random.key(0), x, t)["params"])[0]}, x, t)

    np.testing.assert_array_equal(fresh(), jnp.zeros_like(x))


def test_a_block_that_is_computed_again_gives_the_same_gradient():
    coder, variables = make(UNET, 1)
    again = make_coder(settings.UNetCoder(width=16, blocks=1, remat=True), 1, 3, 10)
    x, t = latents((1, 1, 8, 8, 3)), jnp.full((1, 1), 0.5)
    grads = [jax.jit(jax.grad(lambda v, c=c: jnp.sum(c.apply(v, x, t) ** 2)))(variables) for c in (coder, again)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), *grads)


@pytest.mark.parametrize("config", [LINEAR, UNET], ids=["linear", "unet"])
def test_every_parameter_is_declared_and_lies_on_a_mesh(config):
    coder = make_coder(config, 2, 8, 64)
    values, declarations = declared.split(abstract(coder))
    mesh = meshes.make_mesh(settings.Mesh(fsdp=4, tensor=2), jax.devices()[:8])
    is_declaration = lambda x: isinstance(x, declared.Declaration)  # noqa: E731
    pairs = zip(jax.tree.leaves(values), jax.tree.leaves(declarations, is_leaf=is_declaration), strict=True)
    matrices = 0
    for value, declaration in pairs:
        spec, _ = meshes.partition(declaration.axes, value.shape, mesh)
        if value.ndim > 1:
            matrices += 1
            assert any(spec), (value.shape, declaration.axes)
    assert matrices >= 4


def count(config, patch, width):
    return sum(x.size for x in jax.tree.leaves(abstract(make_coder(config, patch, 8, width), side=32)))


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_unet_has_the_published_size_at_every_published_patch(patch):
    """0.27 B (§3) at the 0.76 B model; without a level to reduce by (patch 1, not published) it has 0.2 B."""
    assert count(settings.UNetCoder(), patch, 1536) == pytest.approx(0.27e9, rel=0.06)


@pytest.mark.parametrize(
    ("config", "patch", "message"),
    [
        (settings.UNetCoder(), 3, "patch_size=3 is no power of 2"),
        (settings.UNetCoder(width=20), 8, "coder.width=20 must be a multiple of model.image.patch_size=8"),
        (settings.UNetCoder(blocks=0), 2, "coder.blocks=0 at least 1"),
    ],
)
def test_sizes_that_cannot_work_are_one_line(config, patch, message):
    with pytest.raises(UserError, match=message) as error:
        make_coder(config, patch, 3, 8)
    assert "\n" not in str(error.value)
