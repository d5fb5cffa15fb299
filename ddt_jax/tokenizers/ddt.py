"""The DDT tokenizer: an encoder that writes an image into K codes, and a flow decoder that sees few of them at one
noise level and more at another, so that the codes come in an order.

The parts are options of the same modules. The quickstart's choice (coupling by cross-attention, linear mix paths, x0
prediction with a plain squared error, ladder of visible tokens at high noise) is what trains
in minutes on two CPU cores; Selftok's (arXiv 2505.07538: joint blocks, velocity, piecewise schedule with the opposite
direction) is in the settings as well. `kind: selftok` puts the published networks in the place of the small ones.
A renderer (`decoder.kind`) takes the place of the flow decoder in a second stage, in which codes stand.

Legend: B batch, K tokens, N patches, P values of a patch, D width, d code dimension; H, W, C height, width and channels
of the latent.
"""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import settings
from ddt_jax.diffusion import paths, prediction, solvers, time
from ddt_jax.diffusion.token_schedule import TokenSchedule, weigh_gradients
from ddt_jax.errors import UserError
from ddt_jax.nn import blocks, embeddings, layers, spans
from ddt_jax.nn.codec import make_codec
from ddt_jax.nn.images import patchify, unpatchify
from ddt_jax.nn.params import in_group
from ddt_jax.nn.quantize import VectorQuantizer
from ddt_jax.tokenizers import base, selftok_networks
from ddt_jax.tokenizers.image_loss import ImageLoss

# What decides the codes of an image, by name in the state: all that a second stage leaves as it is.
_CODES = ("params/encoder", "params/code_norm", "extra/codebook", "extra/codec")
_CODEC = 2  # folded into a key for what the codec draws; 0 and 1 would give the two keys that split does
_JUDGES = 3  # the same for a discriminator


class Encoder(nn.Module):
    """Patches [B, N, P] → features [B, K, d] of K learned queries that attend with the patches."""

    config: settings.DDTTokenizer

    @nn.compact
    def __call__(self, patches_BNP):
        c, dtype = self.config, layers.compute_dtype(self.config.dtype)
        b, n, _ = patches_BNP.shape
        x_BND = layers.Dense((c.width,), ("patch", "embed"), dtype=dtype, name="embed")(patches_BNP)
        x_BND = x_BND + embeddings.learned(self, "positions", n, c.width).astype(x_BND.dtype)
        queries_KD = embeddings.learned(self, "queries", c.num_tokens, c.width).astype(x_BND.dtype)
        queries_BKD = jnp.broadcast_to(queries_KD, (b, *queries_KD.shape))
        x_BSD = jnp.concatenate([x_BND, queries_BKD], axis=1)
        make = functools.partial(blocks.EncoderBlock, c.heads, c.mlp_ratio, c.qk_norm, dtype)
        stack = blocks.Stack(make, c.encoder_depth, c.scan_layers, name="blocks")
        x_BSD = layers.LayerNorm(name="norm")(stack(x_BSD, spans.full(x_BSD.shape[1])))
        code_dim = c.quantizer.code_dim
        z_BKd = layers.Dense((code_dim,), ("embed", "code"), dtype=dtype, name="to_code")(x_BSD[:, n:])
        if c.mix:
            axes = (None, "embed", None, "code")
            z_BKd = z_BKd + layers.Dense(
                (c.num_tokens, code_dim), axes, inputs=2, use_bias=False, dtype=dtype, name="mix"
            )(x_BSD[:, :n])
        return z_BKd


class Decoder(nn.Module):
    """Noised patches, noise level and the codes' vectors → prediction [B, N, P]; as a renderer → x0.

    A renderer has a learned canvas for its patches, of which only the shape counts.
    """

    config: settings.DDTTokenizer

    @nn.compact
    def __call__(self, patches_BNP, t_B, codes_BKd, start_B, end_B):
        """start_B, end_B: tokens [start, end) are visible. What a hidden token holds has no effect at all."""
        c, dtype = self.config, layers.compute_dtype(self.config.dtype)
        n, p = patches_BNP.shape[1:]
        k = c.num_tokens
        index_K = jnp.arange(k)
        shown_BK = (start_B[:, None] <= index_K) & (index_K < end_B[:, None])
        codes_BKd = jnp.where(shown_BK[..., None], codes_BKd, 0)
        if isinstance(c.decoder, settings.Renderer):
            canvas_ND = embeddings.learned(self, "canvas", 1 if c.decoder.repeat else n, c.width)
            x_BND = jnp.broadcast_to(canvas_ND, (codes_BKd.shape[0], n, c.width)).astype(dtype or codes_BKd.dtype)
        else:
            x_BND = layers.Dense((c.width,), ("patch", "embed"), dtype=dtype, name="embed")(patches_BNP)
        x_BND = x_BND + embeddings.learned(self, "positions", n, c.width).astype(x_BND.dtype)
        if c.mix:
            axes = (None, "code", None, "embed")
            x_BND = x_BND + layers.Dense((n, c.width), axes, inputs=2, use_bias=False, dtype=dtype, name="mix")(
                codes_BKd
            )
        condition_BD = embeddings.TimeEmbedding(c.width, dtype, name="time")(t_B)
        tokens_BKD = layers.Dense((2 * c.width,), ("code", "mlp"), dtype=dtype, name="token_up")(codes_BKd)
        tokens_BKD = layers.Dense((c.width,), ("mlp", "embed"), dtype=dtype, name="token_down")(nn.gelu(tokens_BKD))
        positions_KD = embeddings.learned(self, "token_positions", k, c.width).astype(tokens_BKD.dtype)
        visible = spans.tokens_and_patches(start_B, end_B, k, n)
        options = (c.heads, c.mlp_ratio, c.qk_norm)
        if c.coupling == "cross":
            tokens_BKD = layers.LayerNorm(name="token_norm")(tokens_BKD + positions_KD)
            make = functools.partial(blocks.CrossBlock, *options, dtype=dtype)
            stack = blocks.Stack(make, c.decoder_depth, c.scan_layers, name="blocks")
            x_BND = stack(x_BND, tokens_BKD, condition_BD, visible)
        else:
            # The tokens' stream knows its positions, not the time (Selftok's "time_adaln: pos_emb").
            positions_1KD = positions_KD[None]
            make = functools.partial(blocks.JointBlock, *options, dtype=dtype)
            stack = blocks.Stack(make, c.decoder_depth - 1, c.scan_layers, name="blocks")
            carry = stack((tokens_BKD + positions_1KD, x_BND), positions_1KD, condition_BD, visible)
            last = blocks.JointBlock(*options, pre_only=True, dtype=dtype, name="last_block")
            _, x_BND = last(carry, positions_1KD, condition_BD, visible)
        shift, scale = blocks.Modulation(2, dtype, name="final_adaln")(condition_BD)
        x_BND = blocks.modulate(layers.LayerNorm(affine=False)(x_BND), shift, scale)
        out_BNP = layers.zeros_dense((p,), ("embed", "patch"), dtype=dtype, name="final")(x_BND)
        return out_BNP.astype(jnp.promote_types(out_BNP.dtype, jnp.float32))


class Network(nn.Module):
    """Encoder and decoder, so that one tree holds both."""

    config: settings.DDTTokenizer

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, patches_BNP):
        return self.encoder(patches_BNP)

    def predict(self, patches_BNP, t_B, codes_BKd, start_B, end_B):
        return self.decoder(patches_BNP, t_B, codes_BKd, start_B, end_B)

    def __call__(self, patches_BNP):
        b = patches_BNP.shape[0]
        none = jnp.zeros((b,), jnp.int32)
        return self.predict(patches_BNP, jnp.zeros((b,)), self.encode(patches_BNP), none, none)


class DDTTokenizer(base.ImageTokenizer):
    """See the module's docstring."""

    def __init__(self, config: settings.DDTTokenizer | settings.SelftokTokenizer, image_size: int, batch_size: int):
        self.config = config
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_tokens = config.num_tokens
        self.codebook_size = config.quantizer.codebook_size
        self.codec = make_codec(config.codec)
        self._latent_size = image_size // self.codec.downsampling
        if image_size % (self.codec.downsampling * config.patch_size):
            raise UserError(
                f"model.patch_size: {config.patch_size} does not divide data.image_size {image_size} "
                f"(reduced {self.codec.downsampling}x by the codec); choose a divisor of {self._latent_size}"
            )
        if isinstance(config, settings.SelftokTokenizer):
            grid = (self._latent_size // config.patch_size,) * 2
            selftok_networks.check(config, grid)
            self._network = selftok_networks.Network(config, grid)
        else:
            if config.width % config.heads:
                raise UserError(f"model.heads: {config.heads} does not divide model.width {config.width}")
            self._network = Network(config)
        self.quantizer = VectorQuantizer(config.quantizer, config.num_tokens, batch_size)
        self._renders = isinstance(config.decoder, settings.Renderer)
        # One step looks at t = 1 alone, where every schedule in its direction shows all tokens, a known one or not.
        schedule = replace(config.schedule, kind="uniform", groups=0) if self._renders else config.schedule
        self.schedule = TokenSchedule(schedule, config.num_tokens)
        if self._renders:
            self.image_loss = ImageLoss(config.image_loss, image_size, config.dtype)
        self.loss_weights = dict(self.image_loss.loss_weights) if self._renders else {"flow": 1.0}
        if config.stage == "joint":
            self.loss_weights |= {"commitment": config.quantizer.commitment} | self.quantizer.loss_weights
            self.cross_example_terms = self.quantizer.cross_example_terms
        else:
            self.inherited = _CODES
        self.code_parts = _CODES
        self.token_order = "coarse_to_fine" if config.schedule.direction == "coarse_first" else "fine_to_coarse"

    @property
    def _latent_shape(self):
        return (self._latent_size, self._latent_size, self.codec.channels)

    def init(self, rng):
        params_key, codes_key = jax.random.split(rng)
        example = patchify(jnp.zeros((1, *self._latent_shape)), self.config.patch_size)
        extra = {"codebook": self.quantizer.init(codes_key), **self.codec.init(jax.random.fold_in(rng, _CODEC))}
        if isinstance(self.config, settings.SelftokTokenizer):
            extra["released"] = selftok_networks.init_released(self.config)
        params = self._network.init(params_key, example)["params"]
        if self.image_loss:
            more_params, more_extra = self.image_loss.init(jax.random.fold_in(rng, _JUDGES))
            params, extra = params | more_params, extra | more_extra
        stands = [name for name in params if f"params/{name}" in self.inherited]
        return params | {name: in_group(params[name], "frozen") for name in stands}, extra

    def check_trainable(self):
        self.schedule.check_known()

    def loss_fn(self, params, extra, batch, rng):
        slot_B = batch["slot"]
        images_BHWC = base.to_float(batch["image"]) if "image" in batch else None  # or latents, kept from before
        codes_key, examples_key = jax.random.split(rng)
        # What stands has no gradient: it would count in the norm that is clipped.
        params = {k: jax.lax.stop_gradient(v) if f"params/{k}" in self.inherited else v for k, v in params.items()}
        if self.config.stage == "joint":
            codec_keys_B = base.example_keys(jax.random.fold_in(rng, _CODEC), slot_B)
            if images_BHWC is None:
                x0_BNP = self._kept_patches(batch, codec_keys_B)
            else:
                x0_BNP = self._patches(extra, images_BHWC, codec_keys_B)
            z_BKd = self._apply(params, "encode", x0_BNP)
            codes_BKd, _, commitment_BK, stats = self.quantizer.quantize(extra["codebook"], z_BKd, slot_B, codes_key)
            sums = {"commitment": jnp.sum(commitment_BK)}
            counts = {"commitment": jnp.float32(commitment_BK.size)}
            diversity = self.quantizer.diversity_terms(extra["codebook"], z_BKd, stats)
            sums, counts = sums | diversity, counts | dict.fromkeys(diversity, jnp.float32(1))
            stats = {"codebook": stats}
        else:
            x0_BNP = self._kept_patches(batch) if images_BHWC is None else self._patches(extra, images_BHWC)
            codes_BK = self._codes(params, extra, x0_BNP)  # those of `encode`, bit for bit
            codes_BKd = self.quantizer.lookup(extra["codebook"], codes_BK)
            sums, counts, stats = {}, {}, {}
        keys_B = base.example_keys(examples_key, slot_B)
        decoded = self._render_terms if self._renders else self._flow_terms
        more_sums, more_counts = decoded(params, extra, images_BHWC, x0_BNP, codes_BKd, slot_B, keys_B)
        return sums | more_sums, counts | more_counts, stats

    def _flow_terms(self, params, extra, images_BHWC, x0_BNP, codes_BKd, slot_B, keys_B):
        """Sums and counts of the flow's loss."""
        flow = self.config.flow
        if self.config.token_gradient_weights:
            codes_BKd = weigh_gradients(codes_BKd, self.schedule.gradient_weights())
        # One draw per example holds all its randomness: its noise, then its time, then whether its codes are hidden.
        n, p = x0_BNP.shape[1:]
        uniform_BX = jax.vmap(lambda key: paths.uniform(key, n * p + 2, x0_BNP.dtype))(keys_B)
        noise_BNP = paths.to_normal(uniform_BX[:, : n * p]).reshape(x0_BNP.shape)
        u_B = time.sample(flow, uniform_BX[:, n * p], slot_B, self.batch_size)
        t_B = time.shift(u_B, flow.shift)
        start_B, end_B = self.schedule.visible(u_B)
        if flow.condition_drop:
            # Never at pure noise, as published: there the codes are all there is.
            drop_B = ((1 + uniform_BX[:, n * p + 1]) / 2 < flow.condition_drop) & (t_B < 1)
            end_B = jnp.where(drop_B, start_B, end_B)
        x_BNP = paths.interpolate(x0_BNP, noise_BNP, t_B)
        predicted_BNP = self._apply(params, "predict", x_BNP, t_B, codes_BKd, start_B, end_B)
        error_BNP = predicted_BNP - prediction.target(flow.prediction, x0_BNP, noise_BNP)
        error_B = jnp.mean(jnp.square(error_BNP), axis=(1, 2))
        if flow.weighting != "prediction":
            error_B = error_B * prediction.loss_weight(flow.prediction, flow.weighting, t_B)
        return {"flow": jnp.sum(error_B)}, {"flow": jnp.float32(error_B.size)}

    def _render_terms(self, params, extra, images_BHWC, x0_BNP, codes_BKd, slot_B, keys_B):
        """Sums and counts of the losses between rendered images and originals."""
        shown_B = jnp.full(slot_B.shape, self.num_tokens, jnp.int32)
        if share := self.config.decoder.random_prefixes:
            chance_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
            fewer_B = 1 + jnp.floor(chance_B2[:, 1] * self.num_tokens).astype(jnp.int32)
            shown_B = jnp.where(chance_B2[:, 0] < share, jnp.minimum(fewer_B, self.num_tokens), shown_B)
        return self.image_loss.terms(params, extra, self._render(params, extra, codes_BKd, shown_B), images_BHWC)

    def _render(self, params, extra, codes_BKd, shown_B):
        """Images [B, H, W, C], not clipped, from the shown_B coarsest tokens: one run of the network."""
        b, size = codes_BKd.shape[0], self.config.patch_size
        start_B, end_B = self.schedule.prefix(jnp.broadcast_to(shown_B, (b,)))
        shape_only_BNP = patchify(jnp.zeros((b, *self._latent_shape)), size)
        x0_BNP = self._apply(params, "predict", shape_only_BNP, jnp.ones((b,)), codes_BKd, start_B, end_B)
        return self.codec.decode(extra.get("codec"), unpatchify(x0_BNP, size, self._latent_size))

    def update_extra(self, extra, stats, rng):
        del rng  # the candidates for revival were drawn in loss_fn
        if self.config.stage != "joint":
            return extra
        return extra | {"codebook": self.quantizer.update(extra["codebook"], stats["codebook"])}

    def encode(self, params, extra, images_BHWC):
        return self._codes(params, extra, self._patches(extra, images_BHWC))

    def decode(self, params, extra, codes_BK, rng, *, num_visible=None, steps=None, guidance=None, stop_after=None):
        """See the base class. A renderer takes no noise and one step.

        Args:
          guidance: scale, static; 1 shows the codes, 0 hides them all; None: the setting.
          stop_after: a preview: the image that is expected after so many of the steps, static; None: all. It costs as
            many evaluations of the decoder and depends on the tokens that those steps see
            (`self.schedule.steps_driven`).

        Raises:
          UserError: if stop_after is not one of the steps, or a renderer is asked for what only a flow can do.
        """
        flow, b = self.config.flow, codes_BK.shape[0]
        codes_BKd = self.quantizer.lookup(extra["codebook"], codes_BK)
        if self._renders:
            if any(value not in (None, 1) for value in (steps, guidance, stop_after)):
                raise UserError("decode: a renderer has one step, no guidance: leave out steps, guidance, stop_after")
            shown = self.num_tokens if num_visible is None else num_visible
            return jnp.clip(self._render(params, extra, codes_BKd, shown), -1, 1)
        guidance = flow.guidance if guidance is None else guidance
        size = self.config.patch_size
        noise_BHWC = jax.vmap(lambda key: jax.random.normal(key, self._latent_shape))(
            base.example_keys(rng, jnp.arange(b))
        )
        u_grid = time.grid(flow.solver_steps if steps is None else steps)
        if stop_after is not None:
            if not 1 <= stop_after < len(u_grid):
                raise UserError(f"decode: stop_after={stop_after} is not between 1 and the {len(u_grid) - 1} steps")
            # A last step that goes to t = 0 at once ends at the x0 that the solver sees there.
            u_grid = np.append(u_grid[:stop_after], u_grid[-1])

        def velocity(x_BNP, u, t):
            t_B = jnp.full((b,), t)
            start_B, end_B = self.schedule.visible(jnp.full((b,), u), num_visible, sampling=True)

            def at(end_B):
                predicted = self._apply(params, "predict", x_BNP, t_B, codes_BKd, start_B, end_B)
                return prediction.to_velocity(flow.prediction, predicted, x_BNP, t_B)

            if guidance in (0, 1):  # one evaluation, and the prediction itself
                return at(end_B if guidance == 1 else start_B)
            return solvers.guide(at(end_B), at(start_B), guidance)

        x_BNP = patchify(noise_BHWC, size)
        x_BNP = solvers.integrate(velocity, x_BNP, u_grid, time.shift(u_grid, flow.shift), flow.solver)
        latents_Bhwc = unpatchify(x_BNP, size, self._latent_size)
        return jnp.clip(self.codec.decode(extra.get("codec"), latents_Bhwc), -1, 1)

    def extra_metrics(self, extra):
        return self.quantizer.metrics(extra["codebook"]) if self.config.stage == "joint" else {}

    def _codes(self, params, extra, patches_BNP):
        return self.quantizer.encode(extra["codebook"], self._apply(params, "encode", patches_BNP))

    def _kept_patches(self, batch, keys_B=None):
        """As `_patches`, from a cache of the codec's posterior."""
        mean, logvar = (batch[name].astype(jnp.float32) for name in ("latent_mean", "latent_logvar"))
        return patchify(self.codec.draw(mean, logvar, keys_B), self.config.patch_size)

    def _patches(self, extra, images_BHWC, keys_B=None):
        return patchify(self.codec.encode(extra.get("codec"), images_BHWC, keys_B), self.config.patch_size)

    def _apply(self, params, method, *args):
        return self._network.apply({"params": params}, *args, method=method)
