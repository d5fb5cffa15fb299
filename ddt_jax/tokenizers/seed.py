"""SEED (arXiv 2307.08041, 2310.01218): codes that say what an image shows, in an order in which a language model reads.

Three stages, each a run of its own; from the second on, what the runs before have learned stands. First a causal
Q-Former reads an image as N vectors, of which the last is brought together with the image's caption (`Aligner`). Then
a codebook is put behind it: from codes the N vectors are made again, by cosine, and features to draw from, by squared
error to what `seed_targets` says of the image. Last, a flow decoder draws from these features (`SEED`). The published
decoder is Stable Diffusion, which draws from features of its own text or image encoder; here it is trained.

Nothing here drops out, so what stands gives the same in every step.

Legend: B batch, N tokens, T rows of the vision transformer, W width of the Q-Former, d code dimension, M features, F
their width, e dimensions of the space of images and captions; H, W, C an image.
"""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.diffusion import paths, solvers
from ddt_jax.diffusion.process import make_process
from ddt_jax.errors import UserError
from ddt_jax.nn import blocks, contrast, embeddings, layers, qformer, spans, text_tower, vit
from ddt_jax.nn.codec import make_codec
from ddt_jax.nn.flow_head import FlowHead
from ddt_jax.nn.images import patchify, unpatchify
from ddt_jax.nn.params import in_group, missing
from ddt_jax.nn.quantize import unit
from ddt_jax.tokenizers import base
from ddt_jax.tokenizers.seed_codes import CODEBOOK, make_codes
from ddt_jax.tokenizers.seed_targets import TARGET as TARGET
from ddt_jax.tokenizers.seed_targets import make_target

VISION = "vision"  # of the parameters; of `extra` where it comes from a file
_ALIGNED = ("qformer", "image_head", "text", "text_head", "contrast")
_CODED = ("down", "up", "embedding", "features")


class Bottleneck(nn.Module):
    """[..., a] → [..., b] by two linear maps with a tanh between them."""

    hidden: int
    out: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        h = layers.Dense((self.hidden,), ("embed", "embed_out"), dtype=self.dtype, name="first")(x)
        return layers.Dense((self.out,), ("embed", "embed_out"), dtype=self.dtype, name="second")(jnp.tanh(h))


class TokenBlocks(nn.Module):
    """Positions and blocks over the tokens' vectors [B, N, W]. No norm behind them, as published."""

    config: settings.QFormer
    depth: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BNW, seen):
        """seen: spans over the tokens."""
        c = self.config
        x_BNW = x_BNW + embeddings.learned(self, "positions", x_BNW.shape[1], c.width).astype(x_BNW.dtype)
        make = functools.partial(vit.Block, c.heads, c.mlp_width, dtype=self.dtype)
        return blocks.Stack(make, self.depth, c.scan_layers, c.remat, name="blocks")(x_BNW, seen)


class Features(nn.Module):
    """Tokens' vectors [B, N, W] → features [B, M, F] by M queries, the Reverse Q-Former."""

    config: settings.SEED
    num_features: int
    width: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x_BNW, seen):
        c = self.config
        x_BNW = TokenBlocks(c.qformer, c.embedding_depth, self.dtype, name="tokens")(x_BNW, seen)
        sizes = replace(c.qformer, cross_every=2, depth=c.features_depth)
        reverse = qformer.QFormer(sizes, self.num_features, False, self.dtype, name="reverse")
        return layers.Dense((self.width,), ("embed", "embed_out"), dtype=self.dtype, name="head")(reverse(x_BNW, seen))


class Aligner(base.ImageModel):
    """The first stage, and what the later ones keep of it. See the module's docstring.

    Attributes:
      caption_length: tokens of a caption in its batches.
      vision_weights: folder of the vision transformer that stands, which `extra` holds; "" if it is trained.
      qformer_weights: folder of the Q-Former that training starts from; "" for a fresh one.

    Raises:
      UserError: for settings that do not go together.
    """

    cross_example_terms = ("the contrastive loss",)
    measured = "retrieval"
    retrieves = True

    def __init__(self, config: settings.SEED, image_size: int, batch_size: int):
        del batch_size
        c = self.config = config
        self.image_size, self.caption_length = image_size, c.text.length
        vit.check(c.vision, image_size, "model.vision")
        qformer.check(c.qformer, "model.qformer")
        text_tower.check(c.text, "model.text")
        if c.contrast.temperature <= 0 or not 0 <= c.contrast.label_smoothing < 1:
            raise UserError(
                f"config: model.contrast.temperature={c.contrast.temperature} must be above 0, "
                f"model.contrast.label_smoothing={c.contrast.label_smoothing} lie in [0, 1)"
            )
        self.vision_weights = c.vision_weights
        self.qformer_weights = c.qformer_weights if c.stage == "align" else ""
        if c.qformer_weights and c.qformer.norm != "post":
            raise UserError(
                f"config: model.qformer_weights={c.qformer_weights} is of a Q-Former with norms behind its sums; set "
                "model.qformer.norm='post' and the sizes of settings.BLIP2_QFORMER"
            )
        self.loss_weights = {"contrast": 1.0}
        dtype = layers.compute_dtype(c.dtype)
        head = functools.partial(layers.Dense, (c.contrast.width,), ("embed", "embed_out"), dtype=dtype)
        self._rows, self._dtype = vit.rows(c.vision, image_size), dtype
        self._modules = {
            VISION: vit.ViT(c.vision, dtype),
            "qformer": qformer.QFormer(c.qformer, c.num_tokens, c.causal, dtype),
            "image_head": head(),
            "text": text_tower.TextTower(c.text, dtype),
            "text_head": head(),
            "contrast": contrast.Scale(c.contrast),
        }

    def _examples(self) -> dict:
        """What each module is called with, by name."""
        c = self.config
        return {
            VISION: (jnp.zeros((1, self.image_size, self.image_size, 3)),),
            "qformer": (jnp.zeros((1, self._rows, c.vision.width)),),
            "image_head": (jnp.zeros((1, c.qformer.width)),),
            "text": (jnp.zeros((1, c.text.length), jnp.int32),),
            "text_head": (jnp.zeros((1, c.text.width)),),
            "contrast": (),
        }

    def init(self, rng):
        params, examples = {}, self._examples()
        for number, (name, module) in enumerate(self._modules.items()):
            params[name] = module.init(jax.random.fold_in(rng, number), *examples[name])["params"]
        extra = {}
        if self.vision_weights:
            extra[VISION] = missing(params.pop(VISION))
        return params, extra

    def loss_fn(self, params, extra, batch, rng):
        """See `ImageModel.loss_fn`; a batch also has `caption_ids` int32 [b, L]. The terms:

        contrast: the loss; contrast_top1: share of images whose own caption is the nearest of the batch; temperature.
        """
        del rng
        image_Be = self.embed_images(params, extra, base.to_float(batch["image"]))
        text_Be = self.embed_texts(params, batch["caption_ids"])
        scale, bias = self._apply(params, "contrast")
        loss_B, nearest_B = contrast.loss(self.config.contrast, image_Be, text_Be, scale, bias)
        one, b = jnp.float32(1), jnp.float32(len(loss_B))
        sums = {
            "contrast": jnp.sum(loss_B),
            "contrast_top1": jnp.sum(nearest_B, dtype=jnp.float32),
            "temperature": 1 / scale,
        }
        return sums, {"contrast": b, "contrast_top1": b, "temperature": one}, {}

    def update_extra(self, extra, stats, rng):
        del stats, rng
        return extra

    def embed_images(self, params, extra, images_BHWC):
        """Images in [-1, 1] as unit vectors [B, e]."""
        return self._to_space(params, self.causal_embeddings(params, self.image_rows(params, extra, images_BHWC)))

    def embed_texts(self, params, ids_BL):
        """Captions as unit vectors [B, e]. ids_BL: int32, `settings.NO_TOKEN` behind their ends."""
        return unit(self._apply(params, "text_head", self._apply(params, "text", ids_BL)))

    def image_rows(self, params, extra, images_BHWC):
        """[B, T, width of the vision transformer]."""
        vision = extra[VISION] if self.vision_weights else params[VISION]
        return self._modules[VISION].apply({"params": vision}, images_BHWC)

    def causal_embeddings(self, params, rows_BTD):
        """The Q-Former's outputs [B, N, W]."""
        return self._apply(params, "qformer", rows_BTD)

    def _to_space(self, params, embeddings_BNW):
        """By the last token, as published: what is before it has to pass through it."""
        return unit(self._apply(params, "image_head", embeddings_BNW[:, -1]))

    def _apply(self, params, name, *args):
        return self._modules[name].apply({"params": params[name]}, *args)


class SEED(Aligner, base.ImageTokenizer):
    """The second and third stage: the tokenizer. See the module's docstring.

    A prefix of the codes is decoded with the rest hidden from attention. The decoder never saw that in training, so
    figures for some of the tokens say little.

    Attributes:
      draws: whether there is a decoder; in stage "codes" there is none yet.
      target: what features are learned from.
      target_weights: folder of a CLIP that is, which `extra` holds while they are learned; "" elsewhere.
    """

    measured = "codes"
    token_order = "none"
    cross_example_terms = ()

    def __init__(self, config: settings.SEED, image_size: int, batch_size: int):
        super().__init__(config, image_size, batch_size)
        c = self.config
        self.target = make_target(c, self._rows)
        learns = c.stage == "codes"
        # Captions were read in the first stage; features may be learned from others' reading of them.
        self.caption_length = self.target.caption_length if learns else 0
        self.target_weights = c.clip.weights if learns and c.features == "clip" else ""
        self.num_tokens, self.codebook_size = c.num_tokens, c.quantizer.codebook_size
        self.draws = c.stage == "draw"
        self.codes = make_codes(c, batch_size)
        self.cross_example_terms = self.codes.cross_example_terms if learns else ()
        d, w = c.quantizer.code_dim, c.qformer.width
        self._modules |= {
            "down": Bottleneck(w, d, self._dtype),
            "up": Bottleneck(d, w, self._dtype),
            "embedding": TokenBlocks(c.qformer, c.embedding_depth, self._dtype),
            "features": Features(c, *self.target.shape, self._dtype),
        }
        before = _ALIGNED if self.vision_weights else (VISION, *_ALIGNED)
        self.inherited = tuple(f"params/{name}" for name in before)
        if self.vision_weights:
            self.inherited += (f"extra/{VISION}",)
        makes_codes = (*self.inherited, f"extra/{CODEBOOK}", "params/down")
        if c.recipe == "l2-legacy":
            makes_codes += (f"params/{CODEBOOK}",)
        unread = tuple(f"params/{name}" for name in ("image_head", "text", "text_head", "contrast"))
        self.code_parts = tuple(part for part in makes_codes if part not in unread)
        if not self.draws:
            weights = (c.quantizer.commitment, c.embedding_weight, c.features_weight)
            self.loss_weights = dict(zip(("commitment", "embedding", "features"), weights, strict=True))
            return
        self.inherited = (*makes_codes, *(f"params/{name}" for name in _CODED if name != "down"))
        self.loss_weights = {"flow": 1.0}
        self.codec, self.process = make_codec(c.codec), make_process(c.draw.diffusion)
        self._latent_side = image_size // self.codec.downsampling
        size = c.draw.patch_size
        if image_size % (self.codec.downsampling * size) or c.draw.width % c.draw.heads:
            raise UserError(
                f"config: model.draw.patch_size={size} must divide {self._latent_side} latents, and "
                f"model.draw.heads={c.draw.heads} model.draw.width={c.draw.width}"
            )
        self._patches = (self._latent_side // size) ** 2
        self._values = size**2 * self.codec.channels
        self._modules["draw"] = FlowHead(c.draw, self._dtype)

    def _examples(self):
        c = self.config
        tokens_1NW, seen = jnp.zeros((1, c.num_tokens, c.qformer.width)), spans.full(c.num_tokens)
        found = super()._examples() | {
            "down": (tokens_1NW,),
            "up": (jnp.zeros((1, c.num_tokens, c.quantizer.code_dim)),),
            "embedding": (tokens_1NW, seen),
            "features": (tokens_1NW, seen),
        }
        if self.draws:
            features = jnp.zeros((1, *self.target.shape))
            patches = jnp.zeros((1, self._patches, self._values))
            found["draw"] = (patches, jnp.zeros((1,)), features, jnp.ones((1,), bool))
        return found

    def init(self, rng):
        params, extra = super().init(rng)
        codes_key, codec_key = jax.random.split(jax.random.fold_in(rng, len(self._modules)))
        more_params, more_extra = self.codes.init(codes_key)
        params, extra = params | more_params, extra | more_extra
        extra |= self.codec.init(codec_key) if self.draws else self.target.init()
        stands = [name for name in params if f"params/{name}" in self.inherited]
        return params | {name: in_group(params[name], "frozen") for name in stands}, extra

    def loss_fn(self, params, extra, batch, rng):
        """See `ImageModel.loss_fn`. The terms of the stage "codes", each but the first with a weight of its own:

        commitment: the quantizer's loss; embedding: 1 - cosine between the Q-Former's outputs and what codes give,
        over tokens; features: squared error of what is drawn from, over its values. Of "draw":
        flow: squared error of the prediction.
        """
        # What stands has no gradient: it would count in the norm that is clipped.
        params = {k: jax.lax.stop_gradient(v) if f"params/{k}" in self.inherited else v for k, v in params.items()}
        if self.draws:
            return self._drawing_loss(params, extra, batch, rng)
        images_BHWC = base.to_float(batch["image"])
        rows_BTD = self.image_rows(params, extra, images_BHWC)
        made_BNW = self.causal_embeddings(params, rows_BTD)
        z_BNd = self._apply(params, "down", made_BNW)
        quantized, loss, count, stats = self.codes.quantize(params, extra, z_BNd, batch["slot"], rng)
        tokens_BNW = self._apply(params, "up", quantized)
        cosine_BN = jnp.sum(unit(self._made_again(params, tokens_BNW)) * unit(made_BNW), axis=-1)
        features_BMF = self._features(params, tokens_BNW)
        target_BMF = self.target(extra, rows_BTD, images_BHWC, batch.get("caption_ids"))
        error = jnp.square(features_BMF.astype(jnp.float32) - target_BMF)
        sums = {"commitment": loss, "embedding": jnp.sum(1 - cosine_BN), "features": jnp.sum(error)}
        counts = {"commitment": count, "embedding": jnp.float32(cosine_BN.size), "features": jnp.float32(error.size)}
        return sums, counts, stats

    def update_extra(self, extra, stats, rng):
        del rng  # the candidates for revival were drawn in loss_fn
        return extra if self.draws else self.codes.update(extra, stats)

    def extra_metrics(self, extra):
        return {} if self.draws else self.codes.metrics(extra)

    def encode(self, params, extra, images_BHWC):
        made_BNW = self.causal_embeddings(params, self.image_rows(params, extra, images_BHWC))
        return self.codes.encode(params, extra, self._apply(params, "down", made_BNW))

    def code_vectors(self, params, extra, codes_BK):
        return self.codes.lookup(params, extra, codes_BK)

    def embed_codes(self, params, extra, codes_BK):
        """Codes in the space of images and captions: unit vectors [B, e]."""
        return self._to_space(params, self._made_again(params, self._tokens(params, extra, codes_BK)))

    def features(self, params, extra, codes_BK, num_visible=None):
        """What an image is drawn from: [B, M, F]. num_visible: as in `decode`."""
        return self._features(params, self._tokens(params, extra, codes_BK), num_visible)

    def decode(self, params, extra, codes_BK, rng, *, num_visible=None, steps=None):
        if not self.draws:
            raise UserError("decode: a SEED tokenizer of model.stage='codes' draws nothing; train model.stage='draw'")
        c, b = self.config.draw, len(codes_BK)
        features_BMF = self.features(params, extra, codes_BK, num_visible)
        keys_B2 = jax.vmap(lambda key: jax.random.split(key))(base.example_keys(rng, jnp.arange(b)))
        shape = (self._patches, self._values)
        noise_BNP = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B2[:, 0])

        def predict(x_BNP, t):
            def of(shown):
                t_B, shown_B = jnp.broadcast_to(t, (b,)), jnp.full((b,), shown)
                return self._apply(params, "draw", x_BNP, t_B, features_BMF, shown_B)

            return of(True) if c.guidance == 1 else solvers.guide(of(True), of(False), c.guidance)

        x_BNP = self.process.solve(predict, noise_BNP, keys_B2[:, 1], steps=steps)
        latents_Bhwc = unpatchify(x_BNP, c.patch_size, self._latent_side)
        return jnp.clip(self.codec.decode(extra.get("codec"), latents_Bhwc), -1, 1)

    def _drawing_loss(self, params, extra, batch, rng):
        c, images_BHWC = self.config.draw, base.to_float(batch["image"])
        shape = (self._patches, self._values)

        def of_image(key):
            t_key, noise_key, codec_key, drop_key = jax.random.split(key, 4)
            noise_NP = jax.random.normal(noise_key, shape)
            dropped = jax.random.uniform(drop_key) < c.feature_drop
            return paths.uniform(t_key, 1)[0], noise_NP, codec_key, dropped

        uniform_B, noise_BNP, codec_keys_B, dropped_B = jax.vmap(of_image)(base.example_keys(rng, batch["slot"]))
        latents_Bhwc = self.codec.encode(extra.get("codec"), images_BHWC, codec_keys_B)
        x0_BNP, t_B = patchify(latents_Bhwc, c.patch_size), self.process.draw(uniform_B)
        features_BMF = self.features(params, extra, self.encode(params, extra, images_BHWC))
        noised_BNP = self.process.noised(x0_BNP, noise_BNP, t_B)
        predicted = self._apply(params, "draw", noised_BNP, t_B, features_BMF, ~dropped_B)
        error_B = jnp.mean(jnp.square(predicted - self.process.target(x0_BNP, noise_BNP, t_B)), axis=(1, 2))
        flow = jnp.sum(error_B * self.process.weight(t_B))
        return {"flow": flow}, {"flow": jnp.float32(error_B.size)}, {}

    def _tokens(self, params, extra, codes_BK):
        return self._apply(params, "up", self.codes.lookup(params, extra, codes_BK))

    def _made_again(self, params, tokens_BNW):
        return self._apply(params, "embedding", tokens_BNW, spans.full(self.num_tokens))

    def _features(self, params, tokens_BNW, num_visible=None):
        seen = spans.full(self.num_tokens) if num_visible is None else spans.key_prefix(num_visible)
        return self._apply(params, "features", tokens_BNW, seen)


def make_seed(config: settings.SEED, image_size: int, batch_size: int) -> Aligner | SEED:
    """The model of a stage."""
    return (Aligner if config.stage == "align" else SEED)(config, image_size, batch_size)
