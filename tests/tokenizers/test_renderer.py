"""The second stage: one run of the network per image, and codes that stand as they are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import params as declared
from ddt_jax.tokenizers import base, ddt
from tests.tokenizers import test_selftok_networks as selftok
from tests.tokenizers.test_ddt import PUBLISHED, QUICK, SIZE, B, K, Stub, build, loss_of, make_batch
from tests.tokenizers.test_ddt_sampling import multiplications

PIXELS = settings.ImageLoss(
    lpips_weight=0,
    lpips_weight_late=0,
    adversarial_weight_late=0,
    discriminator=settings.Discriminator(width=4, layers=1, norm_groups=4),
)
JUDGED = replace(PIXELS, adversarial_weight=0.5, adversarial_weight_late=0.5)
SECOND = {"decoder": settings.Renderer(), "stage": "decoder", "image_loss": PIXELS}
RENDERER = replace(QUICK, **SECOND)
BACKWARD = replace(PUBLISHED, **SECOND)  # joint blocks, and the last token is the coarsest
SELFTOK = replace(selftok.RENDERER, stage="decoder", image_loss=PIXELS)
LATENT = replace(
    RENDERER,
    patch_size=2,
    codec=settings.VAECodec(
        preset="custom",
        sizes=settings.Autoencoder(
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_groups=4, scaling_factor=1.0
        ),
        random_weights=True,
    ),
)
CODES = np.random.default_rng(0).integers(0, 16, (B, K)).astype(np.int32)


def form(name):
    return selftok.tokenizer_of(SELFTOK) if name == "selftok" else build({"cross": RENDERER, "joint": BACKWARD}[name])


@pytest.fixture(scope="module", params=["cross", "joint", pytest.param("selftok", marks=pytest.mark.slow)])
def renderer(request):
    return form(request.param)


def rows(codes, tokenizer):
    return jnp.asarray(np.resize(codes, (B, tokenizer.num_tokens)))


def test_decoding_is_one_run_of_the_network_and_nothing_else(renderer):
    tokenizer, params, extra = renderer
    codes = rows(CODES, tokenizer)
    none = jnp.zeros((B,), jnp.int32)
    patches = ddt.patchify(jnp.zeros((B, *tokenizer._latent_shape)), tokenizer.config.patch_size)
    args = (patches, jnp.ones((B,)), tokenizer.quantizer.lookup(extra["codebook"], codes), none, none + codes.shape[1])
    key = jax.random.key(0)
    whole = jax.make_jaxpr(lambda codes, key: tokenizer.decode(params, extra, codes, key))(codes, key)
    one = jax.make_jaxpr(lambda *args: tokenizer._apply(params, "predict", *args))(*args)
    assert multiplications(whole.jaxpr) == multiplications(one.jaxpr)
    assert not [eqn for eqn in whole.jaxpr.eqns if "random" in eqn.primitive.name], "nothing is drawn"
    image = jax.jit(lambda codes, key: tokenizer.decode(params, extra, codes, key))(codes, key)
    np.testing.assert_allclose(image, jnp.clip(by_hand(tokenizer, params, extra, codes), -1, 1), atol=1e-5)


def test_the_canvas_stands_in_for_patches_and_the_time_is_one():
    tokenizer, params, extra = build(RENDERER)
    assert "embed" not in params["decoder"] and params["decoder"]["canvas"].shape == (4, 16)
    seen = {}

    class Recorder(Stub):
        def apply(self, variables, *args, method):
            seen.update(t=args[1], start=args[3], end=args[4])
            return args[0]

    tokenizer = base.make_tokenizer(RENDERER, SIZE, B)
    tokenizer._network = Recorder(tokenizer, None)
    tokenizer.decode(params, extra, CODES, jax.random.key(0), num_visible=np.int32(2))
    assert (seen["t"] == 1).all() and (seen["start"] == 0).all() and (seen["end"] == 2).all()
    repeat = replace(RENDERER, decoder=settings.Renderer(repeat=True))
    assert build(repeat)[1]["decoder"]["canvas"].shape == (1, 16)


def test_a_prefix_hides_all_but_the_coarsest_tokens(renderer):
    tokenizer, params, extra = renderer
    codes = rows(CODES, tokenizer)
    k = codes.shape[1]
    decode = jax.jit(lambda codes, shown: tokenizer.decode(params, extra, codes, jax.random.key(0), num_visible=shown))
    shown = jnp.array([1, 2] * (B // 2))
    order = np.arange(k) if tokenizer.config.schedule.direction == "coarse_first" else np.arange(k)[::-1]
    image = decode(codes, shown)
    others = codes.at[:, order[2:].copy()].add(3) % 16
    np.testing.assert_array_equal(decode(others, shown), image)
    others = codes.at[:, order[1]].add(3) % 16
    np.testing.assert_array_equal(decode(others, shown)[::2], image[::2])
    assert np.abs(decode(others, shown) - image)[1::2].max(axis=(1, 2, 3)).min() > 1e-4


@pytest.mark.slow
def test_codes_stand_and_all_of_the_decoder_learns(renderer):
    tokenizer, params, extra = renderer
    assert set(tokenizer.loss_weights) == {"pixel"} and tokenizer.cross_example_terms == ()
    batch, key = make_batch(rows=B), jax.random.key(1)
    value_and_grad = jax.jit(jax.value_and_grad(loss_of(tokenizer), has_aux=True))
    (_, (sums, _, stats)), gradients = value_and_grad(params, extra, batch, key)
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stands = name.startswith(("encoder", "code_norm")) or declared_group(tokenizer)[name] == "frozen"
        assert np.isfinite(g).all() and (np.abs(g).max() == 0) == stands, name
    for name, group in declared_group(tokenizer).items():
        assert name.split("/")[0] not in ("encoder", "code_norm") or group == "frozen", name
    after = tokenizer.update_extra(extra, stats, key)
    assert jax.tree.structure(after) == jax.tree.structure(extra)
    jax.tree.map(np.testing.assert_array_equal, after, extra)
    assert float(sums["pixel"]) > 0 and tokenizer.extra_metrics(extra) == {}


def declared_group(tokenizer):
    _, declarations = declared.split(jax.eval_shape(tokenizer.init, jax.random.key(0))[0])
    leaves = jax.tree_util.tree_leaves_with_path(declarations)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): d.group for path, d in leaves}


def test_nothing_is_differentiated_through_the_encoder():
    tokenizer, params, extra = build(RENDERER)
    batch, key = make_batch(), jax.random.key(1)
    images = base.to_float(jnp.asarray(batch["image"]))
    codes = jnp.zeros((B, K), jnp.int32)

    def rendered(params):
        vectors = tokenizer.quantizer.lookup(extra["codebook"], codes)
        return tokenizer.image_loss.terms(params, extra, tokenizer._render(params, extra, vectors, K), images)[0][
            "pixel"
        ]

    count = lambda f, *args: multiplications(jax.make_jaxpr(f)(*args).jaxpr)  # noqa: E731
    step = count(jax.grad(lambda p: loss_of(tokenizer)(p, extra, batch, key)[0]), params)
    parts = count(jax.grad(rendered), params), count(lambda p: tokenizer.encode(p, extra, images), params)
    assert step == sum(parts) and min(parts) > 0


def by_hand(tokenizer, params, extra, codes):
    """Images of all tokens, not clipped."""
    n = (tokenizer._latent_size // tokenizer.config.patch_size) ** 2
    blank = jnp.zeros((B, n, tokenizer.config.patch_size**2 * tokenizer.codec.channels))
    start, end = jnp.zeros((B,), jnp.int32), jnp.full((B,), codes.shape[1])
    vectors = tokenizer.quantizer.lookup(extra["codebook"], codes)
    x0 = tokenizer._apply(params, "predict", blank, jnp.ones((B,)), vectors, start, end)
    latents = ddt.unpatchify(x0, tokenizer.config.patch_size, tokenizer._latent_size)
    return tokenizer.codec.decode(extra.get("codec"), latents)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_the_loss_is_in_pixels_and_of_the_codes_that_encode_gives(space):
    tokenizer, params, extra = build(RENDERER) if space == "pixels" else latent()
    batch = make_batch()
    images = base.to_float(jnp.asarray(batch["image"]))
    sums, counts, _ = jax.jit(tokenizer.loss_fn)(params, extra, batch, jax.random.key(1))

    @jax.jit
    def wanted(params, extra):
        return jnp.mean(jnp.square(by_hand(tokenizer, params, extra, tokenizer.encode(params, extra, images)) - images))

    np.testing.assert_allclose(sums["pixel"] / counts["pixel"], wanted(params, extra), rtol=1e-4)


def latent():
    tokenizer = base.make_tokenizer(LATENT, SIZE, B)
    boxed, extra = tokenizer.init(jax.random.key(0))
    return tokenizer, declared.split(boxed)[0], {**extra, "codec": declared.split(extra["codec"])[0]}


def test_random_prefixes_are_drawn_for_their_share_of_the_examples_alone():
    counts = {}

    def shown(share):
        config = replace(RENDERER, decoder=settings.Renderer(random_prefixes=share))
        tokenizer, (_, params, extra) = base.make_tokenizer(config, SIZE, 512), build(RENDERER)

        class Recorder(Stub):
            def apply(self, variables, *args, method):
                if method == "predict":
                    counts[share] = np.asarray(args[4])
                    return args[0]
                return super().apply(variables, *args, method=method)

        tokenizer._network = Recorder(tokenizer, None)
        tokenizer.loss_fn(params, extra, make_batch(rows=512), jax.random.key(2))
        return counts[share]

    assert (shown(0.0) == K).all()
    found = np.bincount(shown(1.0), minlength=K + 1)
    assert found[0] == 0 and (found[1:] > 512 / K * 0.7).all()
    # Half of them draw, and a draw of all tokens can't be told from none.
    assert 0.5 - 0.08 < np.mean(shown(0.5) < K) / (1 - 1 / K) < 0.5 + 0.08


def test_a_discriminator_joins_the_decoder_and_neither_moves_the_codes():
    tokenizer, params, extra = build(replace(RENDERER, image_loss=JUDGED))
    assert set(tokenizer.loss_weights) == {"pixel", "adversarial", "discriminator"}
    gradients = jax.jit(jax.grad(loss_of(tokenizer), has_aux=True))(params, extra, make_batch(), jax.random.key(1))[0]
    largest = {name: max(np.abs(g).max() for g in jax.tree.leaves(tree)) for name, tree in gradients.items()}
    assert largest["encoder"] == 0 and largest["decoder"] > 0 and largest["discriminator"] > 0


def test_what_only_a_flow_can_do_is_refused():
    tokenizer, params, extra = build(RENDERER)
    for extras in ({"steps": 8}, {"guidance": 2.0}, {"stop_after": 2}):
        with pytest.raises(UserError, match="a renderer has one step"):
            tokenizer.decode(params, extra, CODES, jax.random.key(0), **extras)


def test_a_flow_decoder_can_be_trained_on_codes_that_stand():
    tokenizer, params, extra = build(replace(QUICK, stage="decoder"))
    gradients = jax.jit(jax.grad(loss_of(tokenizer), has_aux=True))(params, extra, make_batch(), jax.random.key(1))[0]
    largest = {name: max(np.abs(g).max() for g in jax.tree.leaves(tree)) for name, tree in gradients.items()}
    assert largest["encoder"] == 0 and largest["decoder"] > 0
