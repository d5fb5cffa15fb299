"""Between noised latents of images and rows of a transformer: so many latents squared are a row, in raster order.

Both coders are pairs of maps, of each image by itself: `encode` gives rows and what `decode` needs of the way, `decode`
gives an array like the latents. The noise level enters here and nowhere else (Transfusion, arXiv 2408.11039 §3).

Legend: B batch, I images of an example, N = B I, P values of a patch, H height, W width, C channels of latents, R rows
of an image, D width.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import unet
from ddt_jax.nn.embeddings import TimeEmbedding, learned
from ddt_jax.nn.images import patchify, unpatchify
from ddt_jax.nn.layers import Dense, zeros_dense

_SINUSOIDS = 256


class LinearCoder(nn.Module):
    """One linear map each way, and an MLP of the noise level whose vector is added to the rows.

    The paper adds it "before the linear layer" (fn 6); the parameters that it counts are those of vectors as wide as
    the rows. The map back starts at zero.

    Attributes:
      patch: latents of a side of a patch.
      channels: C.
      width: D.
      places: R, each of which adds a learned vector of its own; 0: none.
    """

    patch: int
    channels: int
    width: int
    dtype: Any = None
    places: int = 0

    def setup(self):
        values = self.patch**2 * self.channels
        if self.places:
            self.place = learned(self, "places", self.places, self.width)
        self.time = TimeEmbedding(self.width, self.dtype, sinusoids=_SINUSOIDS)
        self.into = Dense((self.width,), ("patch", "embed"), dtype=self.dtype)
        self.out = zeros_dense((values,), ("embed", "patch"), dtype=self.dtype)

    def encode(self, x_BIHWC, t_BI):
        """(rows [B, I, R, D], None)."""
        rows_NRD = self.read(patchify(_flat(x_BIHWC), self.patch), t_BI.reshape(-1))
        return rows_NRD.reshape(*t_BI.shape, *rows_NRD.shape[1:]), None

    def decode(self, h_BIRD, way, shape):
        """[B, I, H, W, C], at least fp32. shape: (H, W) of the latents."""
        out_NHWC = unpatchify(self.write(_flat(h_BIRD)), self.patch, shape[0])
        return out_NHWC.reshape(*h_BIRD.shape[:2], *out_NHWC.shape[1:])

    def read(self, values_NRP, t_N, at_NR=None):
        """Rows [N, R, D] of patches whose values are given.

        Args:
          t_N: the noise level of all R.
          at_NR: which patches of an image they are, by raster; None: all of them in order.
        """
        rows_NRD = self.into(values_NRP)
        rows_NRD = rows_NRD + self.time(t_N)[:, None].astype(rows_NRD.dtype)
        if not self.places:
            return rows_NRD
        table_RD = jnp.asarray(self.place)
        return rows_NRD + (table_RD if at_NR is None else table_RD[at_NR]).astype(rows_NRD.dtype)

    def write(self, h_NRD):
        """The values of patches [N, R, P], at least fp32."""
        return _wide(self.out(h_NRD))

    def __call__(self, x_BIHWC, t_BI):
        """There and back: declares all parameters."""
        rows, way = self.encode(x_BIHWC, t_BI)
        return self.decode(rows, way, x_BIHWC.shape[2:4])


class UNetCoder(nn.Module):
    """The halves of a U-Net. Attributes: as of `LinearCoder`; and `config`."""

    patch: int
    channels: int
    width: int
    config: settings.UNetCoder
    dtype: Any = None

    def setup(self):
        c, widths = self.config, unet_widths(self.config, self.patch)
        self.time = TimeEmbedding(c.width, self.dtype, sinusoids=_SINUSOIDS)
        self.down = unet.Down(widths, c.blocks, self.width, self.dtype, c.remat)
        self.up = unet.Up(widths, c.blocks, self.channels, self.dtype, c.remat)

    def encode(self, x_BIHWC, t_BI):
        """(rows [B, I, R, D], the way down)."""
        time_NT = self.time(t_BI.reshape(-1))
        rows_NRD, way = self.down(_flat(x_BIHWC), time_NT)
        return rows_NRD.reshape(*t_BI.shape, *rows_NRD.shape[1:]), (time_NT, way)

    def decode(self, h_BIRD, way, shape):
        """[B, I, H, W, C], at least fp32."""
        time_NT, way = way
        out_NHWC = _wide(self.up(_flat(h_BIRD), time_NT, way))
        return out_NHWC.reshape(*h_BIRD.shape[:2], *shape, self.channels)

    def __call__(self, x_BIHWC, t_BI):
        """There and back: declares all parameters."""
        rows, way = self.encode(x_BIHWC, t_BI)
        return self.decode(rows, way, x_BIHWC.shape[2:4])


def unet_widths(config: settings.UNetCoder, patch: int) -> tuple[int, ...]:
    """Channels of the levels, from the latents' resolution to that of rows; raises UserError where there are none."""
    levels = patch.bit_length()
    if patch != 1 << (levels - 1):
        raise UserError(f"config: model.image.patch_size={patch} is no power of 2, by which a U-Net reduces images")
    if config.width < patch or config.width % patch or config.blocks < 1:
        raise UserError(
            f"config: model.image.coder.width={config.width} must be a multiple of model.image.patch_size={patch}, "
            f"and model.image.coder.blocks={config.blocks} at least 1"
        )
    return tuple(config.width >> i for i in reversed(range(levels)))


def make_coder(
    config: settings.LinearCoder | settings.UNetCoder, patch: int, channels: int, width: int, dtype=None, rows: int = 0
):
    """The coder that config.kind names. Raises UserError if its settings do not go together.

    Args:
      rows: of an image, where rows know their places.
    """
    if config.kind == "linear":
        return LinearCoder(patch, channels, width, dtype, rows if config.places else 0)
    unet_widths(config, patch)
    return UNetCoder(patch, channels, width, config, dtype)


def _flat(x_BI):
    return x_BI.reshape(-1, *x_BI.shape[2:])


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
