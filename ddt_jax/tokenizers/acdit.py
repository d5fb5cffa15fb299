"""ACDiT (arXiv 2412.07720): an image is drawn block by block, each denoised beside the clean blocks before it.

One number goes from token-wise autoregression (blocks of one token) to full-sequence diffusion (one block). In a step
all blocks are learned at once, each at a noise level of its own (`nn/acdit.py`). It has no codes, so it is no image
tokenizer; it is trained, kept and restored as one.

Legend: B batch, N blocks, R tokens of a block, L = N R tokens of an image, P values of a token; H, W, C an image,
h, w, c its latent.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.diffusion import paths, solvers
from ddt_jax.diffusion.process import by_noise_level, make_process
from ddt_jax.errors import UserError
from ddt_jax.nn import acdit, kv_cache, rope_nd, square_blocks
from ddt_jax.nn.blocks import unrolled
from ddt_jax.nn.codec import make_codec
from ddt_jax.nn.images import patchify, unpatchify
from ddt_jax.nn.layers import compute_dtype
from ddt_jax.tokenizers import base


class ACDiT(base.ImageModel):
    """See the module's docstring.

    Attributes:
      codec, process: between pixels and latents; of noise.
      classes: how many labels there are; 0: batches have none.
      tokens, blocks: of an image, L and N.
      network: the module; its parameters are all that is trained.

    Raises:
      UserError: for settings that do not go together.
    """

    def __init__(self, config: settings.ACDiT, image_size: int, batch_size: int):
        del batch_size
        self.config = config
        self.image_size = image_size
        self.codec = make_codec(config.codec)
        self.process = make_process(config.diffusion)
        self.classes = config.classes
        self.loss_weights = {"diffusion": 1.0}
        self._latent_side = image_size // self.codec.downsampling
        side = self._check(image_size)
        self.tokens = side * side
        self.blocks = self.tokens // config.block_size
        self._values = config.patch_size**2 * self.codec.channels
        self._order = square_blocks.order(side, config.block_size)
        self.network = acdit.Network(config, side, self._values)

    def _check(self, image_size) -> int:
        """Tokens of a side of the image."""
        c = self.config
        if image_size % (self.codec.downsampling * c.patch_size):
            raise UserError(
                f"config: model.patch_size={c.patch_size} does not divide data.image_size={image_size} "
                f"(reduced {self.codec.downsampling}x by the codec); choose a divisor of {self._latent_side}"
            )
        side = self._latent_side // c.patch_size
        if c.block_size not in (sizes := square_blocks.sizes(side)):
            raise UserError(
                f"config: model.block_size={c.block_size} is no square that divides {side} x {side} tokens; "
                f"choose from {', '.join(map(str, sizes))}"
            )
        if c.width % c.heads:
            raise UserError(f"config: model.width={c.width} is not a multiple of model.heads={c.heads}")
        try:
            rope_nd.split(c.width // c.heads, 2)
        except ValueError as error:
            raise UserError(f"config: model.width={c.width}, model.heads={c.heads}: {error}") from None
        if c.classes < 0 or not 0 <= c.label_drop <= 1:
            raise UserError(
                f"config: model.classes={c.classes} must not be negative, model.label_drop={c.label_drop} lie in [0, 1]"
            )
        return side

    def init(self, rng):
        network_key, codec_key = jax.random.split(rng)
        tokens_1LP = jnp.zeros((1, self.tokens, self._values))
        example = (tokens_1LP, tokens_1LP, jnp.zeros((1, self.blocks)), jnp.zeros((1,), jnp.int32))
        return self.network.init(network_key, *example)["params"], self.codec.init(codec_key)

    def loss_fn(self, params, extra, batch, rng):
        """See `ImageModel.loss_fn`; where there are classes, a batch has `label` int32 [b], -1 for none. The terms:

        diffusion: squared error of the prediction, mean over all values of all blocks; with `min_snr` times its weight.
        mse_t25, mse_t50, mse_t75, mse_t100: the same without weights, of blocks at noise levels up to 0.25, ...
        """
        keys_B = base.example_keys(rng, batch["slot"])
        error_BN, t_BN = self.errors(params, extra, batch, keys_B, drop=self.config.label_drop)
        sums = {"diffusion": jnp.sum(error_BN * self.process.weight(t_BN))}
        counts = {"diffusion": jnp.float32(error_BN.size)}
        for name, here_BN in by_noise_level(t_BN).items():
            sums[name] = jnp.sum(jnp.where(here_BN, error_BN, 0))
            counts[name] = jnp.sum(here_BN, dtype=jnp.float32)
        return sums, counts, {}

    def update_extra(self, extra, stats, rng):
        del stats, rng
        return extra

    def errors(self, params, extra, batch, keys_B, drop: float = 0.0):
        """Mean squared error of the prediction of each block, and the noise level it was made at, [B, N] each.

        Args:
          keys_B: of each example: its noise levels, its noise, what its codec draws, whether its label is dropped.
          drop: share of the labels that are.
        """
        clean_BLP, noise_BLP, t_BN, label_B = self.draw(extra, batch, keys_B, drop)
        clean, noise = (x.reshape(*t_BN.shape, -1, self._values) for x in (clean_BLP, noise_BLP))
        noised_BLP = self.process.noised(clean, noise, t_BN).reshape(clean_BLP.shape)
        predicted = self.network.apply({"params": params}, clean_BLP, noised_BLP, t_BN, label_B).reshape(clean.shape)
        return jnp.mean(jnp.square(predicted - self.process.target(clean, noise, t_BN)), axis=(2, 3)), t_BN

    def draw(self, extra, batch, keys_B, drop: float = 0.0):
        """What errors are measured at.

        Returns:
          (clean tokens and noise [B, L, P] in the order of blocks, noise level of each block [B, N], labels [B] as the
          network takes them: the null class where there is none).
        """

        def of_image(key):
            t_key, noise_key, codec_key, label_key = jax.random.split(key, 4)
            noise_LP = jax.random.normal(noise_key, (self.tokens, self._values))
            return paths.uniform(t_key, self.blocks), noise_LP, codec_key, jax.random.uniform(label_key) < drop

        uniform_BN, noise_BLP, codec_keys_B, dropped_B = jax.vmap(of_image)(keys_B)
        label_B = jnp.where(dropped_B, self.classes, self.labels(batch))
        return self._latent_tokens(extra, batch, codec_keys_B), noise_BLP, self.process.draw(uniform_BN), label_B

    def labels(self, batch):
        """Labels of a batch as the network takes them, int32 [B]."""
        if not self.classes:
            return jnp.zeros(batch["slot"].shape, jnp.int32)
        label_B = batch["label"]
        return jnp.where((label_B >= 0) & (label_B < self.classes), label_B, self.classes)

    def sample(self, params, extra, label_B, keys_B):
        """Images float [B, H, W, C] in [-1, 1], drawn block by block beside a cache of what is clean.

        Guidance shares the cache, which knows no labels. A picture depends on its label and key alone, not on its
        batch. One program: all blocks but the last run through one loop's body.

        Args:
          label_B: int32 [B], `classes` for none.
          keys_B: a key of each image.
        """
        c = self.config
        module = acdit.Network(replace(c, scan_layers=False, remat="none"), self.network.side, self._values)
        variables = {"params": unrolled(params)}
        guided = c.guidance != 1 and self.classes

        def draw_block(number, cache):
            keys_B2 = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, number)))(keys_B)
            shape = (c.block_size, self._values)
            noise_BRP = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B2[:, 0])

            def predict(x_BRP, t):
                def of(label_B):
                    t_B = jnp.broadcast_to(t, label_B.shape)
                    return module.apply(variables, x_BRP, t_B, label_B, number, cache, method="denoise")

                if not guided:
                    return of(label_B)
                return solvers.guide(of(label_B), of(jnp.full_like(label_B, self.classes)), c.guidance)

            return self.process.solve(predict, noise_BRP, keys_B2[:, 1])

        def one(number, carry):
            cache, drawn_BLP = carry
            block_BRP = draw_block(number, cache)
            cache = module.apply(variables, block_BRP, number, cache, method="commit")
            return cache, jax.lax.dynamic_update_slice(drawn_BLP, block_BRP, (0, number * c.block_size, 0))

        b, last = len(label_B), self.blocks - 1
        dtype = compute_dtype(c.dtype) or variables["params"]["into"]["kernel"].dtype
        cache = kv_cache.empty(c.depth, (b, c.heads, self.tokens, c.width // c.heads), dtype, stacked=False)
        drawn_BLP = jnp.zeros((b, self.tokens, self._values))
        if last:
            cache, drawn_BLP = jax.lax.fori_loop(0, last, one, (cache, drawn_BLP))
        drawn_BLP = drawn_BLP.at[:, last * c.block_size :].set(draw_block(jnp.int32(last), cache))
        return self._images(extra, drawn_BLP)

    def _latent_tokens(self, extra, batch, keys_B):
        if "image" in batch:
            latents_Bhwc = self.codec.encode(extra.get("codec"), base.to_float(batch["image"]), keys_B)
        else:  # kept from before
            kept = (batch[name].astype(jnp.float32) for name in ("latent_mean", "latent_logvar"))
            latents_Bhwc = self.codec.draw(*kept, keys_B)
        return patchify(latents_Bhwc, self.config.patch_size)[:, self._order]

    def _images(self, extra, tokens_BLP):
        raster_BLP = tokens_BLP[:, square_blocks.inverse(self._order)]
        latents_Bhwc = unpatchify(raster_BLP, self.config.patch_size, self._latent_side)
        return jnp.clip(self.codec.decode(extra.get("codec"), latents_Bhwc), -1, 1)
