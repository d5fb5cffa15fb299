"""The spatial tokenizer: a code for each place of a grid, in raster order, as in VQGAN and LlamaGen.

Encoder and decoder are those of the KL autoencoder, with the quantizer of the DDT tokenizer between them: it is what
that one is compared with at equal bits (arXiv 2012.09841, 2406.06525).

Legend: B batch, K tokens (h w), d code dimension; H, W, C an image, h, w the grid of codes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn import autoencoder, layers
from ddt_jax.nn.quantize import VectorQuantizer
from ddt_jax.tokenizers import base
from ddt_jax.tokenizers.image_loss import ImageLoss


class Network(nn.Module):
    """Encoder and decoder, so that one tree holds both."""

    config: settings.SpatialTokenizer
    sizes: settings.Autoencoder

    def setup(self):
        options = (self.sizes, layers.compute_dtype(self.config.dtype), self.config.remat)
        self.encoder = autoencoder.Encoder(*options, moments=1)
        self.decoder = autoencoder.Decoder(*options)

    def encode(self, images_BHWC):
        """Images → features [B, K, d]."""
        z_Bhwd = self.encoder(images_BHWC)
        return z_Bhwd.reshape(z_Bhwd.shape[0], -1, z_Bhwd.shape[-1])

    def decode(self, codes_BKd, height):
        """Vectors of codes → images in at least fp32, not clipped. height: h."""
        b, _, d = codes_BKd.shape
        x_BHWC = self.decoder(codes_BKd.reshape(b, height, -1, d))
        return x_BHWC.astype(jnp.promote_types(x_BHWC.dtype, jnp.float32))

    def __call__(self, images_BHWC):
        height = images_BHWC.shape[1] // autoencoder.downsampling(self.sizes)
        return self.decode(self.encode(images_BHWC), height)


class SpatialTokenizer(base.ImageTokenizer):
    """See the module's docstring.

    A prefix of the codes is the top of the picture, and decodes as such: hidden places hold the mean code. The decoder
    never saw that in training, and raster order says nothing of what matters, so figures for some of the tokens tell
    only how much of the picture their rows cover.
    """

    def __init__(self, config: settings.SpatialTokenizer, image_size: int, batch_size: int):
        self.config = config
        self.image_size = image_size
        sizes = settings.Autoencoder(
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.quantizer.code_dim,
            norm_groups=config.norm_groups,
        )
        autoencoder.check(sizes, "model")
        autoencoder.check_divides(sizes, image_size)
        self._height = image_size // autoencoder.downsampling(sizes)
        self.num_tokens = self._height**2
        self.codebook_size = config.quantizer.codebook_size
        self.quantizer = VectorQuantizer(config.quantizer, self.num_tokens, batch_size)
        self.image_loss = ImageLoss(config.image_loss, image_size, config.dtype)
        self.loss_weights = {
            **self.image_loss.loss_weights,
            "commitment": config.quantizer.commitment,
            **self.quantizer.loss_weights,
        }
        self.cross_example_terms = self.quantizer.cross_example_terms
        self._network = Network(config, sizes)

    def init(self, rng):
        network_key, codes_key, loss_key = jax.random.split(rng, 3)
        size = self.image_size // self._height
        params = self._network.init(network_key, jnp.zeros((1, size, size, 3)))["params"]
        judges, weights = self.image_loss.init(loss_key)
        return params | judges, {"codebook": self.quantizer.init(codes_key), **weights}

    def loss_fn(self, params, extra, batch, rng):
        x_BHWC = base.to_float(batch["image"])
        z_BKd = self._apply(params, "encode", x_BHWC)
        codes_BKd, _, commitment_BK, stats = self.quantizer.quantize(extra["codebook"], z_BKd, batch["slot"], rng)
        decoded_BHWC = self._apply(params, "decode", codes_BKd, self._height)
        sums, counts = self.image_loss.terms(params, extra, decoded_BHWC, x_BHWC)
        sums |= {"commitment": jnp.sum(commitment_BK)}
        counts |= {"commitment": jnp.float32(commitment_BK.size)}
        diversity = self.quantizer.diversity_terms(extra["codebook"], z_BKd, stats)
        return sums | diversity, counts | dict.fromkeys(diversity, jnp.float32(1)), {"codebook": stats}

    def update_extra(self, extra, stats, rng):
        del rng  # the candidates for revival were drawn in loss_fn
        return extra | {"codebook": self.quantizer.update(extra["codebook"], stats["codebook"])}

    def encode(self, params, extra, images_BHWC):
        return self.quantizer.encode(extra["codebook"], self._apply(params, "encode", images_BHWC))

    def decode(self, params, extra, codes_BK, rng, *, num_visible=None, steps=None):
        """See the base class; there is no noise and there are no steps."""
        del rng, steps
        codes_BKd = self.quantizer.lookup(extra["codebook"], codes_BK)
        if num_visible is not None:
            shown = jnp.arange(self.num_tokens) < jnp.reshape(num_visible, (-1, 1))
            codes_BKd = jnp.where(shown[..., None], codes_BKd, self._mean_code(extra["codebook"]))
        return jnp.clip(self._apply(params, "decode", codes_BKd, self._height), -1, 1)

    def extra_metrics(self, extra):
        return self.quantizer.metrics(extra["codebook"])

    def _mean_code(self, codebook):
        """[d], over codes as often as they are used."""
        vectors_Vd = self.quantizer.lookup(codebook, jnp.arange(self.codebook_size))
        return codebook["count"] @ vectors_Vd / jnp.maximum(jnp.sum(codebook["count"]), 1e-12)

    def _apply(self, params, method, *args):
        return self._network.apply({"params": params}, *args, method=method)
