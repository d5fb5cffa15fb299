"""The spatial tokenizer: a code for each place, in raster order, and what a prefix of them decodes to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import autoencoder
from ddt_jax.nn import params as declared
from ddt_jax.tokenizers.spatial import SpatialTokenizer

CONFIG = settings.SpatialTokenizer(
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_groups=4,
    quantizer=settings.Quantizer(code_dim=4, codebook_size=16, normalize_input="none"),
    image_loss=settings.ImageLoss(lpips_weight=0.0, lpips_weight_late=0.0, adversarial_weight_late=0.0),
)

SIZES = settings.Autoencoder(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_groups=4)


@pytest.fixture(scope="module")
def made():
    tokenizer = SpatialTokenizer(CONFIG, 8, 4)
    boxed, extra = tokenizer.init(jax.random.key(0))
    params, _ = declared.split(boxed)
    return tokenizer, params, extra


def test_sizes_follow_from_the_image(made):
    tokenizer, params, extra = made
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    codes = tokenizer.encode(params, extra, images)
    assert tokenizer.num_tokens == 16 and codes.shape == (2, 16) and codes.dtype == jnp.int32
    assert tokenizer.decode(params, extra, codes, jax.random.key(0)).shape == images.shape
    with pytest.raises(UserError, match="image_size=9 is not a multiple of 2"):
        SpatialTokenizer(CONFIG, 9, 4)


def test_tokens_are_places_in_raster_order(made):
    tokenizer, params, extra = made
    images = jax.random.normal(jax.random.key(1), (1, 8, 8, 3))
    book = np.asarray(extra["codebook"]["codes"])
    features = autoencoder.Encoder(SIZES, moments=1).apply({"params": params["encoder"]}, images)
    codes = np.asarray(tokenizer.encode(params, extra, images))
    grid = np.zeros((1, 4, 4, 4), np.float32)
    for row in range(4):
        for column in range(4):
            code = codes[0, 4 * row + column]
            assert code == np.argmax(book @ np.asarray(features)[0, row, column])
            grid[0, row, column] = 2 * book[code]  # times the root of the 4 dimensions
    assert len(np.unique(codes)) > 1
    decoded = autoencoder.Decoder(SIZES).apply({"params": params["decoder"]}, grid)
    np.testing.assert_allclose(tokenizer.decode(params, extra, codes, None), np.clip(decoded, -1, 1), atol=1e-5)


def test_what_a_hidden_token_says_has_no_effect(made):
    tokenizer, params, extra = made
    a, b = jnp.zeros((2, 16), jnp.int32), jnp.full((2, 16), 7, jnp.int32)
    mixed = jnp.where(jnp.arange(16) < 5, a, b)
    show = lambda codes, k: tokenizer.decode(params, extra, codes, None, num_visible=k)  # noqa: E731
    np.testing.assert_array_equal(show(a, jnp.int32(5)), show(mixed, jnp.int32(5)))
    assert not np.array_equal(show(a, 6), show(mixed, 6))
    np.testing.assert_array_equal(show(mixed, 16), tokenizer.decode(params, extra, mixed, None))
    both = show(mixed, jnp.array([5, 16]))
    np.testing.assert_allclose(both[0], show(mixed, 5)[0], atol=1e-6)
    np.testing.assert_allclose(both[1], show(mixed, 16)[1], atol=1e-6)


def test_hidden_places_hold_the_mean_of_used_codes(made):
    tokenizer, params, extra = made
    counts = np.zeros(16, np.float32)
    counts[[2, 3]] = 1, 3
    codebook = extra["codebook"] | {"count": jnp.asarray(counts)}
    codes = np.asarray(extra["codebook"]["codes"])
    expected = 2 * (codes[2] + 3 * codes[3]) / 4  # times the root of the 4 dimensions
    np.testing.assert_allclose(tokenizer._mean_code(codebook), expected, rtol=1e-5)


def test_the_loss_reaches_encoder_decoder_and_codebook(made):
    tokenizer, params, extra = made
    images = jax.random.randint(jax.random.key(1), (4, 8, 8, 3), 0, 255).astype(jnp.uint8)
    batch = {"image": images, "slot": jnp.arange(4)}

    def loss(params):
        sums, counts, stats = tokenizer.loss_fn(params, extra, batch, jax.random.key(2))
        return sum(w * sums[n] / counts[n] for n, w in tokenizer.loss_weights.items()), stats

    grads, stats = jax.jit(jax.grad(loss, has_aux=True))(params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if "key/bias" not in jax.tree_util.keystr(path, simple=True, separator="/"):  # moves no softmax
            assert jnp.abs(g).max() > 0, path
    assert stats["codebook"]["count"].sum() == 64
    after = tokenizer.update_extra(extra, stats, None)
    assert after["codebook"]["initialized"] and not extra["codebook"]["initialized"]
