"""What lies between images and the space in which the flow runs.

Legend: B batch, H height, W width, C channels; h, w, c the same of the latent.
"""

import abc

from ddt_jax import settings


class LatentCodec(abc.ABC):
    """Frozen map from images in [-1, 1] to latents of about unit scale, and back.

    Attributes:
      channels: c.
      downsampling: H / h.
    """

    channels: int
    downsampling: int

    @abc.abstractmethod
    def encode(self, images_BHWC):
        """Images → latents [B, h, w, c]."""

    @abc.abstractmethod
    def decode(self, latents_Bhwc):
        """Latents → images, not clipped."""


class IdentityCodec(LatentCodec):
    """Pixels are the latents. For images up to about 64 px."""

    channels = 3
    downsampling = 1

    def encode(self, images_BHWC):
        return images_BHWC

    def decode(self, latents_Bhwc):
        return latents_Bhwc


def make_codec(config: settings.IdentityCodec) -> LatentCodec:
    """The codec that config.kind names."""
    return {"identity": IdentityCodec}[config.kind]()
