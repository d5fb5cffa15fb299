"""A discriminator of patches: convolutions that halve the resolution, then one judgement for each place.

Isola et al. 2017 (arXiv 1611.07004), as in VQGAN (arXiv 2012.09841), with one change: groups of an image's own channels
are normalised, never a batch, so that a judgement depends neither on the other images nor on how a batch is split.

Legend: B batch, H height, W width, C channels; h, w places that are judged.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn.autoencoder import Conv, GroupNorm

_SLOPE = 0.2
_WIDEST = 8  # times the width of the first layer


class Discriminator(nn.Module):
    """Images [B, H, W, C] in [-1, 1] → judgements [B, h, w] in at least fp32; above 0 where a patch seems original.

    Attributes:
      config: H and W are multiples of 2 ** config.layers.
      dtype: of the activations; None follows the images.
    """

    config: settings.Discriminator
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BHWC):
        s = self.config
        widths = [s.width * min(2**i, _WIDEST) for i in range(s.layers + 1)]
        axes = [("patch", "embed"), *[("embed", "embed_out"), ("embed_out", "embed")] * s.layers]
        for i, width in enumerate(widths):
            # All but the last halve the resolution; kernels of 4 x 4 read every pixel equally often.
            how = {"stride": 2, "padding": (1, 1)} if i < s.layers else {"padding": (1, 2)}
            x_BHWC = Conv(width, axes[i], size=4, dtype=self.dtype, name=f"conv_{i}", **how)(x_BHWC)
            if i and s.norm_groups:
                x_BHWC = GroupNorm(s.norm_groups, axes[i][1], name=f"norm_{i}")(x_BHWC)
            x_BHWC = nn.leaky_relu(x_BHWC, _SLOPE)
        judge = Conv(1, (axes[s.layers][1], "patch"), size=4, padding=(1, 2), dtype=self.dtype, name="judge")
        y_Bhw = judge(x_BHWC)[..., 0]
        return y_Bhw.astype(jnp.promote_types(y_Bhw.dtype, jnp.float32))
