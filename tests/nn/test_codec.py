"""The latent codec inside a tokenizer: frozen, part of `extra`, drawn per example; its weights are asked for."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import config, settings
from ddt_jax.errors import UserError
from ddt_jax.nn import params as declared
from ddt_jax.nn.codec import VAECodec, make_codec
from ddt_jax.tokenizers import base

SIZES = settings.Autoencoder(block_out_channels=(4, 4), layers_per_block=1, latent_channels=2, norm_groups=2)
TINY = settings.VAECodec(preset="custom", sizes=SIZES, random_weights=True)


def test_missing_weights_and_settings_at_odds_are_refused():
    with pytest.raises(UserError, match="model.codec.random_weights=True"):
        make_codec(settings.VAECodec())
    with pytest.raises(UserError, match="leave one of them out"):
        make_codec(settings.VAECodec(weights="a", random_weights=True))
    with pytest.raises(UserError, match="preset='custom'"):
        make_codec(settings.VAECodec(weights="a", sizes=SIZES))
    with pytest.raises(UserError, match="multiples of model.codec.sizes.norm_groups=2"):
        make_codec(replace(TINY, sizes=replace(SIZES, block_out_channels=(4, 3))))


def test_settings_survive_a_round_trip():
    e = settings.Experiment(model=settings.DDTTokenizer(patch_size=4, codec=TINY))
    assert config.from_dict(config.dump(e)) == e


def test_weights_of_a_file_are_nan_until_they_are_read():
    codec = VAECodec(replace(TINY, random_weights=False, weights="vae.safetensors"))
    assert all(np.isnan(x).all() for x in jax.tree.leaves(declared.split(codec.init(jax.random.key(0)))[0]))


class Fixed:
    """An autoencoder whose posterior has mean 1 and standard deviation e."""

    def apply(self, variables, x, method):
        from ddt_jax.nn.autoencoder import Posterior

        return Posterior(jnp.ones((len(x), 2, 2, 2)), jnp.full((len(x), 2, 2, 2), 2.0)) if method == "encode" else x


def test_latents_are_shifted_scaled_and_drawn_per_example():
    codec = VAECodec(TINY)
    codec._network = Fixed()
    images = jnp.zeros((3, 4, 4, 3))
    mode = codec.encode(None, images)
    np.testing.assert_allclose(mode, (1 - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(codec.decode(None, mode), 1, rtol=1e-6)
    keys = base.example_keys(jax.random.key(0), jnp.arange(3))
    drawn = codec.encode(None, images, keys)
    assert len(np.unique(np.asarray(drawn))) == drawn.size
    np.testing.assert_array_equal(codec.encode(None, images[:1], keys[2:]), drawn[2:])
    noise = jax.vmap(lambda key: jax.random.normal(key, (2, 2, 2)))(keys)
    np.testing.assert_allclose(drawn, (1 + np.e * noise - 0.0609) * 1.5305, rtol=1e-5)
    codec._sample = False
    np.testing.assert_array_equal(codec.encode(None, images, keys), mode)


def test_a_tokenizer_on_latents_keeps_its_codec_out_of_the_parameters():
    """Abstractly: shapes through init, loss, state update, encoding and decoding."""
    model = settings.DDTTokenizer(
        num_tokens=2,
        patch_size=2,
        width=4,
        heads=1,
        encoder_depth=1,
        decoder_depth=1,
        mlp_ratio=1,
        quantizer=settings.Quantizer(code_dim=2, codebook_size=4),
        codec=TINY,
    )
    tokenizer = base.make_tokenizer(model, 8, 2)

    def everything():
        rng = jax.random.key(0)
        params, extra = (
            jax.tree.map(lambda b: getattr(b, "value", b), x, is_leaf=declared.is_box) for x in tokenizer.init(rng)
        )
        batch = {"image": jnp.zeros((2, 8, 8, 3), jnp.uint8), "slot": jnp.arange(2)}
        _, _, stats = tokenizer.loss_fn(params, extra, batch, rng)
        after = tokenizer.update_extra(extra, stats, rng)
        codes = tokenizer.encode(params, extra, jnp.zeros((2, 8, 8, 3)))
        return params, extra, after, codes, tokenizer.decode(params, extra, codes, rng, steps=1)

    params, extra, after, codes, images = jax.eval_shape(everything)
    assert params.keys() == {"encoder", "decoder"} and extra.keys() == {"codebook", "codec"}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), extra)
    assert codes.shape == (2, 2) and images.shape == (2, 8, 8, 3)
    assert params["encoder"]["embed"]["kernel"].shape == (2 * 2 * SIZES.latent_channels, 4)
