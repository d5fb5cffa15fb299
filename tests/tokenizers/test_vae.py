"""The autoencoder as a model to train: its KL, its draws, and that both halves learn."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import params as declared
from ddt_jax.nn.autoencoder import Posterior, kl_divergence
from ddt_jax.tokenizers.base import to_float
from ddt_jax.tokenizers.vae import VAE

CONFIG = settings.VAE(
    sizes=settings.Autoencoder(block_out_channels=(8,), layers_per_block=1, latent_channels=2, norm_groups=4),
    kl_weight=0.1,
    image_loss=settings.ImageLoss(
        pixel="l1",
        lpips_weight=0.0,
        lpips_weight_late=0.0,
        discriminator=settings.Discriminator(width=8, layers=2, norm_groups=4),
    ),
)


@pytest.fixture(scope="module")
def made():
    vae = VAE(CONFIG, 8, 4)
    boxed, extra = jax.jit(vae.init)(jax.random.key(0))
    params, declarations = declared.split(boxed)
    return vae, params, declarations, extra


def batch(seed=1):
    images = np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    return {"image": images, "slot": np.arange(4, dtype=np.int32)}


def test_kl_is_that_of_the_textbook():
    rng = np.random.default_rng(0)
    mean, logvar = rng.normal(size=(2, 3, 2, 2, 4))
    found = kl_divergence(Posterior(jnp.asarray(mean), jnp.asarray(logvar)))
    # E log q - log p over draws from q, with a standard error of about 0.02 per element.
    z = mean + np.exp(0.5 * logvar) * rng.normal(size=(20_000, *mean.shape))
    log_q = -0.5 * ((z - mean) ** 2 / np.exp(logvar) + logvar)
    np.testing.assert_allclose(found, (log_q + 0.5 * z**2).mean(0).sum((1, 2, 3)), rtol=0.02)


def test_only_the_discriminator_is_in_its_group(made):
    _, params, declarations, _ = made
    assert {d.group for d in jax.tree.leaves(declarations["discriminator"])} == {"discriminator"}
    rest = {name: d for name, d in declarations.items() if name != "discriminator"}
    assert {d.group for d in jax.tree.leaves(rest)} == {"other"}
    assert made[0].autoencoder_params(params).keys() == {"encoder", "decoder"}


def test_terms_are_of_a_draw_keyed_by_example(made):
    vae, params, _, extra = made
    key = jax.random.key(3)
    loss = jax.jit(vae.loss_fn)
    sums, counts, stats = loss(params, extra, batch(), key)
    x = to_float(jnp.asarray(batch()["image"]))
    posterior = jax.jit(vae.encode)(params, x)
    np.testing.assert_allclose(sums["kl"], kl_divergence(posterior).sum() / (8 * 8 * 3), rtol=1e-5)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), (8, 8, 2)) for i in range(4)])
    decoded = jax.jit(vae.decode)(params, posterior.mean + jnp.exp(posterior.logvar / 2) * noise)
    np.testing.assert_allclose(sums["pixel"], jnp.abs(decoded - x).mean((1, 2, 3)).sum(), rtol=1e-5)
    assert counts["kl"] == counts["pixel"] == 4 and stats == {}
    turned = {name: np.roll(rows, 1, axis=0) for name, rows in batch().items()}
    np.testing.assert_allclose(loss(params, extra, turned, key)[0]["pixel"], sums["pixel"], rtol=1e-5)


@pytest.mark.slow
def test_recomputed_blocks_give_the_same_gradient(made):
    vae, params, _, extra = made
    again = VAE(replace(CONFIG, remat=True), 8, 4)
    abstract = jax.eval_shape(again.init, jax.random.key(0))[0]
    assert jax.tree.structure(declared.split(abstract)[0]) == jax.tree.structure(params)

    def gradient(model):
        loss = lambda p: model.loss_fn(p, extra, batch(), jax.random.key(3))[0]["pixel"]  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    for a, b in zip(jax.tree.leaves(gradient(vae)), jax.tree.leaves(gradient(again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    text = str(jax.make_jaxpr(lambda p: again.loss_fn(p, extra, batch(), jax.random.key(3)))(params))
    assert "remat" in text or "checkpoint" in text


def test_sizes_that_are_of_no_network_are_refused():
    with pytest.raises(UserError, match="multiples of model.sizes.norm_groups=3"):
        VAE(replace(CONFIG, sizes=replace(CONFIG.sizes, norm_groups=3)), 8, 4)
    with pytest.raises(UserError, match="image_size=9 is not a multiple of 2"):
        VAE(replace(CONFIG, sizes=replace(CONFIG.sizes, block_out_channels=(8, 8))), 9, 4)
