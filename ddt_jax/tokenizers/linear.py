"""The smallest tokenizer with every kind of state: a linear map to K features, a codebook, a linear map back.

For tests of the training machinery: it compiles in a moment, learns quickly, and has parameters of both optimizer
groups, a codebook with moving averages and revival, randomness about each example, and optional batch statistics.

Legend: B batch, K tokens, D code dimension, W width, P pixels of an image (H W C).
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn import params as declared
from ddt_jax.nn.quantize import VectorQuantizer
from ddt_jax.tokenizers import base

_CHANNELS = 3
_NOISE = 0.01  # added to the pixels in training, so that a wrong key shows in the loss


class _Maps(nn.Module):
    """Linear encoder and decoder through a shared hidden width."""

    num_tokens: int
    code_dim: int
    width: int
    pixels: int

    def setup(self):
        init = nn.initializers.lecun_normal()
        features = self.num_tokens * self.code_dim
        wide = functools.partial(declared.declare, init, group="matrix", matrix=((-2,), (-1,)))
        self.down = self.param("down", wide(axes=("patch", "mlp")), (self.pixels, self.width))
        self.to_code = self.param("to_code", wide(axes=("mlp", "code")), (self.width, features))
        self.from_code = self.param("from_code", wide(axes=("code", "mlp")), (features, self.width))
        self.up = self.param("up", wide(axes=("mlp", "patch")), (self.width, self.pixels))
        zeros = declared.declare(nn.initializers.zeros, ("patch",), decay=False)
        self.bias = self.param("bias", zeros, (self.pixels,))

    def encode(self, x_BP):
        return ((x_BP - self.bias) @ self.down @ self.to_code).reshape(-1, self.num_tokens, self.code_dim)

    def decode(self, z_BKD):
        return z_BKD.reshape(z_BKD.shape[0], -1) @ self.from_code @ self.up + self.bias

    def __call__(self, x_BP):
        return self.decode(self.encode(x_BP))


class LinearTokenizer(base.ImageTokenizer):
    """See the module's docstring. `decode` zeroes the tokens after the first num_visible."""

    def __init__(self, config: settings.LinearTokenizer, image_size: int, batch_size: int):
        self.config = config
        self.image_size = image_size
        self.num_tokens = config.num_tokens
        self.codebook_size = config.quantizer.codebook_size
        self.loss_weights = {"reconstruction": 1.0, "commitment": config.quantizer.commitment}
        self.quantizer = VectorQuantizer(config.quantizer, config.num_tokens, batch_size)
        self.loss_weights |= self.quantizer.loss_weights
        self.cross_example_terms = self.quantizer.cross_example_terms
        self._maps = _Maps(
            num_tokens=config.num_tokens,
            code_dim=config.quantizer.code_dim,
            width=config.width,
            pixels=math.prod(self._image_shape),
        )

    @property
    def _image_shape(self):
        return (self.image_size, self.image_size, _CHANNELS)

    def init(self, rng):
        params_key, codes_key = jax.random.split(rng)
        variables = self._maps.init(params_key, jnp.zeros((1, math.prod(self._image_shape))))
        return variables["params"], {"codebook": self.quantizer.init(codes_key)}

    def loss_fn(self, params, extra, batch, rng):
        x_BP = base.to_float(batch["image"]).reshape(batch["image"].shape[0], -1)
        noise_key, codes_key = jax.random.split(rng)
        keys = base.example_keys(noise_key, batch["slot"])
        noise_BP = jax.vmap(lambda key: jax.random.normal(key, x_BP.shape[1:], x_BP.dtype))(keys)
        z_BKD = self._apply(params, x_BP + _NOISE * noise_BP, "encode")
        codes_BKD, _, commitment_BK, stats = self.quantizer.quantize(extra["codebook"], z_BKD, batch["slot"], codes_key)
        y_BP = self._apply(params, codes_BKD, "decode")
        sums = {
            "reconstruction": jnp.sum(jnp.mean(jnp.square(y_BP - x_BP), axis=-1)),
            "commitment": commitment_BK.sum(),
        }
        counts = {"reconstruction": jnp.float32(x_BP.shape[0]), "commitment": jnp.float32(commitment_BK.size)}
        diversity = self.quantizer.diversity_terms(extra["codebook"], z_BKD, stats)
        return sums | diversity, counts | dict.fromkeys(diversity, jnp.float32(1)), {"codebook": stats}

    def update_extra(self, extra, stats, rng):
        del rng  # the candidates for revival were drawn in loss_fn
        return {"codebook": self.quantizer.update(extra["codebook"], stats["codebook"])}

    def encode(self, params, extra, images_BHWC):
        x_BP = images_BHWC.reshape(images_BHWC.shape[0], -1)
        return self.quantizer.encode(extra["codebook"], self._apply(params, x_BP, "encode"))

    def decode(self, params, extra, codes_BK, rng, *, num_visible=None, steps=None):
        del rng, steps
        z_BKD = self.quantizer.lookup(extra["codebook"], codes_BK)
        if num_visible is not None:
            shown = jnp.arange(self.num_tokens) < jnp.reshape(num_visible, (-1, 1))
            z_BKD = jnp.where(shown[..., None], z_BKD, 0)
        return jnp.clip(self._apply(params, z_BKD, "decode"), -1, 1).reshape(-1, *self._image_shape)

    def extra_metrics(self, extra):
        return self.quantizer.metrics(extra["codebook"])

    def _apply(self, params, x, method):
        return self._maps.apply({"params": params}, x, method=method)
