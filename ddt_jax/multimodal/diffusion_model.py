"""The multimodal transformer whose images are noised latents in place: Transfusion (arXiv 2408.11039).

    loss = next-token loss + λ · diffusion loss

A batch carries clean images; their noise levels and noise are drawn in the step, from the step's key, the row of the
global batch and the number of the image in it, so that any mesh and any cut into micro-batches draws the same. Images
that are only given (those of a user in a chat) are shown as they are. Those that the rest of their document describes
get noise up to a limit, or nothing could be read in them.

Legend: B rows, S positions, R positions before a target, I images of a row, N = B I, H height, W width, C channels of
latents, D width.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.diffusion import paths
from ddt_jax.diffusion.process import by_noise_level, make_process
from ddt_jax.errors import UserError
from ddt_jax.multimodal.image_rows import ImageRows
from ddt_jax.multimodal.row_model import RowModel
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.nn import spans
from ddt_jax.nn.codec import make_codec
from ddt_jax.nn.images import to_float
from ddt_jax.nn.layers import compute_dtype
from ddt_jax.nn.patch_coder import make_coder

PARAMS = "coder"  # in params: the coder between latents and rows
_NOISE = 0x7FFF_FFFF  # folded into a step's key for noise; rows of a batch, whose keys are beside, have smaller numbers
_CHANNELS = 3  # of an image


class DiffusionMultimodal(RowModel):
    """See the module's docstring.

    Args:
      image_size: height and width of images, in pixels.

    Attributes:
      form: how an image stands in a sequence.
      codec, coder, process: between pixels and latents; between latents and rows; of noise.
      inputs: as of `RowModel`, and image_start int32, image_learn, image_answer bool [B, I] and image_content
        [B, I, ...] of `sequence.pack_row`: uint8 [image_size, image_size, 3] each, or what a cache of latents keeps.

    Raises:
      UserError: for settings that do not go together.
    """

    def __init__(self, config: settings.Multimodal, image_size: int):
        super().__init__(config)
        image = config.image
        if not 0 < image.noise_limit <= 1 or image.weight < 0:
            raise UserError(
                f"config: model.image.noise_limit={image.noise_limit} must lie in (0, 1], "
                f"model.image.weight={image.weight} must not be negative"
            )
        self.codec = make_codec(image.codec, "model.image.codec")
        side = image_size // self.codec.downsampling
        if image_size % (self.codec.downsampling * image.patch_size):
            raise UserError(
                f"config: model.image.patch_size={image.patch_size} does not divide data.image_size={image_size} "
                f"(reduced {self.codec.downsampling}x by the codec); choose a divisor of {side}"
            )
        self.latent_shape = (side, side, self.codec.channels)
        dtype = compute_dtype(config.transformer.dtype)
        width = config.transformer.width
        rows = (side // image.patch_size) ** 2
        self.coder = make_coder(image.coder, image.patch_size, self.codec.channels, width, dtype, rows)
        self.process = make_process(image.diffusion)
        self.form = ImageForm("diffusion", rows, shape=(image_size, image_size, _CHANNELS), dtype="uint8")
        self.inputs += ("image_start", "image_learn", "image_answer", "image_content")
        self.loss_weights = {"next_token": 1.0, "diffusion": image.weight}

    def init_images(self, rng):
        coder_key, codec_key = jax.random.split(rng)
        x_BIHWC = jnp.zeros((1, 1, *self.latent_shape))
        return {PARAMS: self.coder.init(coder_key, x_BIHWC, jnp.zeros((1, 1)))["params"]}, self.codec.init(codec_key)

    def all_params(self, params, extra):
        """The backbone's parameters, as they generate or are exported."""
        return self.backbone_params(params, extra, PARAMS)

    def shapes(self, q):
        images = q.images or q.context // (self.form.rows + 2)
        content = self.form_of_latents() if q.latents else self.form
        of_images = {
            "image_start": ((images,), jnp.int32),
            "image_learn": ((images,), jnp.bool_),
            "image_answer": ((images,), jnp.bool_),
            "image_content": ((images, *content.shape), jnp.dtype(content.dtype)),
        }
        return super().shapes(q) | of_images

    def form_of_latents(self) -> ImageForm:
        """`form` where what a cache keeps of an image stands for it: mean and logvar of the codec's posterior."""
        h, w, c = self.latent_shape
        return replace(self.form, shape=(h, w, 2 * c), dtype=getattr(self.codec, "dtype", "float32"))

    def loss_fn(self, params, extra, batch, rng):
        """See `ImageModel.loss_fn`. The terms: those of `text_terms`, and

        diffusion: squared error of the prediction, mean over the values of each image that is learned, then over
          images; with `min_snr` times its weight.
        mse_t25, mse_t50, mse_t75, mse_t100: the same without weights, of noise levels up to 0.25, up to 0.5, ...
        images_used: share of the places for images that hold one.
        """
        return *self.terms(params, extra, batch, rng, self.dropout_keys(rng, batch["slot"])), {}

    def terms(self, params, extra, batch, rng, dropout_keys_B=None):
        """(sums, counts) of `loss_fn`; dropout_keys_B: None drops nothing."""
        learn_BI = batch["image_learn"]
        latents_BIHWC, noise_BIHWC, t_BI = self.draw(extra, batch, rng)
        x_BIHWC = self.process.noised(latents_BIHWC, noise_BIHWC, t_BI)
        total, rows, predicted_BIHWC = self.forward(params, extra, batch, x_BIHWC, t_BI, dropout_keys_B, latents_BIHWC)
        some_BR = (batch["rows"] >= 0).astype(jnp.float32)
        sums, counts = self.text_terms(total, rows, some_BR, some_BR)
        sums_of_images, counts_of_images = self.image_terms(
            predicted_BIHWC, self.process.target(latents_BIHWC, noise_BIHWC, t_BI), t_BI, learn_BI
        )
        sums, counts = sums | sums_of_images, counts | counts_of_images
        used_BI = batch["image_start"] >= 0
        sums["images_used"], counts["images_used"] = jnp.sum(used_BI, dtype=jnp.float32), jnp.float32(used_BI.size)
        return sums, counts

    def image_terms(self, predicted, target, t, learn_BI):
        """(sums, counts) of the terms of diffusion.

        Args:
          predicted, target: [B, I, ...]; t: noise levels, of images [B, I] or of parts of them as large as each other
            [B, I, ...], the leading axes of what is predicted.
        """
        error = jnp.mean(jnp.square(predicted - target), axis=tuple(range(t.ndim, predicted.ndim)))
        learn = jnp.broadcast_to(learn_BI.reshape(*learn_BI.shape, *[1] * (t.ndim - 2)), t.shape)
        sums, counts = {}, {}

        def add(name, values, chosen):
            sums[name] = jnp.sum(jnp.where(chosen, values, 0))
            counts[name] = jnp.sum(chosen, dtype=jnp.float32)

        add("diffusion", error * self.process.weight(t), learn)
        for name, here in by_noise_level(t).items():
            add(name, error, learn & here)
        return sums, counts

    def draw(self, extra, batch, rng):
        """What a step trains at: (latents, noise) [B, I, H, W, C] and noise levels [B, I], 0 where nothing is learned.

        Args:
          rng: the step's key.
        """
        latents_BIHWC, noise_BIHWC, uniform_BI1 = self._drawn(extra, batch, rng, 1)
        return latents_BIHWC, noise_BIHWC, self._levels(batch, uniform_BI1[..., 0])

    def _drawn(self, extra, batch, rng, levels: int):
        """(latents, noise, numbers from which so many noise levels of each image follow [B, I, levels])."""
        i = batch["image_start"].shape[1]
        rng = jax.random.fold_in(rng, _NOISE)

        def of_image(slot, number):
            key = jax.random.fold_in(jax.random.fold_in(rng, slot), number)
            t_key, noise_key, codec_key = jax.random.split(key, 3)
            return paths.uniform(t_key, levels), jax.random.normal(noise_key, self.latent_shape), codec_key

        over_images = jax.vmap(of_image, in_axes=(None, 0))
        uniform, noise_BIHWC, keys_BI = jax.vmap(over_images, in_axes=(0, None))(batch["slot"], jnp.arange(i))
        return self.latents(extra, batch["image_content"], keys_BI), noise_BIHWC, uniform

    def _levels(self, batch, uniform, limit: float | None = None):
        """Noise levels of images [B, I] or of parts of them [B, I, ...]; 0 where nothing is learned.

        Args:
          limit: the highest of images that stand before what describes them; None: as the settings say.
        """
        answer, learn = (
            x.reshape(*x.shape, *[1] * (uniform.ndim - 2)) for x in (batch["image_answer"], batch["image_learn"])
        )
        limit = jnp.where(answer, 1.0, self.config.image.noise_limit if limit is None else limit)
        return jnp.where(learn, self.process.draw(uniform, limit), 0.0)

    def latents(self, extra, content_BIHWC, keys_BI=None):
        """Clean latents [B, I, H, W, C].

        Args:
          content_BIHWC: images uint8, or of a cache (`form_of_latents`) mean and logvar along the last axis.
          keys_BI: as `LatentCodec.encode` takes them, one for each image.
        """
        b, i = content_BIHWC.shape[:2]
        keys_N = None if keys_BI is None else keys_BI.reshape(-1)
        content = content_BIHWC.reshape(b * i, *content_BIHWC.shape[2:])
        if content.dtype == jnp.uint8:
            latents = self.codec.encode(extra.get("codec"), to_float(content), keys_N)
        else:
            latents = self.codec.draw(*jnp.split(content.astype(jnp.float32), 2, axis=-1), keys_N)
        return latents.reshape(b, i, *self.latent_shape)

    def forward(self, params, extra, batch, x_BIHWC, t_BI, dropout_keys_B=None, clean_BIHWC=None):
        """The transformer over rows of text and noised images.

        Args:
          x_BIHWC: noised latents; t_BI: their noise levels.
          clean_BIHWC: the same without noise, for models that show them beside.

        Returns:
          (summed next-token loss, z-loss included; `cross_entropy.Rows` [B, R], of which those without a target mean
          nothing; what is predicted of each image [B, I, H, W, C], at least fp32).
        """
        del clean_BIHWC
        images = ImageRows(batch["image_start"], self.form.rows)
        at_BR, targets_BR, weights_BR = self.targets(batch)
        visible = self.visible(batch)
        coder = {"params": params[PARAMS]}
        rows_BIRD, way = self.coder.apply(coder, x_BIHWC, t_BI, method="encode")

        def run(module):
            x_BSD = images.put(module.embed(batch["tokens"]), rows_BIRD)
            h_BSD, _ = module(x_BSD, batch["position"], visible, dropout_keys_B=dropout_keys_B)
            h_BRD = jnp.take_along_axis(h_BSD, at_BR[..., None], axis=1)
            return *module.loss(h_BRD, targets_BR, weights_BR), images.take(h_BSD)

        total, rows, h_BIRD = self.module.apply({"params": self.all_params(params, extra)}, method=run)
        predicted_BIHWC = self.coder.apply(coder, h_BIRD, way, self.latent_shape[:2], method="decode")
        return total, rows, predicted_BIHWC

    def score(self, params, extra, batch, dropout_keys_B=None):
        """How likely each target is where all images are shown as they are: as `Multimodal.score`, without codes."""
        latents_BIHWC = self.latents(extra, batch["image_content"])
        clean_BI = jnp.zeros(batch["image_start"].shape)
        total, rows, _ = self.forward(params, extra, batch, latents_BIHWC, clean_BI, dropout_keys_B)
        return total, rows, jnp.zeros(batch["rows"].shape, bool)

    def clean_rows(self, coder, latents_BIHWC):
        """Rows [B, I, R, D] of images as they are. coder: its parameters."""
        clean_BI = jnp.zeros(latents_BIHWC.shape[:2])
        return self.coder.apply({"params": coder}, latents_BIHWC, clean_BI, method="encode")[0]

    def visible(self, batch) -> spans.Spans:
        """What the rows of a batch see."""
        images = ImageRows(batch["image_start"], self.form.rows)
        given_BS = batch["given"] if self.config.whole_prompts else None
        if self.config.image.attention == "bidirectional":
            return images.visible(batch["start"], given_BS)
        if given_BS is not None:
            return spans.bidirectional(given_BS, start=batch["start"])
        return spans.causal(batch["tokens"].shape[1], start=batch["start"])
