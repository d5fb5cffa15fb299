"""The convolutional KL autoencoder as a model to train: images to latents of a normal distribution, and back.

It has no codes: it is what a tokenizer's codec holds frozen (`nn/codec.py`). Trained as in Rombach et al.
(arXiv 2112.10752): L1, LPIPS, a discriminator, and so little KL that it only keeps the latents from drifting away.

Legend: B batch; H, W, C an image, h, w, c its latent.
"""

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn import autoencoder, layers
from ddt_jax.tokenizers import base
from ddt_jax.tokenizers.image_loss import DISCRIMINATOR, ImageLoss


class VAE(base.ImageModel):
    """See the module's docstring.

    Attributes:
      sizes: of the autoencoder.
    """

    def __init__(self, config: settings.VAE, image_size: int, batch_size: int):
        del batch_size
        self.config = config
        self.image_size = image_size
        self.sizes = config.sizes
        autoencoder.check(config.sizes, "model.sizes")
        autoencoder.check_divides(config.sizes, image_size)
        self.image_loss = ImageLoss(config.image_loss, image_size, config.dtype)
        self.loss_weights = {**self.image_loss.loss_weights, "kl": config.kl_weight}
        self._network = autoencoder.Autoencoder(config.sizes, layers.compute_dtype(config.dtype), config.remat)

    def init(self, rng):
        network_key, loss_key = jax.random.split(rng)
        judges, weights = self.image_loss.init(loss_key)
        return autoencoder.init(self.sizes, network_key) | judges, weights

    def loss_fn(self, params, extra, batch, rng):
        x_BHWC = base.to_float(batch["image"])
        posterior = self.encode(params, x_BHWC)
        latents_Bhwc = posterior.sample(base.example_keys(rng, batch["slot"]))
        sums, counts = self.image_loss.terms(params, extra, self.decode(params, latents_Bhwc), x_BHWC)
        # Per value of a pixel, like the absolute error: published weights are for sums over image and latent.
        kl_B = autoencoder.kl_divergence(posterior) / x_BHWC[0].size
        return sums | {"kl": jnp.sum(kl_B)}, counts | {"kl": jnp.float32(kl_B.size)}, {}

    def update_extra(self, extra, stats, rng):
        del stats, rng
        return extra

    def encode(self, params, images_BHWC) -> autoencoder.Posterior:
        """Images in [-1, 1] → distribution of their latents [B, h, w, c]."""
        return self._apply(params, images_BHWC, "encode")

    def decode(self, params, latents_Bhwc):
        """Latents → images, not clipped."""
        return self._apply(params, latents_Bhwc, "decode")

    def autoencoder_params(self, params):
        """Those of encoder and decoder alone."""
        return {name: value for name, value in params.items() if name != DISCRIMINATOR}

    def _apply(self, params, x, method):
        return self._network.apply({"params": params}, x, method=method)
