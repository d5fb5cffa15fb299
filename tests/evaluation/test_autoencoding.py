"""Figures of an autoencoder, against NumPy on a model whose latents are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.evaluation.autoencoding import evaluate_autoencoder, reconstruct
from ddt_jax.nn.autoencoder import Posterior

SETTINGS = settings.Evaluate(pictures=3)


class Halves:
    """Latents are every second pixel's red and green, with a deviation of 1/2; decoding repeats them, blue is black."""

    def encode(self, params, images_BHWC):
        mean = params * images_BHWC[:, ::2, ::2, :2]
        return Posterior(mean, jnp.full_like(mean, 2 * np.log(0.5)))

    def decode(self, params, latents_Bhwc):
        wide = jnp.repeat(jnp.repeat(latents_Bhwc / params, 2, axis=1), 2, axis=2)
        return jnp.concatenate([wide, jnp.full_like(wide[..., :1], -1)], axis=-1)


def batches(sizes, rows=8):
    """Batches of `rows` images, of which so many are valid."""
    rng = np.random.default_rng(0)
    for n in sizes:
        yield {"image": rng.integers(0, 256, (rows, 16, 16, 3)).astype(np.uint8), "valid": np.arange(rows) < n}


def test_figures_are_those_of_numpy():
    report = evaluate_autoencoder(Halves(), jnp.float32(2.0), batches([8, 3]), SETTINGS)
    images = np.concatenate([b["image"][b["valid"]] for b in batches([8, 3])]).astype(np.float64)
    decoded = images[:, ::2, ::2].repeat(2, 1).repeat(2, 2)
    decoded[..., 2] = 0
    psnr = 10 * np.log10(255**2 / np.square(images - decoded).mean((1, 2, 3)))
    mean = 2 * (images[:, ::2, ::2, :2] / 127.5 - 1)
    found = report.results
    assert found["n"] == 11
    np.testing.assert_allclose(found["psnr"], psnr.mean(), rtol=1e-6)
    np.testing.assert_allclose(found["latent_mean"], mean.mean(), atol=1e-5)
    np.testing.assert_allclose(found["latent_std"], np.sqrt(mean.var() + 0.25), rtol=1e-5)  # of draws
    np.testing.assert_allclose(found["latent_mean_by_channel"], mean.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["latent_std_by_channel"], np.sqrt(mean.var((0, 1, 2)) + 0.25), rtol=1e-5)
    kl = 0.5 * (np.square(mean) + 0.25 - 1 - np.log(0.25)).sum((1, 2, 3))
    np.testing.assert_allclose(found["kl"], kl.mean(), rtol=1e-5)
    np.testing.assert_array_equal(report.reconstructions, decoded[:3].astype(np.uint8))
    assert report.picture().shape[-1] == 3 and "latent deviation" in report.markdown()
    np.testing.assert_array_equal(reconstruct(Halves(), jnp.float32(2.0), report.originals), report.reconstructions)


def test_a_mesh_changes_no_figure():
    mesh = meshes.make_mesh(settings.Mesh())
    with jax.set_mesh(mesh):
        put = lambda batch: meshes.put_batch(batch, mesh)  # noqa: E731
        spread = evaluate_autoencoder(Halves(), jnp.float32(2.0), batches([8, 3]), SETTINGS, put=put).results
    alone = evaluate_autoencoder(Halves(), jnp.float32(2.0), batches([8, 3]), SETTINGS).results
    for name, value in alone.items():
        np.testing.assert_allclose(spread[name], value, rtol=1e-6, atol=1e-9)


def test_no_valid_image_is_an_error():
    with pytest.raises(ValueError, match="no valid images"):
        evaluate_autoencoder(Halves(), jnp.float32(2.0), batches([0]), SETTINGS)
