"""ACDiT (arXiv 2412.07720): images and clips are drawn block by block, each denoised beside the clean blocks before it.

One number goes from token-wise autoregression (blocks of one token) to full-sequence diffusion (one block). In a step
all blocks are learned at once, each at a noise level of its own (`nn/acdit.py`). It has no codes, so it is no image
tokenizer; it is trained, kept and restored as one.

Legend: B batch, N blocks, R tokens of a block, L = N R tokens of an image or a clip, P values of a token; T frames of a
clip, H, W, C an image or a frame, h, w, c its latent.
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
      tokens, blocks: of an image or a clip, L and N.
      network: the module; its parameters are all that is trained.

    Raises:
      UserError: for settings that do not go together.
    """

    measured = "drawing"
    caption_dtype = jnp.uint8

    def __init__(self, config: settings.ACDiT, image_size: int, batch_size: int, frames: int = 0):
        del batch_size
        self.config = config
        self.image_size = image_size
        self.frames = frames
        self.codec = make_codec(config.codec)
        self.process = make_process(config.diffusion)
        self.classes, self.caption_length = config.classes, config.caption_bytes
        self.loss_weights = {"diffusion": 1.0}
        self._latent_side = image_size // self.codec.downsampling
        side = self._check(image_size)
        self._frame_tokens = side * side
        self.tokens = self._frame_tokens * (frames or 1)
        self.blocks = self.tokens // config.block_size
        self._values = config.patch_size**2 * self.codec.channels
        self._order = square_blocks.order(side, config.block_size, frames or 1)
        self.network = acdit.Network(config, side, self._values, frames)

    def _check(self, image_size) -> int:
        """Tokens of a side of the image, or of a frame."""
        c = self.config
        if image_size % (self.codec.downsampling * c.patch_size):
            raise UserError(
                f"config: model.patch_size={c.patch_size} does not divide data.image_size={image_size} "
                f"(reduced {self.codec.downsampling}x by the codec); choose a divisor of {self._latent_side}"
            )
        side = self._latent_side // c.patch_size
        if c.block_size not in (sizes := square_blocks.sizes(side, self.frames or 1)):
            whole = f", nor whole frames that divide {self.frames}" if self.frames else ""
            raise UserError(
                f"config: model.block_size={c.block_size} is no square that divides {side} x {side} tokens{whole}; "
                f"choose from {', '.join(map(str, sizes))}"
            )
        if c.width % c.heads:
            raise UserError(f"config: model.width={c.width} is not a multiple of model.heads={c.heads}")
        try:
            rope_nd.split(c.width // c.heads, 3 if self.frames else 2)
        except ValueError as error:
            raise UserError(f"config: model.width={c.width}, model.heads={c.heads}: {error}") from None
        if c.classes < 0 or not 0 <= c.label_drop <= 1:
            raise UserError(
                f"config: model.classes={c.classes} must not be negative, model.label_drop={c.label_drop} lie in [0, 1]"
            )
        if c.caption_bytes < 0 or c.caption_depth < 1:
            raise UserError(
                f"config: model.caption_bytes={c.caption_bytes} must not be negative, "
                f"model.caption_depth={c.caption_depth} at least 1"
            )
        return side

    def init(self, rng):
        network_key, codec_key = jax.random.split(rng)
        tokens_1LP = jnp.zeros((1, self.tokens, self._values))
        told = jnp.zeros((1,), jnp.int32), self._no_text(1)
        example = (tokens_1LP, tokens_1LP, jnp.zeros((1, self.blocks)), *told)
        return self.network.init(network_key, *example)["params"], self.codec.init(codec_key)

    def loss_fn(self, params, extra, batch, rng):
        """See `ImageModel.loss_fn`; where there are classes, a batch has `label` int32 [b], -1 for none, and where
        there are captions `caption_ids` uint8 [b, caption_bytes], zeros behind the text. The terms:

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
        clean_BLP, noise_BLP, t_BN, *told = self.draw(extra, batch, keys_B, drop)
        clean, noise = (x.reshape(*t_BN.shape, -1, self._values) for x in (clean_BLP, noise_BLP))
        noised_BLP = self.process.noised(clean, noise, t_BN).reshape(clean_BLP.shape)
        predicted = self.network.apply({"params": params}, clean_BLP, noised_BLP, t_BN, *told).reshape(clean.shape)
        return jnp.mean(jnp.square(predicted - self.process.target(clean, noise, t_BN)), axis=(2, 3)), t_BN

    def draw(self, extra, batch, keys_B, drop: float = 0.0):
        """What errors are measured at.

        Returns:
          (clean tokens and noise [B, L, P] in the order of blocks, noise level of each block [B, N], labels [B] and
          captions [B, Z] as the network takes them: the null class and zeros where there is none; None: no captions).
        """

        def of_image(key):
            t_key, noise_key, codec_key, label_key = jax.random.split(key, 4)
            noise_LP = jax.random.normal(noise_key, (self.tokens, self._values))
            return paths.uniform(t_key, self.blocks), noise_LP, codec_key, jax.random.uniform(label_key) < drop

        uniform_BN, noise_BLP, codec_keys_B, dropped_B = jax.vmap(of_image)(keys_B)
        label_B = jnp.where(dropped_B, self.classes, self.labels(batch))
        text_BZ = jnp.where(dropped_B[:, None], 0, batch["caption_ids"]) if self.config.caption_bytes else None
        clean_BLP = self._latent_tokens(extra, batch, codec_keys_B)
        return clean_BLP, noise_BLP, self.process.draw(uniform_BN), label_B, text_BZ

    def labels(self, batch):
        """Labels of a batch as the network takes them, int32 [B]."""
        if not self.classes:
            return jnp.zeros(batch["slot"].shape, jnp.int32)
        label_B = batch["label"]
        return jnp.where((label_B >= 0) & (label_B < self.classes), label_B, self.classes)

    @property
    def probe_depth(self) -> int:
        """After how many layers `features` are taken: half of them, as the last ones are busy with noise."""
        return max(1, self.config.depth // 2)

    def features(self, params, extra, batch, keys_B):
        """What the network makes of clean images: the mean over their tokens after `probe_depth` layers, f32 [B, D]."""
        config = replace(self.config, depth=self.probe_depth, scan_layers=False, remat="none")
        tokens_BLP = self._latent_tokens(extra, batch, keys_B)
        module, variables = self.network.clone(config=config), {"params": unrolled(params)}
        rows_BLD = module.apply(variables, tokens_BLP, method="clean_rows")
        return jnp.mean(rows_BLD.astype(jnp.float32), axis=1)

    def _no_text(self, rows: int):
        z = self.config.caption_bytes
        return jnp.zeros((rows, z), jnp.uint8) if z else None

    def check_length(self, frames: int) -> None:
        """Raises UserError unless clips of so many frames can be drawn."""
        c, of_frame = self.config, self._frame_tokens
        if not self.frames:
            raise UserError(f"config: the run's data.frames=0, so it draws images, not clips of {frames} frames")
        if frames < 1 or frames * of_frame % c.block_size:
            raise UserError(
                f"config: {frames} frames are no whole number of blocks of {c.block_size // of_frame or 1} frames; "
                "choose a multiple"
            )
        if frames > self.frames and (self.blocks == 1 or c.block_size % of_frame):
            raise UserError(
                f"config: clips of {frames} frames, more than data.frames={self.frames}, need blocks of whole frames "
                f"and more than one of them; model.block_size={c.block_size} with {of_frame} tokens in a frame gives "
                f"{self.blocks}; draw {self.frames} frames"
            )

    def sample(self, params, extra, label_B, keys_B, frames: int = 0, text_BZ=None):
        """Images float [B, H, W, C] in [-1, 1], or clips [B, T, H, W, C], block by block beside a cache of clean ones.

        The first solver step of a block also brings the block before it into the cache (§4.2). Guidance shares the
        cache, which knows no labels and captions. A picture depends on its own and its key alone, not on its batch.

        A clip longer than those that were learned is drawn through a window of them: every further block is the last
        one of a clip whose other blocks are the N - 1 before it. Their keys and values are computed anew at their new
        places (in the pass of the first step), so that the network meets nothing it was not trained on; it knows
        nothing of what has left the window. One program, of the same size for any number of blocks.

        Args:
          label_B: int32 [B], `classes` for none.
          keys_B: a key of each image.
          frames: T, static; 0: as many as were learned. See `check_length`.
          text_BZ: captions as in a batch; zeros, or None, for none.
        """
        c, n, r = self.config, self.blocks, self.config.block_size
        total = (frames * self._frame_tokens // r) if frames else n
        module = self.network.clone(config=replace(c, scan_layers=False, remat="none"))
        variables = {"params": unrolled(params)}
        b = len(label_B)
        nothing = (jnp.full_like(label_B, self.classes), self._no_text(b))
        given = (label_B, nothing[1] if text_BZ is None else text_BZ)
        told_BD, untold_BD = (module.apply(variables, *words, method="told") for words in (given, nothing))
        guided = c.guidance != 1 and told_BD is not None

        def draw_block(i, clean_BSP, cache):
            """Block i, and the cache with the clean blocks right before it; None: there are none to bring in."""
            number = jnp.minimum(i, n - 1)
            keys_B2 = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, i)))(keys_B)
            noise_BRP = jax.vmap(lambda key: jax.random.normal(key, (r, self._values)))(keys_B2[:, 0])

            def of(x_BRP, t, told_BD, cache):
                t_B = jnp.broadcast_to(t, (b,))
                return module.apply(variables, x_BRP, t_B, told_BD, number, cache, method="denoise")

            def guide(predicted, x_BRP, t, cache):
                return solvers.guide(predicted, of(x_BRP, t, untold_BD, cache), c.guidance) if guided else predicted

            first = None
            if clean_BSP is not None:
                at_start = (clean_BSP, noise_BRP, jnp.ones((b,)), told_BD, number, cache)
                first, cache = module.apply(variables, *at_start, method="denoise_after")
                first = guide(first, noise_BRP, jnp.float32(1), cache)

            def predict(x_BRP, t):
                return guide(of(x_BRP, t, told_BD, cache), x_BRP, t, cache)

            return self.process.solve(predict, noise_BRP, keys_B2[:, 1], first=first), cache

        def go_on(before: int):
            """A loop's body that draws a block, with so many clean ones before it brought into the cache."""

            def one(i, carry):
                cache, drawn_BLP = carry
                clean_BSP = jax.lax.dynamic_slice_in_dim(drawn_BLP, (i - before) * r, before * r, axis=1)
                block_BRP, cache = draw_block(i, clean_BSP, cache)
                return cache, jax.lax.dynamic_update_slice(drawn_BLP, block_BRP, (0, i * r, 0))

            return one

        dtype = compute_dtype(c.dtype) or variables["params"]["into"]["kernel"].dtype
        cache = kv_cache.empty(c.depth, (b, c.heads, self.tokens, c.width // c.heads), dtype, stacked=False)
        block_BRP, cache = draw_block(jnp.int32(0), None, cache)
        carry = cache, jnp.zeros((b, total * r, self._values)).at[:, :r].set(block_BRP)
        if min(n, total) > 1:
            carry = jax.lax.fori_loop(1, min(n, total), go_on(1), carry)
        if total > n:
            carry = jax.lax.fori_loop(n, total, go_on(n - 1), carry)
        return self._pictures(extra, carry[1])

    def latents(self, extra, batch, keys_B):
        """What the codec makes of a batch's images [B, h, w, c], or clips, frame by frame as published [B, T, h, w, c];
        of kept latents (`data/latents.py`) the same."""
        name = next(name for name in ("image", "video", "latent_mean") if name in batch)
        lead = batch[name].shape[:-3]
        if self.frames:
            keys_B = jax.vmap(lambda key: jax.random.split(key, self.frames))(keys_B).reshape(-1)

        def of_each(name):
            return batch[name].reshape(-1, *batch[name].shape[-3:])

        if name == "latent_mean":
            kept = (of_each(name).astype(jnp.float32) for name in ("latent_mean", "latent_logvar"))
            latents = self.codec.draw(*kept, keys_B)
        else:
            latents = self.codec.encode(extra.get("codec"), base.to_float(of_each(name)), keys_B)
        return latents.reshape(*lead, *latents.shape[1:])

    def in_blocks(self, latents):
        """Tokens of latents as the network takes them, [B, L, P]."""
        patches = patchify(latents.reshape(-1, *latents.shape[-3:]), self.config.patch_size)
        return patches.reshape(len(latents), self.tokens, -1)[:, self._order]

    def _latent_tokens(self, extra, batch, keys_B):
        return self.in_blocks(self.latents(extra, batch, keys_B))

    def _pictures(self, extra, tokens_BLP):
        """Images, or clips of however many frames there are tokens of."""
        b, t = len(tokens_BLP), tokens_BLP.shape[1] // self._frame_tokens
        order_L = square_blocks.order(self.network.side, self.config.block_size, t)
        raster_FLP = tokens_BLP[:, square_blocks.inverse(order_L)].reshape(b * t, self._frame_tokens, -1)
        latents_Fhwc = unpatchify(raster_FLP, self.config.patch_size, self._latent_side)
        images_FHWC = jnp.clip(self.codec.decode(extra.get("codec"), latents_Fhwc), -1, 1)
        return images_FHWC.reshape(b, t, *images_FHWC.shape[1:]) if self.frames else images_FHWC
