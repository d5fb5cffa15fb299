"""The published Selftok networks (arXiv 2505.07538): dual-stream encoder, MMDiT decoder and one-step renderer.

They stand in the place of the small networks of `ddt.py` and take and give the same. Sizes are settings; what isn't is
as released. All adaLN layers start at zero: at initialisation the encoder says the same about every image.

Legend: B batch, N patches, P values of a patch, K tokens, d code dimension, D width, I width of the encoder's image
stream, F sinusoids.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import blocks, embeddings, layers, mmdit, spans
from ddt_jax.nn.params import declare

# What published checkpoints hold of the sampler and the quantizer beside what is computed with here.
SAMPLER_BUFFERS = ("timestep_map", "scheduled_t", "scheduled_t_prev", "one_minus_scheduled_t")
QUANTIZER_BUFFERS = ("continuous", "steps", "count")
_SAMPLER_STEPS = 100


def check(config: settings.SelftokTokenizer, grid: tuple[int, int]) -> None:
    """Raises UserError for sizes that do not fit each other. grid: rows and columns of patches."""
    e, d = config.encoder, config.decoder
    for name, width, heads in (
        ("encoder.heads", e.width, e.heads),
        ("encoder.image_heads", e.image_width, e.image_heads),
        ("decoder.heads", d.width, d.heads),
    ):
        if width % heads:
            raise UserError(f"model.{name}: {heads} does not divide the width {width}")
    if e.image_width % 4:
        raise UserError(f"model.encoder.image_width: {e.image_width} is not a multiple of 4, as sinusoids in 2-D need")
    for name, depth in (("encoder", e.depth), ("decoder", d.depth)):
        if depth < 1:
            raise UserError(f"model.{name}.depth: must be at least 1, got {depth}")
    for name, side in (("encoder", e.position_grid), ("decoder", d.position_grid)):
        if side < max(grid):
            raise UserError(f"model.{name}.position_grid: {side} is less than the {grid[0]} x {grid[1]} patches")


def released_buffers(config: settings.SelftokTokenizer) -> dict[str, tuple[int, ...]]:
    """Shapes of all such buffers by the last part of their name, those of the codebook included."""
    codes = (1, config.quantizer.codebook_size)
    return {
        **dict.fromkeys(SAMPLER_BUFFERS, (_SAMPLER_STEPS,)),
        **dict.fromkeys(("continuous", "steps", "initted", "tpc_initted"), (1,)),
        **dict.fromkeys(("count", "cluster_size_wo_react"), codes),
    }


def init_released(config: settings.SelftokTokenizer) -> dict:
    """A place in the state for these buffers, empty. `interop.selftok` fills it with bits of whatever type a file has.

    It is there in every run, so that a state has the same structure whether it was imported or not.
    """

    def empty(shape):
        return {"bits": jnp.zeros((*shape, 2), jnp.uint32), "type": jnp.zeros((), jnp.int32)}

    return {name: empty(shape) for name, shape in released_buffers(config).items()}


def _table(module: nn.Module, name: str, init, shape, axes):
    """A fixed table: stored with the parameters, never trained, and with a gradient of zero, also for clipping."""
    return jax.lax.stop_gradient(module.param(name, declare(init, axes, group="frozen", decay=False), shape))


def _constant(table):
    return lambda key, shape: jnp.asarray(table).reshape(shape)


class Encoder(nn.Module):
    """Patches [B, N, P] → features [B, K, d] of K learned queries, before quantisation.

    Attributes:
      grid: rows and columns of patches.
    """

    config: settings.SelftokTokenizer
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, patches_BNP):
        c, e, dtype = self.config, self.config.encoder, layers.compute_dtype(self.config.dtype)
        side = e.position_grid
        fixed = embeddings.sincos_2d(side, e.image_width)
        table = _table(self, "positions", _constant(fixed), fixed.shape, (None, None, "embed"))
        table_NI = embeddings.centre_crop(table, *self.grid).reshape(-1, e.image_width)
        x_BNI = layers.Dense((e.image_width,), ("patch", "embed"), dtype=dtype, name="embed")(patches_BNP)
        x_BNI = x_BNI + table_NI.astype(x_BNI.dtype)
        queries_KD = embeddings.learned(self, "queries", c.num_tokens, e.width).astype(x_BNI.dtype)
        q_BKD = jnp.broadcast_to(queries_KD, (x_BNI.shape[0], *queries_KD.shape))

        features_1KF = embeddings.released_sinusoids(mmdit.token_positions(c.num_tokens))[None]
        options = (e.image_heads, e.heads, e.mlp_ratio)
        make = functools.partial(mmdit.QueryBlock, *options, dtype=dtype)
        carry = blocks.Stack(make, e.depth - 1, c.scan_layers, c.remat, name="blocks")((x_BNI, q_BKD), features_1KF)
        last = mmdit.QueryBlock(*options, last=True, dtype=dtype, name="last_block")
        _, q_BKD = last(carry, features_1KF)
        z_BKd = layers.Dense((c.quantizer.code_dim,), ("embed", "code"), dtype=dtype, name="to_code")(q_BKD)
        if self.is_initializing():  # two norms that the released encoder holds and does not use
            mmdit.frozen(layers.LayerNorm)(name="unused_norm_1")(q_BKD)
            mmdit.frozen(layers.LayerNorm)(axis="code", name="unused_norm_2")(z_BKd)
        return z_BKd


class Decoder(nn.Module):
    """Noised patches, noise level and the codes' vectors → velocity [B, N, P]; as a renderer → x0.

    Attributes:
      grid: rows and columns of patches.
    """

    config: settings.SelftokTokenizer
    grid: tuple[int, int]

    @nn.compact
    def __call__(self, patches_BNP, t_B, codes_BKd, start_B, end_B):
        """start_B, end_B: tokens [start, end) are visible. What a hidden token holds has no effect at all."""
        c, d, dtype = self.config, self.config.decoder, layers.compute_dtype(self.config.dtype)
        n, p = patches_BNP.shape[1:]
        k, width, one_step = c.num_tokens, d.width, isinstance(d, settings.Renderer)
        index_K = jnp.arange(k)
        shown_BK = (start_B[:, None] <= index_K) & (index_K < end_B[:, None])
        codes_BKd = jnp.where(shown_BK[..., None], codes_BKd, 0)
        tokens_BKD = layers.Dense((width,), ("code", "embed"), dtype=dtype, name="token_embed")(codes_BKd)
        fixed_KD = embeddings.sincos_1d(mmdit.token_positions(k), width)
        places_KD = _table(self, "token_positions", _constant(fixed_KD), fixed_KD.shape, (None, "embed"))
        tokens_BKD = tokens_BKD + places_KD.astype(tokens_BKD.dtype)

        x_BND = self._canvas(n) if one_step else self._embed(patches_BNP, dtype)
        x_BND = jnp.broadcast_to(x_BND, (t_B.shape[0], n, width)).astype(tokens_BKD.dtype)
        # Zeros until published weights are loaded: SD3's table is part of its checkpoint.
        sides = (d.position_grid, d.position_grid, width)
        table = _table(self, "positions", nn.initializers.zeros, sides, (None, None, "embed"))
        if not one_step or d.canvas_keeps_table:
            x_BND = x_BND + embeddings.centre_crop(table, *self.grid).reshape(n, width).astype(x_BND.dtype)

        t_B = jnp.ones_like(t_B) if one_step else t_B
        condition_BD = mmdit.Embedder(width, dtype, name="time")(embeddings.released_sinusoids(1000 * t_B))
        if self.is_initializing():  # SD3's embedder of the pooled text, held and not used
            mmdit.frozen(mmdit.Embedder)(width, dtype, name="unused_pooled")(codes_BKd[:, 0])
        features_1KF = embeddings.released_sinusoids(mmdit.token_positions(k))[None]
        to_all = spans.tokens_and_patches(start_B, end_B, k, n)
        visible = spans.tokens_and_patches(start_B, end_B, k, n, tokens_see_patches=d.context_see_xt)
        make = functools.partial(mmdit.TokenJointBlock, d.heads, d.mlp_ratio, dtype=dtype)
        stack = blocks.Stack(make, d.depth - 1, c.scan_layers, c.remat, name="blocks")
        carry = stack((tokens_BKD, x_BND), features_1KF, condition_BD, visible)
        last = mmdit.TokenJointBlock(d.heads, d.mlp_ratio, True, dtype, name="last_block")
        _, x_BND = last(carry, features_1KF, condition_BD, to_all)
        shift, scale = blocks.Modulation(2, dtype, name="final_adaln")(condition_BD)
        x_BND = blocks.modulate(layers.LayerNorm(affine=False)(x_BND), shift, scale)
        out_BNP = layers.zeros_dense((p,), ("embed", "patch"), dtype=dtype, name="final")(x_BND)
        return out_BNP.astype(jnp.promote_types(out_BNP.dtype, jnp.float32))

    def _embed(self, patches_BNP, dtype):
        return layers.Dense((self.config.decoder.width,), ("patch", "embed"), dtype=dtype, name="embed")(patches_BNP)

    def _canvas(self, n):
        d = self.config.decoder
        mask = embeddings.learned(self, "mask_token", 1 if d.repeat else n, d.width)
        return mask + embeddings.learned(self, "canvas_positions", n, d.width)


class Network(nn.Module):
    """Encoder, the norm behind the quantiser, and decoder, so that one tree holds all."""

    config: settings.SelftokTokenizer
    grid: tuple[int, int]

    def setup(self):
        self.encoder = Encoder(self.config, self.grid)
        self.code_norm = layers.LayerNorm(axis="code")
        self.decoder = Decoder(self.config, self.grid)

    def encode(self, patches_BNP):
        return self.encoder(patches_BNP)

    def predict(self, patches_BNP, t_B, codes_BKd, start_B, end_B):
        # Published codes are unit vectors, and the norm's epsilon can tell.
        codes_BKd = self.code_norm(codes_BKd / math.sqrt(self.config.quantizer.code_dim))
        return self.decoder(patches_BNP, t_B, codes_BKd, start_B, end_B)

    def __call__(self, patches_BNP):
        b = patches_BNP.shape[0]
        none = jnp.zeros((b,), jnp.int32)
        return self.predict(patches_BNP, jnp.zeros((b,)), self.encode(patches_BNP), none, none)
