"""The tokenizer that other tests train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.nn import params as declared
from ddt_jax.tokenizers import base

B, SIZE = 8, 8


@pytest.fixture(scope="module")
def tokenizer():
    config = settings.LinearTokenizer(width=16, quantizer=settings.Quantizer(codebook_size=16, normalize_input="none"))
    return base.make_tokenizer(config, SIZE, B)


def make_batch(seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (B, SIZE, SIZE, 3), dtype=np.uint8)
    return {"image": image, "slot": np.arange(B, dtype=np.int32)}


def total(tokenizer, sums, counts):
    return sum(w * sums[name] / counts[name] for name, w in tokenizer.loss_weights.items())


def test_loss_falls_and_the_codebook_moves(tokenizer):
    params, extra = tokenizer.init(jax.random.key(0))
    params, _ = declared.split(params)

    @jax.jit
    def step(params, extra, rng):
        def loss(params):
            sums, counts, stats = tokenizer.loss_fn(params, extra, make_batch(), rng)
            return total(tokenizer, sums, counts), stats

        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        return params, tokenizer.update_extra(extra, stats, rng), value

    values, first = [], extra
    for i in range(30):
        params, extra, value = step(params, extra, jax.random.key(i))
        values.append(float(value))
    assert values[-1] < 0.8 * values[1]
    assert not np.allclose(first["codebook"]["codes"], extra["codebook"]["codes"])
    assert 1 < float(tokenizer.extra_metrics(extra)["codebook_perplexity"]) <= 16.01


def test_two_micro_batches_add_up_to_the_whole(tokenizer):
    params, extra = tokenizer.init(jax.random.key(0))
    params, _ = declared.split(params)
    batch, rng = make_batch(), jax.random.key(5)
    whole = tokenizer.loss_fn(params, extra, batch, rng)
    parts = [
        tokenizer.loss_fn(params, extra, jax.tree.map(lambda x, s=s: x[s], batch), rng) for s in (slice(3), slice(3, B))
    ]
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a + b, c, rtol=1e-5, atol=1e-5), *parts, whole)


def test_codes_and_images_have_the_promised_shapes(tokenizer):
    params, extra = tokenizer.init(jax.random.key(0))
    params, _ = declared.split(params)
    codes = tokenizer.encode(params, extra, base.to_float(jnp.asarray(make_batch()["image"])))
    assert codes.shape == (B, tokenizer.num_tokens) and codes.dtype == jnp.int32
    images = tokenizer.decode(params, extra, codes, jax.random.key(0))
    assert images.shape == (B, SIZE, SIZE, 3) and np.abs(images).max() <= 1
    truncated = tokenizer.decode(params, extra, codes, jax.random.key(0), num_visible=jnp.int32(1))
    other = tokenizer.decode(params, extra, codes.at[:, 1:].set(0), jax.random.key(0), num_visible=jnp.full((B,), 1))
    np.testing.assert_array_equal(truncated, other)
    all_visible = tokenizer.decode(params, extra, codes, jax.random.key(0), num_visible=jnp.int32(tokenizer.num_tokens))
    np.testing.assert_array_equal(all_visible, images)


def test_eight_bit_images_survive_the_way_to_floats_and_back():
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(base.to_uint8(base.to_float(jnp.asarray(image))), image)
    np.testing.assert_array_equal(base.to_uint8(jnp.array([-3.0, 3.0])), [0, 255])
