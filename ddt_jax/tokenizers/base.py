"""What an image tokenizer is: images to a short sequence of codes and back, and how one is trained.

A tokenizer holds settings, never arrays: parameters and the state that gradients do not move (`extra`) are passed in
and returned, so that every method can be jitted, differentiated or sharded from outside.

Legend: B batch, K tokens, H height, W width, C channels.
"""

import abc
import importlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ddt_jax.errors import UserError
from ddt_jax.nn.images import to_float as to_float  # how every tokenizer reads its images, and gives them back
from ddt_jax.nn.images import to_uint8 as to_uint8
from ddt_jax.tokenizers.image_loss import ImageLoss

# kind of the settings → module and what makes the model there; imported when asked for, so that one tokenizer never
# pays for another.
_REGISTRY = {
    "ddt": ("ddt_jax.tokenizers.ddt", "DDTTokenizer"),
    "selftok": ("ddt_jax.tokenizers.ddt", "DDTTokenizer"),
    "spatial": ("ddt_jax.tokenizers.spatial", "SpatialTokenizer"),
    "vae": ("ddt_jax.tokenizers.vae", "VAE"),
    "linear": ("ddt_jax.tokenizers.linear", "LinearTokenizer"),
    "acdit": ("ddt_jax.tokenizers.acdit", "ACDiT"),
    "acdit_classifier": ("ddt_jax.tokenizers.acdit_classifier", "ACDiTClassifier"),
    "seed": ("ddt_jax.tokenizers.seed", "make_seed"),
}
_OF_CLIPS = ("acdit", "acdit_classifier")


class ImageModel(abc.ABC):
    """What the train step, a state and its checkpoints need of a model of images.

    Attributes:
      image_size: height and width of the images.
      frames: of a clip, where it learns clips; 0: images.
      measured: what an evaluation asks of it: "codes", "reconstruction" without codes, "drawing" from noise,
        "retrieval" alone, or "classes".
      retrieves: whether it finds captions of images and images of captions.
      loss_weights: weight of each ratio sums[name] / counts[name] that belongs to the loss, a number or a function of
        the optimizer step (int32, traced); other ratios are only logged.
      cross_example_terms: names of terms in the loss that depend on the whole batch at once. With any of them a step
        cut into micro-batches would compute something else, so accumulation must be refused.
      image_loss: learned judges of decoded images, None where there are none. Its discriminator is
        params["discriminator"]: gradients of the two sides are kept apart in `loss_fn`, so one gradient serves both.
      inherited: names of parts of the state ("params/encoder") that this model does not train, and that have to come
        from another run.
      classes: how many labels its images have; 0: it is not told labels.
      caption_length: how many ids of a caption a batch has; 0: it is not told captions.
      caption_dtype: of these ids.
    """

    image_size: int
    frames: int = 0
    measured: Literal["codes", "reconstruction", "drawing", "retrieval", "classes"] = "reconstruction"
    retrieves: bool = False
    loss_weights: dict[str, float | Callable]
    cross_example_terms: tuple[str, ...] = ()
    image_loss: ImageLoss | None = None
    inherited: tuple[str, ...] = ()
    classes: int = 0
    caption_length: int = 0
    caption_dtype: Any = jnp.int32

    @abc.abstractmethod
    def init(self, rng) -> tuple[Any, Any]:
        """Fresh (params, extra): a tree of `params.Box` and a nested dict of plain arrays."""

    def check_trainable(self) -> None:
        """Raises UserError where the settings are enough to load a model and encode with it, not to train it."""
        return

    @abc.abstractmethod
    def loss_fn(self, params, extra, batch, rng) -> tuple[dict, dict, Any]:
        """One micro-batch's additive contributions.

        Args:
          params: plain arrays.
          extra: state as it was before the step.
          batch: `image` uint8 [b, H, W, 3] and `slot` int32 [b], the rows of the global batch these images are. With
            `frames` it is `video` uint8 [b, T, H, W, 3]. In the place of images a tokenizer on latents takes
            `latent_mean` and `latent_logvar` [b, h, w, c]. With `classes` also `label` int32 [b], -1 for none.
            With `caption_length` also `caption_ids` [b, L] of caption_dtype.
          rng: the step's key, the same in all micro-batches.

        Returns:
          sums and counts: dicts of f32 scalars; sums[n] / counts[n], each added over micro-batches and devices, is the
          metric n. stats: a tree of arrays that are added up likewise and given to `update_extra`.
        """

    @abc.abstractmethod
    def update_extra(self, extra, stats, rng):
        """The state after an optimizer step, from the statistics of the whole global batch. rng: the step's key."""

    def extra_metrics(self, extra) -> dict[str, Any]:
        """Scalars about the state that are worth logging, computed on device."""
        del extra
        return {}


class ImageTokenizer(ImageModel):
    """Interface of all image tokenizers: what writes an image into codes.

    Attributes:
      num_tokens: codes per image, K.
      codebook_size: how many codes there are.
      token_order: of codes as `encode` gives them: "coarse_to_fine", "fine_to_coarse", or "none".
      code_parts: names of the parts of the state ("params/encoder") that codes come from; () = all of it.
      draws: whether it decodes; one that is trained in stages may not do so yet.
    """

    measured = "codes"
    num_tokens: int
    codebook_size: int
    token_order: str = "none"
    code_parts: tuple[str, ...] = ()
    draws: bool = True

    @abc.abstractmethod
    def encode(self, params, extra, images_BHWC):
        """Codes int32 [B, K] of images float [B, H, W, C] in [-1, 1]."""

    @abc.abstractmethod
    def decode(self, params, extra, codes_BK, rng, *, num_visible=None, steps=None):
        """Images float [B, H, W, C] in [-1, 1] from codes.

        Args:
          rng: key of the sampler's noise, of which row b of the batch uses fold_in(rng, b); or keys [B], one for each
            row, so that an image's noise does not depend on the batch it is in (`example_keys` takes both).
          num_visible: int32 scalar or [B], may be traced: only so many of the coarsest tokens are ever shown. None:
            all.
          steps: solver steps, static; None: the setting.
        """

    def code_vectors(self, params, extra, codes_BK):
        """What the decoder is given for codes: float [B, K, d]."""
        del params
        return self.quantizer.lookup(extra["codebook"], codes_BK)


def example_keys(rng, slot_B):
    """One key per example, that depends on the step's key and the row of the global batch, not on sharding.

    If rng is an array of keys [B] already, these are the ones.
    """
    if rng.ndim == 1 and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        return rng
    return jax.vmap(lambda s: jax.random.fold_in(rng, s))(slot_B)


def make_tokenizer(model, image_size: int, batch_size: int, frames: int = 0) -> ImageModel:
    """The tokenizer, or the autoencoder under one, that `model.kind` names.

    Args:
      model: settings of the model.
      image_size: height and width of its images.
      batch_size: images per optimizer step over the whole mesh; the codebook's statistics and the stratified time
        sampler need to know how many rows there are besides their own.
      frames: of a clip; 0: images.

    Raises:
      UserError: if the settings do not fit the image size, or it is no model of clips.
    """
    module, name = _REGISTRY[model.kind]
    if frames and model.kind not in _OF_CLIPS:
        raise UserError(
            f"config: model.kind={model.kind!r} learns images, not data.frames={frames}; set data.frames=0, or "
            f"model.kind={' or '.join(map(repr, _OF_CLIPS))}"
        )
    if frames:
        return getattr(importlib.import_module(module), name)(model, image_size, batch_size, frames)
    return getattr(importlib.import_module(module), name)(model, image_size, batch_size)
