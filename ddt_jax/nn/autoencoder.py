"""The convolutional KL autoencoder of Stable Diffusion 1-3: images to the mean and log-variance of a latent, and back.

Encoder and decoder are U-Net halves without skip connections: residual blocks per resolution, one self-attention of a
single head at the lowest. Rombach et al. (arXiv 2112.10752) train it; SD3 (arXiv 2403.03206) widens the latent to 16
channels and drops the 1 x 1 convolutions around it. Parameter names follow the published files closely enough that
`interop/diffusers_vae.py` maps them by rule.

Legend: B batch, H height, W width, C channels; h, w, c the same of the latent; S = h w rows of the attention, G groups.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import layers, spans
from ddt_jax.nn.attention import attend
from ddt_jax.nn.params import declare

# Sizes of the published models: SD 1.x and 2.x; SD3 and SD3.5.
PRESETS = {
    "sd": settings.Autoencoder(latent_channels=4, use_quant_conv=True, scaling_factor=0.18215, shift_factor=0.0),
    "sd3": settings.Autoencoder(latent_channels=16, use_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609),
}

_EPSILON = 1e-6
_LOGVAR_RANGE = (-30.0, 20.0)  # as published: keeps exp finite for an untrained encoder
_IMAGE_CHANNELS = 3


class Posterior(NamedTuple):
    """A normal distribution over latents with a diagonal covariance; mean and logvar [B, h, w, c]."""

    mean: Any
    logvar: Any

    def mode(self):
        """[B, h, w, c]."""
        return self.mean

    def sample(self, keys_B):
        """[B, h, w, c]. keys_B: one key per example, so that a draw does not depend on the batch it is in."""
        shape, dtype = self.mean.shape[1:], self.mean.dtype
        noise_Bhwc = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys_B)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise_Bhwc


def kl_divergence(posterior: Posterior):
    """Nats [B] from a standard normal distribution, over all elements of a latent."""
    square_Bhwc = jnp.square(posterior.mean) + jnp.exp(posterior.logvar) - 1 - posterior.logvar
    return 0.5 * jnp.sum(square_Bhwc, axis=(1, 2, 3))


class Conv(nn.Module):
    """Square convolution with bias, [B, H, W, in] → [B, H', W', features].

    Attributes:
      axes: logical axes of the input and output channels.
      padding: (before, after), the same for rows and columns; None for as many as keep the size.
      kernel_init: None for a truncated normal with variance 1 / fan-in.
    """

    features: int
    axes: tuple[str | None, str | None]
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] | None = None
    dtype: Any = None
    kernel_init: Any = None

    @nn.compact
    def __call__(self, x_BHWC):
        init = self.kernel_init or nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        shape = (self.size, self.size, x_BHWC.shape[-1], self.features)
        kernel = self.param("kernel", declare(init, (None, None, *self.axes)), shape)
        bias = self.param("bias", declare(nn.initializers.zeros, self.axes[1:], decay=False), (self.features,))
        x_BHWC, kernel, bias = nn.dtypes.promote_dtype(x_BHWC, kernel, bias, dtype=self.dtype)
        padding = self.padding or (self.size // 2, self.size // 2)
        y = jax.lax.conv_general_dilated(
            x_BHWC, kernel, (self.stride,) * 2, (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias


class GroupNorm(nn.Module):
    """Zero mean and unit variance over pixels and the channels of a group, in at least fp32; the input's type again."""

    groups: int
    axis: str

    @nn.compact
    def __call__(self, x_BHWC):
        b, h, w, c = x_BHWC.shape
        scale = self.param("scale", declare(nn.initializers.ones, (self.axis,), decay=False), (c,))
        bias = self.param("bias", declare(nn.initializers.zeros, (self.axis,), decay=False), (c,))
        x = x_BHWC.astype(jnp.promote_types(x_BHWC.dtype, jnp.float32)).reshape(b, h * w, self.groups, c // self.groups)
        x = x - jnp.mean(x, axis=(1, 3), keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(1, 3), keepdims=True) + _EPSILON)
        return (x.reshape(b, h, w, c) * scale + bias).astype(x_BHWC.dtype)


class ResNetBlock(nn.Module):
    """Two normalised convolutions beside the identity, or beside a 1 x 1 convolution where the width changes."""

    features: int
    groups: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BHWC):
        h = nn.silu(GroupNorm(self.groups, "embed", name="norm1")(x_BHWC))
        h = Conv(self.features, ("embed", "embed_out"), dtype=self.dtype, name="conv1")(h)
        h = nn.silu(GroupNorm(self.groups, "embed_out", name="norm2")(h))
        h = Conv(self.features, ("embed_out", "embed"), dtype=self.dtype, name="conv2")(h)
        if x_BHWC.shape[-1] != self.features:
            axes = ("embed", "embed_out")
            x_BHWC = Conv(self.features, axes, size=1, dtype=self.dtype, name="shortcut")(x_BHWC)
        return x_BHWC + h


class AttentionBlock(nn.Module):
    """Self-attention of all pixels with one head as wide as the channels, beside the identity."""

    groups: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BHWC):
        b, h, w, c = x_BHWC.shape
        x_BSC = GroupNorm(self.groups, "embed", name="norm")(x_BHWC).reshape(b, h * w, c)
        q, k, v = (
            layers.Dense((c,), ("embed", "embed_out"), dtype=self.dtype, name=name)(x_BSC)[:, None]
            for name in ("query", "key", "value")
        )
        y_BSC = attend(q, k, v, spans.full(h * w))[:, 0]
        y_BSC = layers.Dense((c,), ("embed_out", "embed"), dtype=self.dtype, name="out")(y_BSC)
        return x_BHWC + y_BSC.reshape(b, h, w, c)


def _resnet(remat: bool):
    """The class of the residual blocks; remat: computed again for the gradient rather than kept."""
    return nn.remat(ResNetBlock) if remat else ResNetBlock


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    groups: int
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, x_BHWC):
        c, block = x_BHWC.shape[-1], _resnet(self.remat)
        x_BHWC = block(c, self.groups, self.dtype, name="resnet_0")(x_BHWC)
        x_BHWC = AttentionBlock(self.groups, self.dtype, name="attention")(x_BHWC)
        return block(c, self.groups, self.dtype, name="resnet_1")(x_BHWC)


class Level(nn.Module):
    """The residual blocks of one resolution, then a change of resolution: "down", "up" or "" for none."""

    features: int
    blocks: int
    groups: int
    change: str
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, x_BHWC):
        for i in range(self.blocks):
            block = _resnet(self.remat)
            x_BHWC = block(self.features, self.groups, self.dtype, name=f"resnet_{i}")(x_BHWC)
        axes = ("embed", "embed_out")
        if self.change == "down":
            # One row and column of zeros behind the image only: the published weights were trained so.
            down = Conv(self.features, axes, stride=2, padding=(0, 1), dtype=self.dtype, name="downsample")
            x_BHWC = down(x_BHWC)
        if self.change == "up":
            b, h, w, c = x_BHWC.shape
            twice = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
            x_BHWC = Conv(self.features, axes, dtype=self.dtype, name="upsample")(twice)
        return x_BHWC


class Encoder(nn.Module):
    """Images [B, H, W, 3] → [B, h, w, moments c].

    Attributes:
      moments: 2 for mean and log-variance of the latents, 1 for the latents themselves.
    """

    config: settings.Autoencoder
    dtype: Any = None
    remat: bool = False
    moments: int = 2

    @nn.compact
    def __call__(self, x_BHWC):
        s, widths = self.config, self.config.block_out_channels
        x_BHWC = Conv(widths[0], ("patch", "embed"), dtype=self.dtype, name="conv_in")(x_BHWC)
        for i, width in enumerate(widths):
            change = "down" if i + 1 < len(widths) else ""
            options = (s.norm_groups, change, self.dtype, self.remat)
            level = Level(width, s.layers_per_block, *options, name=f"down_{i}")
            x_BHWC = level(x_BHWC)
        x_BHWC = Middle(s.norm_groups, self.dtype, self.remat, name="mid")(x_BHWC)
        x_BHWC = nn.silu(GroupNorm(s.norm_groups, "embed", name="norm_out")(x_BHWC))
        return Conv(self.moments * s.latent_channels, ("embed", "patch"), dtype=self.dtype, name="conv_out")(x_BHWC)


class Decoder(nn.Module):
    """Latents [B, h, w, c] → images [B, H, W, 3]; one residual block more per resolution than the encoder."""

    config: settings.Autoencoder
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, x_BHWC):
        s, widths = self.config, self.config.block_out_channels[::-1]
        x_BHWC = Conv(widths[0], ("patch", "embed"), dtype=self.dtype, name="conv_in")(x_BHWC)
        x_BHWC = Middle(s.norm_groups, self.dtype, self.remat, name="mid")(x_BHWC)
        for i, width in enumerate(widths):
            change = "up" if i + 1 < len(widths) else ""
            options = (s.norm_groups, change, self.dtype, self.remat)
            level = Level(width, s.layers_per_block + 1, *options, name=f"up_{i}")
            x_BHWC = level(x_BHWC)
        x_BHWC = nn.silu(GroupNorm(s.norm_groups, "embed", name="norm_out")(x_BHWC))
        return Conv(_IMAGE_CHANNELS, ("embed", "patch"), dtype=self.dtype, name="conv_out")(x_BHWC)


class Autoencoder(nn.Module):
    """See the module's docstring. Latents here are raw; `normalize` brings them to about unit scale.

    Attributes:
      config: sizes; `PRESETS` has the published ones.
      dtype: of the activations; None follows the inputs.
      remat: compute a residual block again for its gradient rather than keep what it computed.
    """

    config: settings.Autoencoder
    dtype: Any = None
    remat: bool = False

    def setup(self):
        s = self.config
        self.encoder = Encoder(s, self.dtype, self.remat)
        self.decoder = Decoder(s, self.dtype, self.remat)
        if s.use_quant_conv:
            axes = ("patch", "patch")
            self.quant_conv = Conv(2 * s.latent_channels, axes, size=1, dtype=self.dtype)
            self.post_quant_conv = Conv(s.latent_channels, axes, size=1, dtype=self.dtype)

    def encode(self, images_BHWC) -> Posterior:
        """Images [B, H, W, 3] in [-1, 1] → (mean, logvar), each [B, h, w, c] and at least fp32.

        H and W are multiples of `downsampling(config)`.
        """
        x_Bhwc = self.encoder(images_BHWC)
        if self.config.use_quant_conv:
            x_Bhwc = self.quant_conv(x_Bhwc)
        x_Bhwc = x_Bhwc.astype(jnp.promote_types(x_Bhwc.dtype, jnp.float32))
        mean, logvar = jnp.split(x_Bhwc, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, *_LOGVAR_RANGE))

    def decode(self, latents_Bhwc):
        """Raw latents [B, h, w, c] → images [B, H, W, 3], at least fp32, not clipped."""
        if self.config.use_quant_conv:
            latents_Bhwc = self.post_quant_conv(latents_Bhwc)
        x_BHWC = self.decoder(latents_Bhwc)
        return x_BHWC.astype(jnp.promote_types(x_BHWC.dtype, jnp.float32))

    def __call__(self, images_BHWC):
        """Images → images through the mode. Also what touches every parameter once, for `init`."""
        return self.decode(self.encode(images_BHWC).mode())


def check(config: settings.Autoencoder, name: str) -> None:
    """Raises UserError if these sizes, called `name` in the settings, are of no network."""
    uneven = [w for w in config.block_out_channels if w < 1 or w % config.norm_groups]
    if uneven or not config.block_out_channels:
        raise UserError(
            f"config: {name}.block_out_channels={config.block_out_channels} must be multiples of "
            f"{name}.norm_groups={config.norm_groups}"
        )


def check_divides(config: settings.Autoencoder, image_size: int) -> None:
    """Raises UserError if images of this size do not become whole latents."""
    if image_size % downsampling(config):
        raise UserError(
            f"config: data.image_size={image_size} is not a multiple of {downsampling(config)}, "
            f"by which {len(config.block_out_channels)} levels of the autoencoder reduce it"
        )


def downsampling(config: settings.Autoencoder) -> int:
    """H / h."""
    return 2 ** (len(config.block_out_channels) - 1)


def normalize(config: settings.Autoencoder, latents):
    """Raw latents → about zero mean and unit scale, any shape."""
    return (latents - config.shift_factor) * config.scaling_factor


def denormalize(config: settings.Autoencoder, latents):
    """The inverse of `normalize`."""
    return latents / config.scaling_factor + config.shift_factor


def init(config: settings.Autoencoder, rng):
    """Fresh parameters: a tree of `params.Box`."""
    size = downsampling(config)
    return Autoencoder(config).init(rng, jnp.zeros((1, size, size, _IMAGE_CHANNELS)))["params"]
