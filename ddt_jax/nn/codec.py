"""What lies between images and the space in which they are noised.

Legend: B batch, H height, W width, C channels; h, w, c the same of the latent.
"""

import abc
from typing import Any

import jax

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import autoencoder, layers
from ddt_jax.nn.params import missing


class LatentCodec(abc.ABC):
    """Frozen map from images in [-1, 1] to latents of about unit scale, and back.

    Its parameters are not trained: a tokenizer keeps them as `extra["codec"]`, so they are sharded and checkpointed
    with a run, and no optimizer or weight average ever sees them.

    Attributes:
      channels: c.
      downsampling: H / h.
    """

    channels: int
    downsampling: int

    def init(self, rng) -> dict[str, Any]:
        """What the codec adds to a tokenizer's `extra`: nothing, or {"codec": its parameters in `params.Box`es}."""
        del rng
        return {}

    @abc.abstractmethod
    def encode(self, params, images_BHWC, keys_B=None):
        """Images → latents [B, h, w, c].

        Args:
          params: plain arrays; None for a codec without any.
          keys_B: one key per example, given in training: a codec that is set to may draw its latents with them.
        """

    @abc.abstractmethod
    def decode(self, params, latents_Bhwc):
        """Latents → images, not clipped."""

    def posterior(self, params, images_BHWC):
        """What `draw` makes latents of, so that it can be kept: (mean, logvar), float [B, h, w, c].

        Raises:
          UserError: for a codec without one.
        """
        del params, images_BHWC
        raise UserError("model.codec: pixels are their own latents; there is nothing to keep of them")

    def draw(self, mean_Bhwc, logvar_Bhwc, keys_B=None):
        """A posterior → what `encode` gives for its images and the same keys. Raises UserError as `posterior`."""
        del logvar_Bhwc, keys_B
        return self.posterior(None, mean_Bhwc)


class IdentityCodec(LatentCodec):
    """Pixels are the latents. For images up to about 64 px."""

    channels = 3
    downsampling = 1

    def encode(self, params, images_BHWC, keys_B=None):
        return images_BHWC

    def decode(self, params, latents_Bhwc):
        return latents_Bhwc


class VAECodec(LatentCodec):
    """Latents of a KL autoencoder, normalised with its published shift and scale.

    Attributes:
      sizes: of the autoencoder.
      weights: the file its parameters come from; "" if they are random.
      dtype: name of the activations' type.

    Raises:
      UserError: if the settings name neither weights nor random ones, or both, or sizes beside a preset.
    """

    def __init__(self, config: settings.VAECodec, name: str = "model.codec"):
        if not config.weights and not config.random_weights:
            raise UserError(
                f"config: {name}.weights is empty; set it to a diffusers .safetensors file of the autoencoder, "
                f"or {name}.random_weights=True to go on with an untrained one"
            )
        if config.weights and config.random_weights:
            raise UserError(
                f"config: {name}.weights={config.weights!r} would not be read with "
                f"{name}.random_weights=True; leave one of them out"
            )
        if config.preset != "custom" and config.sizes != settings.Autoencoder():
            raise UserError(
                f"config: {name}.sizes have no effect with {name}.preset={config.preset!r}; set {name}.preset='custom'"
            )
        self.sizes = config.sizes if config.preset == "custom" else autoencoder.PRESETS[config.preset]
        autoencoder.check(self.sizes, f"{name}.sizes")
        self.weights = config.weights
        self.channels = self.sizes.latent_channels
        self.downsampling = autoencoder.downsampling(self.sizes)
        self.dtype = config.dtype
        self._sample = config.sample
        self._network = autoencoder.Autoencoder(self.sizes, layers.compute_dtype(config.dtype))

    def init(self, rng):
        """Random parameters, or `params.missing` ones where they come from a file."""
        if not self.weights:
            return {"codec": autoencoder.init(self.sizes, rng)}
        return {"codec": missing(jax.eval_shape(lambda: autoencoder.init(self.sizes, rng)))}

    def encode(self, params, images_BHWC, keys_B=None):
        return self.draw(*self.posterior(params, images_BHWC), keys_B)

    def posterior(self, params, images_BHWC):
        return tuple(self._network.apply({"params": params}, images_BHWC, method="encode"))

    def draw(self, mean_Bhwc, logvar_Bhwc, keys_B=None):
        posterior = autoencoder.Posterior(mean_Bhwc, logvar_Bhwc)
        drawn = self._sample and keys_B is not None
        return autoencoder.normalize(self.sizes, posterior.sample(keys_B) if drawn else posterior.mode())

    def decode(self, params, latents_Bhwc):
        raw_Bhwc = autoencoder.denormalize(self.sizes, latents_Bhwc)
        return self._network.apply({"params": params}, raw_Bhwc, method="decode")


def make_codec(config: settings.IdentityCodec | settings.VAECodec, name: str = "model.codec") -> LatentCodec:
    """The codec that config.kind names. name: of the settings, for messages.

    Raises:
      UserError: if its settings do not go together.
    """
    return VAECodec(config, name) if isinstance(config, settings.VAECodec) else IdentityCodec()
