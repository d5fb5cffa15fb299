"""The two halves of a U-Net with room for a transformer between them.

Residual blocks of arXiv 2105.05233 without attention, which the transformer has; norms are plain layer norms over the
channels of a pixel, and the noise level is added inside each block (Transfusion, arXiv 2408.11039 §3 and fn 7).
Resolution is halved from level to level, channels are doubled. Each output on the way down is an input on the way up.

Legend: N images, H height, W width, C channels; h, w of the lowest level; T width of the time vector, D of a row.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax.nn.autoencoder import Conv
from ddt_jax.nn.layers import Dense, LayerNorm


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside the identity, or beside a linear map where the width changes.

    The second one starts at zero.
    """

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x_NHWC, time_NT):
        h = nn.silu(LayerNorm(name="norm1")(x_NHWC))
        h = Conv(self.features, ("embed", "embed_out"), dtype=self.dtype, name="conv1")(h)
        time = Dense((self.features,), ("embed", "embed_out"), dtype=self.dtype, name="time")
        h = h + time(nn.silu(time_NT))[:, None, None]
        h = nn.silu(LayerNorm(axis="embed_out", name="norm2")(h))
        zero = {"kernel_init": nn.initializers.zeros, "dtype": self.dtype}
        h = Conv(self.features, ("embed_out", "embed"), name="conv2", **zero)(h)
        if x_NHWC.shape[-1] != self.features:
            x_NHWC = Dense((self.features,), ("embed", "embed_out"), dtype=self.dtype, name="shortcut")(x_NHWC)
        return x_NHWC + h


def _block(remat: bool):
    return nn.remat(ResidualBlock) if remat else ResidualBlock


class Down(nn.Module):
    """Images [N, H, W, C] → (rows [N, h w, D], what `Up` needs of the way).

    Attributes:
      widths: channels of each level, from the images' resolution down by halves.
      blocks: of each level.
      rows: D.
    """

    widths: tuple[int, ...]
    blocks: int
    rows: int
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, x_NHWC, time_NT):
        x = Conv(self.widths[0], ("patch", "embed"), dtype=self.dtype, name="conv_in")(x_NHWC)
        way = [x]
        for level, width in enumerate(self.widths):
            for i in range(self.blocks):
                x = _block(self.remat)(width, self.dtype, name=f"block_{level}_{i}")(x, time_NT)
                way.append(x)
            if level + 1 < len(self.widths):
                axes = ("embed", "embed_out")
                x = Conv(width, axes, stride=2, padding=(1, 1), dtype=self.dtype, name=f"down_{level}")(x)
                way.append(x)
        rows_NhwC = LayerNorm(name="norm_out")(x).reshape(x.shape[0], -1, x.shape[-1])
        out = Dense((self.rows,), ("embed", "embed_out"), dtype=self.dtype, name="to_rows")
        return out(rows_NhwC), tuple(way)


class Up(nn.Module):
    """Rows [N, h w, D] and the way down → [N, H, W, features], zero at initialisation. Attributes: as of `Down`."""

    widths: tuple[int, ...]
    blocks: int
    features: int
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, rows_NRD, time_NT, way):
        way = list(way)
        axes = ("embed", "embed_out")
        x = Dense(way[-1].shape[-1:], axes, dtype=self.dtype, name="from_rows")(rows_NRD).reshape(way[-1].shape)
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.blocks + 1):
                x = jnp.concatenate([x, way.pop()], axis=-1)
                x = _block(self.remat)(width, self.dtype, name=f"block_{level}_{i}")(x, time_NT)
            if level:
                n, h, w, c = x.shape
                x = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)
                x = Conv(width, axes, dtype=self.dtype, name=f"up_{level}")(x)
        x = nn.silu(LayerNorm(name="norm_out")(x))
        zero = {"kernel_init": nn.initializers.zeros, "dtype": self.dtype}
        return Conv(self.features, ("embed", "patch"), name="conv_out", **zero)(x)
