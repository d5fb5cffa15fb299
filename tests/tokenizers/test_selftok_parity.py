"""The published networks against PyTorch: outputs and every gradient, and that what is near but wrong does not agree.

Everything in fp32. The largest difference is held against the largest entry of the tensor: 1e-5, about a hundred units
in the last place of sums over some hundred terms. What is measured is 1e-6 to 3e-6.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.nn import params as declared
from ddt_jax.tokenizers import ddt, selftok_networks
from tests.tokenizers import selftok_reference as reference

pytestmark = pytest.mark.slow

B, K, CHANNELS, CODE_DIM = 3, 64, 16, 16
SQUARE, WIDE = (8, 8), (8, 12)
ENCODER = settings.SelftokEncoder(depth=2, image_width=32, image_heads=2, width=64, heads=4, position_grid=8)
DECODER = settings.SelftokDecoder(depth=2, width=128, heads=4, position_grid=10)
TINY = settings.SelftokTokenizer(num_tokens=K, scan_layers=False, encoder=ENCODER, decoder=DECODER)
RENDERER = replace(TINY, decoder=settings.SelftokRenderer(depth=2, width=128, heads=4, position_grid=10))
TIMES = (0.0, 0.3, 1.0)


@functools.cache
def build(config, size=SQUARE):
    """(network, parameters): as initialised where it is a fixed table, else random, adaLN and biases too."""
    grid = size[0] // 2, size[1] // 2
    network = selftok_networks.Network(config, grid)
    example = jnp.zeros((1, grid[0] * grid[1], 4 * CHANNELS))
    shapes, _ = declared.split(jax.eval_shape(network.init, jax.random.key(0), example)["params"])
    rng = np.random.default_rng(5)

    def draw(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("bias"):
            return rng.normal(0, 0.1, shape)
        if name.endswith("scale"):
            return rng.normal(1, 0.1, shape)
        if not name.endswith("kernel"):
            return rng.normal(0, 0.5, shape)
        # A kernel [read, written...], but the one that merges heads reads two dimensions.
        read = shape[0] * (shape[1] if "merge" in name else 1)
        return rng.normal(0, read**-0.5, shape)

    drawn = jax.tree_util.tree_map_with_path(lambda path, s: draw(path, s.shape).astype(np.float32), shapes)
    tables = selftok_networks.embeddings.sincos_2d(config.encoder.position_grid, config.encoder.image_width)
    drawn["encoder"]["positions"] = tables
    drawn["decoder"]["token_positions"] = selftok_networks.embeddings.sincos_1d(1000 + 8 * np.arange(K), 128)
    return network, drawn


def test_tables_that_are_fixed_start_as_the_formulas_that_are_compared():
    network = selftok_networks.Network(replace(TINY, scan_layers=True), (4, 4))
    initial = declared.split(jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 16, 4 * CHANNELS)))["params"])[0]
    expected = build(TINY)[1]
    np.testing.assert_array_equal(initial["encoder"]["positions"], expected["encoder"]["positions"])
    np.testing.assert_array_equal(initial["decoder"]["token_positions"], expected["decoder"]["token_positions"])


def case(size=SQUARE, seed=0):
    """Latents [B, H, W, C], times, unit codes and how many of them are visible: one, half, all."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(B, *size, CHANNELS)).astype(np.float32)
    codes = rng.normal(size=(B, K, CODE_DIM))
    codes = (codes / np.linalg.norm(codes, axis=-1, keepdims=True)).astype(np.float32)
    return z, np.asarray(TIMES, np.float32), codes, np.array([1, K // 2, K], np.int32)


@functools.cache
def compiled(config, size, method):
    network = build(config, size)[0]

    def run(values, z_BHWC, *rest):
        return network.apply({"params": values}, ddt.patchify(z_BHWC, 2), *rest, method=method)

    return jax.jit(run)


def ours_encoder(config, z, values=None):
    size = z.shape[1:3]
    return compiled(config, size, "encode")(build(config, size)[1] if values is None else values, z)


def ours_decoder(config, z, t, codes, end, values=None):
    size = z.shape[1:3]
    values = build(config, size)[1] if values is None else values
    scaled = codes * np.float32(CODE_DIM**0.5)  # what the quantiser gives
    out = compiled(config, size, "predict")(values, z, t, scaled, np.zeros_like(end), end)
    return ddt.unpatchify(out, 2, size[0])


class Reference:
    """The reference with our parameters, on and from NumPy."""

    def __init__(self, torch, config, size=SQUARE):
        self.torch, self.config = torch, config
        torch.set_num_threads(1)
        values = reference.published_names(build(config, size)[1])
        self.w = {name: torch.tensor(np.ascontiguousarray(v), requires_grad=True) for name, v in values.items()}

    def encode(self, z, **options):
        e = self.config.encoder
        sizes = {"depth": e.depth, "image_heads": e.image_heads, "heads": e.heads, "side": e.position_grid}
        return reference.encoder(self.torch, self.w, self.image(z), **sizes, **options)

    def decode(self, z, t, codes, end, **options):
        d = self.config.decoder
        t, codes, end = (x if self.torch.is_tensor(x) else self.torch.tensor(x) for x in (t, codes, end))
        sizes = {"depth": d.depth, "heads": d.heads, "see_xt": d.context_see_xt}
        sizes["renderer"] = isinstance(d, settings.SelftokRenderer)
        return reference.decoder(self.torch, self.w, self.image(z), t, codes, end, **sizes, **options)

    def image(self, z):
        return self.torch.tensor(z).permute(0, 3, 1, 2)


def distance(ours, theirs, image=False):
    """Largest difference, relative to the largest entry."""
    theirs = theirs.detach().numpy()
    if image:
        theirs = theirs.transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.fixture
def measured(record_property):
    """Asserts that distances stay below 1e-5, and keeps them in the report."""

    def check(name, value):
        record_property(name, value)
        print(f"{name}: {value:.1e}")
        assert value < 1e-5, name

    return check


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
def test_encoder_agrees(oracle, measured, size):
    theirs, z = Reference(oracle("torch"), TINY, size), case(size)[0]
    measured("encoder", distance(ours_encoder(TINY, z), theirs.encode(z)))


def forms():
    for see_xt in (True, False):
        yield pytest.param(replace(TINY, decoder=replace(DECODER, context_see_xt=see_xt)), id=f"mmdit-{see_xt}")
    for repeat in (True, False):
        form = replace(RENDERER, decoder=replace(RENDERER.decoder, repeat=repeat))
        yield pytest.param(form, id=f"renderer-{repeat}")


def every_pair():
    """Each time with each number of visible tokens."""
    z, t, codes, end = case()
    for shift in range(3):
        yield z, t, codes, np.roll(end, shift)


@pytest.mark.parametrize("form", list(forms()))
def test_decoder_agrees_at_every_time_with_any_number_of_tokens(oracle, measured, form):
    theirs = Reference(oracle("torch"), form)
    for args in every_pair():
        if isinstance(form.decoder, settings.SelftokRenderer):
            args = (*args[:3], np.full(B, K, np.int32))
        measured("decoder", distance(ours_decoder(form, *args), theirs.decode(*args), image=True))


def test_decoder_agrees_on_an_image_that_is_not_square(oracle, measured):
    theirs, args = Reference(oracle("torch"), TINY, WIDE), case(WIDE)
    measured("decoder", distance(ours_decoder(TINY, *args), theirs.decode(*args), image=True))


@pytest.mark.parametrize("form", list(forms()))
def test_every_gradient_agrees(oracle, measured, form):
    """Of a function of encoder and decoder together, so that the decoder's gradient goes through the codes as well."""
    torch = oracle("torch")
    theirs, (z, t, _, end) = Reference(torch, form), case()
    if isinstance(form.decoder, settings.SelftokRenderer):
        end = np.full(B, K, np.int32)
    network, values = build(form)
    target = np.random.default_rng(3).normal(size=z.shape).astype(np.float32)

    def loss(values):
        patches = ddt.patchify(z, 2)
        codes = network.apply({"params": values}, patches, method="encode") * CODE_DIM**0.5
        out = network.apply({"params": values}, patches, t, codes, np.zeros_like(end), end, method="predict")
        return jnp.sum(jnp.square(out - ddt.patchify(target, 2)))

    value, gradients = jax.jit(jax.value_and_grad(loss))(values)
    their_loss = ((theirs.decode(z, t, theirs.encode(z), end) - theirs.image(target)) ** 2).sum()
    their_loss.backward()
    assert float(value) == pytest.approx(float(their_loss.detach()), rel=1e-5)
    worst = 0.0
    for name, ours in reference.published_names(jax.tree.map(np.asarray, gradients)).items():
        grad = theirs.w[name].grad
        if name == "model.pos_embed":
            assert np.abs(ours).max() == 0  # a fixed table
        elif grad is None:
            assert np.abs(ours).max() == 0, name
        else:
            error = distance(ours, grad)
            assert error < 1e-5, (name, error)
            worst = max(worst, error)
    measured("worst gradient", worst)
    never = {name for name, w in theirs.w.items() if w.grad is None}
    image_side = {f"encoder.blocks.1.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    idle = image_side | {f"model.joint_blocks.1.context_block.t_embedder.mlp.{i}" for i in (0, 2)}
    assert never == {f"{name}.{kind}" for name in idle for kind in ("weight", "bias")}


def fails_parity(ours, theirs, image=False):
    assert distance(ours, theirs, image) > 1e-3


@pytest.mark.parametrize("see_xt", [True, False])
def test_an_exclusive_mask_does_not_agree(oracle, see_xt):
    form = replace(TINY, decoder=replace(DECODER, context_see_xt=see_xt))
    z, t, codes, _ = case()
    end = np.array([2, K // 2, K], np.int32)
    theirs = Reference(oracle("torch"), form).decode(z, t, codes, end - 1).detach().numpy().transpose(0, 2, 3, 1)
    ours = np.asarray(ours_decoder(form, z, t, codes, end))
    # Each example by itself: one token of 2, of 32 and of 64.
    assert (np.abs(ours - theirs).max(axis=(1, 2, 3)) > 1e-4 * np.abs(theirs).max()).all()


def test_tokens_in_reversed_order_do_not_agree(oracle):
    torch = oracle("torch")
    z, t, codes, end = case()
    theirs = Reference(torch, TINY)
    end = np.full_like(end, K)  # all are visible: only the order differs
    fails_parity(ours_decoder(TINY, z, t, codes, end), theirs.decode(z, t, codes[:, ::-1].copy(), end), image=True)
    backwards = reference.positions(torch, K).flip(0)
    fails_parity(ours_encoder(TINY, z), theirs.encode(z, position=backwards))


def test_positions_from_zero_do_not_agree(oracle):
    torch = oracle("torch")
    z, t, codes, end = case()
    theirs = Reference(torch, TINY)
    fails_parity(ours_encoder(TINY, z), theirs.encode(z, position=torch.arange(K)))
    got = theirs.decode(z, t, codes, end, position=torch.arange(K))
    fails_parity(ours_decoder(TINY, z, t, codes, end), got, image=True)


def test_context_that_sees_patches_differs_from_one_that_does_not(oracle):
    """Otherwise the parity of both settings would say nothing."""
    z, t, codes, end = case()
    blind = replace(TINY, decoder=replace(DECODER, context_see_xt=False))
    fails_parity(ours_decoder(blind, z, t, codes, end), Reference(oracle("torch"), TINY).decode(z, t, codes, end), True)
