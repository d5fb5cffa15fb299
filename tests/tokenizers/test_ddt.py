"""The DDT tokenizer in the quickstart's and in the published form, at a size that compiles in a moment."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import blocks
from ddt_jax.nn import params as declared
from ddt_jax.tokenizers import base, ddt

B, SIZE, K = 4, 8, 4
QUICK = settings.DDTTokenizer(
    num_tokens=K,
    patch_size=4,
    width=16,
    heads=2,
    encoder_depth=1,
    decoder_depth=2,
    mlp_ratio=1,
    quantizer=settings.Quantizer(code_dim=4, codebook_size=16),
    flow=settings.Flow(solver_steps=3),
)
PUBLISHED = replace(
    QUICK,
    coupling="joint",
    mix=False,
    qk_norm=False,
    quantizer=settings.Quantizer(code_dim=4, codebook_size=16, normalize_input="none", commitment=0.25),
    schedule=settings.Schedule(kind="piecewise", direction="selftok", breakpoints=(200, 1000), tokens=(3, 1)),
    flow=settings.Flow(prediction="velocity", time="uniform", shift=1.0, condition_drop=0.1, solver_steps=3),
)
FORMS = {"quickstart": QUICK, "published": PUBLISHED}


def make_batch(seed=0, rows=B):
    image = np.random.default_rng(seed).integers(0, 256, (rows, SIZE, SIZE, 3), dtype=np.uint8)
    return {"image": image, "slot": np.arange(rows, dtype=np.int32)}


@functools.cache
def build(config):
    """(tokenizer, params, extra);
    the parameters are random, away from the zeros of adaLN-zero and of the last layer.
    """
    tokenizer = base.make_tokenizer(config, SIZE, B)
    params = declared.split(jax.eval_shape(tokenizer.init, jax.random.key(0))[0])[0]
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), params)
    return tokenizer, params, {"codebook": tokenizer.quantizer.init(jax.random.key(0))}


def sample(tokenizer, params, extra, codes, **static):
    return jax.jit(lambda codes: tokenizer.decode(params, extra, codes, jax.random.key(3), **static))(codes)


@pytest.fixture(scope="module", params=FORMS)
def built(request):
    return build(FORMS[request.param])


@functools.cache
def compiled_loss(config):
    return jax.jit(build(config)[0].loss_fn)


def loss_of(tokenizer):
    def loss(params, extra, batch, rng):
        sums, counts, stats = tokenizer.loss_fn(params, extra, batch, rng)
        return sum(w * sums[n] / counts[n] for n, w in tokenizer.loss_weights.items()), (sums, counts, stats)

    return loss


def test_patches_are_in_raster_order_and_come_back():
    x = jnp.arange(2 * 8 * 8 * 3.0).reshape(2, 8, 8, 3)
    patches = ddt.patchify(x, 4)
    np.testing.assert_array_equal(patches[1, 1], x[1, :4, 4:].reshape(-1))
    np.testing.assert_array_equal(ddt.unpatchify(patches, 4, 8), x)


def test_gradients_reach_every_parameter(built):
    tokenizer, params, extra = built
    gradients = jax.jit(jax.grad(loss_of(tokenizer), has_aux=True))(params, extra, make_batch(), jax.random.key(1))[0]
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


def test_published_form_accumulates_and_batch_norm_says_that_it_cannot():
    tokenizer, params, extra = build(PUBLISHED)
    assert tokenizer.cross_example_terms == ()
    assert build(QUICK)[0].cross_example_terms == ("encoder batch norm",)
    batch, rng = make_batch(), jax.random.key(5)
    loss = compiled_loss(PUBLISHED)
    order = np.array([2, 0, 3, 1])
    parts = [loss(params, extra, {n: x[rows] for n, x in batch.items()}, rng) for rows in (order[:2], order[2:])]
    whole = loss(params, extra, batch, rng)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-5, atol=1e-5), *parts, whole)


def test_diversity_is_part_of_the_loss_and_says_that_it_cannot_accumulate():
    quantizer = replace(PUBLISHED.quantizer, diversity=1.0, entropy_groups=2, entropy_ramp=(0.9, 1.1))
    config = replace(PUBLISHED, quantizer=quantizer)
    tokenizer, params, extra = build(config)
    assert tokenizer.cross_example_terms == ("code entropy",)
    extra = {"codebook": extra["codebook"] | {"initialized": jnp.bool_(True)}}

    def diversity(params):
        sums, counts, _ = tokenizer.loss_fn(params, extra, make_batch(), jax.random.key(1))
        terms = {n: sums[n] / counts[n] for n in tokenizer.loss_weights}
        assert set(terms) == {"flow", "commitment", "diversity"}
        return terms["diversity"]

    value, gradient = jax.jit(jax.value_and_grad(diversity))(params)
    assert np.log(16) / 4 < -float(value) <= np.log(16) / 2 + 1e-6
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient["encoder"])) > 1e-6
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient["decoder"])) == 0


def test_a_perfect_decoder_has_no_loss_and_the_target_is_the_one_configured():
    tokenizer, (_, params, extra) = base.make_tokenizer(QUICK, SIZE, B), build(QUICK)
    batch = make_batch()
    x0 = ddt.patchify(base.to_float(jnp.asarray(batch["image"])), 4)
    tokenizer._network = Stub(tokenizer, lambda x, t: x0)
    sums, counts, _ = tokenizer.loss_fn(params, extra, batch, jax.random.key(1))
    assert float(sums["flow"]) == 0 and float(counts["flow"]) == B
    velocity = base.make_tokenizer(replace(QUICK, flow=PUBLISHED.flow), SIZE, B)
    velocity._network = Stub(velocity, lambda x, t: (x - x0) / t[:, None, None])
    sums, _, _ = velocity.loss_fn(params, extra, batch, jax.random.key(1))
    assert float(sums["flow"]) < 1e-6


class Stub:
    """A network whose decoder is a given function of the noised patches and the time."""

    def __init__(self, tokenizer, decode):
        self.config, self.decode = tokenizer.config, decode

    def apply(self, variables, *args, method):
        if method == "encode":
            c = self.config
            return jax.random.normal(jax.random.key(0), (args[0].shape[0], c.num_tokens, c.quantizer.code_dim))
        return self.decode(args[0], args[1])


def test_hidden_codes_have_exactly_no_effect(built):
    tokenizer, params, _ = built
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B, 4, 48)), jnp.float32)
    codes = jnp.asarray(rng.normal(size=(B, K, 4)), jnp.float32)
    start, end = jnp.zeros((B,), jnp.int32), jnp.array([1, 2, 3, 4])
    hidden = np.arange(K) >= np.asarray(end)[:, None]
    predict = jax.jit(lambda codes: tokenizer._apply(params, "predict", x, jnp.full((B,), 0.5), codes, start, end))
    plain = predict(codes)
    np.testing.assert_array_equal(plain, predict(jnp.where(hidden[..., None], jnp.nan, codes)))
    assert np.abs(predict(codes.at[:, 0].add(1.0)) - plain).max(axis=(1, 2)).min() > 1e-4


def test_truncation_is_traced_and_all_tokens_is_the_full_decode(built):
    tokenizer, params, extra = built
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (B, K)), jnp.int32)
    compiled = 0

    @jax.jit
    def decode(codes, num_visible):
        nonlocal compiled
        compiled += 1
        return tokenizer.decode(params, extra, codes, jax.random.key(3), num_visible=num_visible)

    whole = sample(tokenizer, params, extra, codes)
    assert whole.shape == (B, SIZE, SIZE, 3)
    np.testing.assert_allclose(decode(codes, jnp.full((B,), K, jnp.int32)), whole, atol=1e-5)
    mixed = decode(codes, jnp.array([1, 2, K, K], jnp.int32))
    assert compiled == 1
    np.testing.assert_allclose(mixed[2:], whole[2:], atol=1e-5)
    # The coarsest tokens are the first ones, or the last ones in Selftok's order.
    coarse_first = tokenizer.config.schedule.direction == "coarse_first"
    order = np.arange(K) if coarse_first else np.arange(K)[::-1]
    hidden = jnp.asarray(order[1:])
    np.testing.assert_array_equal(decode(codes.at[:, hidden].add(1) % 16, jnp.full((B,), 1, jnp.int32))[0], mixed[0])
    assert np.abs(decode((codes.at[:, order[0]].add(1)) % 16, jnp.full((B,), 1, jnp.int32))[0] - mixed[0]).max() > 1e-5


def test_an_image_decodes_the_same_in_any_batch(built):
    tokenizer, params, extra = built
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (B, K)), jnp.int32)
    whole = sample(tokenizer, params, extra, codes)
    np.testing.assert_allclose(sample(tokenizer, params, extra, codes[:2]), whole[:2], atol=1e-5)


def test_guidance_of_one_is_no_guidance_and_more_of_it_moves_the_image():
    tokenizer, params, extra = build(PUBLISHED)
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (B, K)), jnp.int32)
    plain = sample(tokenizer, params, extra, codes)
    nearly = sample(tokenizer, params, extra, codes, guidance=1 + 1e-6)
    np.testing.assert_allclose(nearly, plain, atol=1e-4)
    strong = sample(tokenizer, params, extra, codes, guidance=4.0)
    assert np.abs(strong - plain).max() > 1e-3


def test_condition_drop_hides_the_codes_of_some_examples():
    always = replace(QUICK, flow=replace(QUICK.flow, condition_drop=1.0))
    _, params, extra = build(QUICK)
    other = params | {"encoder": jax.tree.map(lambda x: -x[::-1], params["encoder"])}

    def flow(config, params):
        return float(compiled_loss(config)(params, extra, make_batch(), jax.random.key(1))[0]["flow"])

    assert flow(always, params) == flow(always, other)
    assert flow(QUICK, params) != flow(QUICK, other)


@pytest.mark.parametrize("form", FORMS)
def test_scanned_layers_predict_the_same(form):
    config = replace(FORMS[form], decoder_depth=3)
    tokenizer, params, _ = build(config)
    tight = base.make_tokenizer(replace(config, scan_layers=True), SIZE, B)
    rng = np.random.default_rng(0)
    x, codes = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, 4, 48), (B, K, 4)))

    def predict(tokenizer, params):
        z = tokenizer._apply(params, "encode", x)
        args = (x, jnp.full((B,), 0.5), codes + z, jnp.zeros((B,), jnp.int32), jnp.full((B,), 2, jnp.int32))
        return tokenizer._apply(params, "predict", *args)

    loose = jax.jit(functools.partial(predict, tokenizer))(params)
    np.testing.assert_allclose(jax.jit(functools.partial(predict, tight))(blocks.scanned(params)), loose, atol=2e-4)
    own = declared.split(jax.eval_shape(tight.init, jax.random.key(0))[0])[0]
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, blocks.scanned(params))


def test_encoding_looks_at_each_image_alone(built):
    tokenizer, params, extra = built
    images = base.to_float(jnp.asarray(make_batch()["image"]))
    encode = jax.jit(tokenizer.encode)
    codes = encode(params, extra, images)
    assert codes.shape == (B, K) and codes.dtype == jnp.int32
    np.testing.assert_array_equal(encode(params, extra, images[1:2]), codes[1:2])


def test_heun_and_bfloat16_run():
    config = replace(QUICK, dtype="bfloat16", flow=replace(QUICK.flow, solver="heun"))
    tokenizer, params, extra = build(config)
    args = (params, extra, make_batch(), jax.random.key(1))
    value = compiled_loss(config)(*args)[0]["flow"]
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(float(compiled_loss(QUICK)(*args)[0]["flow"]), rel=0.1)
    image = sample(tokenizer, params, extra, jnp.zeros((1, K), jnp.int32))
    assert image.dtype == jnp.float32 and np.isfinite(image).all()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="patch_size: 3"):
        base.make_tokenizer(replace(QUICK, patch_size=3), SIZE, B)
    with pytest.raises(UserError, match="heads: 3"):
        base.make_tokenizer(replace(QUICK, heads=3), SIZE, B)
