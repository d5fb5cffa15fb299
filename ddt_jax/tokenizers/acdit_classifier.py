"""Classes from the clean stream of an ACDiT (arXiv 2412.07720 table 3): all of its layers are trained for them.

A run begins with what an ACDiT has learned (`init_from`): the parameters have the same names. What only noised tokens
go through (modulation, labels, captions, what is predicted) is not there, and the head is new. It draws nothing.

Legend: B batch, K classes, L tokens, P values of a token.
"""

from dataclasses import fields

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import augment
from ddt_jax.nn.class_head import ClassHead
from ddt_jax.nn.layers import compute_dtype
from ddt_jax.tokenizers import base
from ddt_jax.tokenizers.acdit import ACDiT

_HEAD = "head"


class ACDiTClassifier(base.ImageModel):
    """See the module's docstring.

    Attributes:
      codec, network: of the ACDiT.
      classes: K.

    Raises:
      UserError: for settings that do not go together.
    """

    measured = "classes"

    def __init__(self, config: settings.ACDiTClassifier, image_size: int, batch_size: int, frames: int = 0):
        _check(config, batch_size)
        self.config = config
        self.image_size = image_size
        self.frames = frames
        self.classes = config.classes
        self.loss_weights = {"cross_entropy": 1.0}
        self.cross_example_terms = ("model.mixup",) if config.mixup else ()
        self._acdit = ACDiT(clean_stream(config), image_size, batch_size, frames)
        self.codec, self.network = self._acdit.codec, self._acdit.network
        self._head = ClassHead(config.classes, compute_dtype(config.dtype))

    def init(self, rng):
        network_key, head_key, codec_key = jax.random.split(rng, 3)
        tokens_1LP = jnp.zeros((1, self._acdit.tokens, self.network.values))
        params = self.network.init(network_key, tokens_1LP, method="clean_rows")["params"]
        head = self._head.init(head_key, jnp.zeros((1, 1, self.config.width)))["params"]
        return params | {_HEAD: head}, self.codec.init(codec_key)

    def loss_fn(self, params, extra, batch, rng):
        """See `ImageModel.loss_fn`. The terms, over rows that have a label:

        cross_entropy: between what is predicted and the label, smoothed and mixed, in nats.
        accuracy: whether the likeliest class is the one that has the largest part of the image.
        """
        c = self.config
        keys_B3 = jax.vmap(lambda key: jax.random.split(key, 3))(base.example_keys(rng, batch["slot"]))
        codec_B, erase_B, mix_B = keys_B3[:, 0], keys_B3[:, 1], keys_B3[:, 2]
        latents = augment.erased(self._acdit.latents(extra, batch, codec_B), erase_B, c.erase)
        latents, target_BK = augment.mixed(latents, self.targets(batch["label"]), mix_B, c.mixup)
        logits_BK = self._logits(params, latents)
        there_B = jnp.any(target_BK > 0, axis=1)
        right_B = there_B & (jnp.argmax(logits_BK, axis=1) == jnp.argmax(target_BK, axis=1))
        found = {"cross_entropy": -jnp.sum(target_BK * jax.nn.log_softmax(logits_BK)), "accuracy": jnp.sum(right_B)}
        count = jnp.sum(there_B, dtype=jnp.float32)
        return {k: v.astype(jnp.float32) for k, v in found.items()}, dict.fromkeys(found, count), {}

    def update_extra(self, extra, stats, rng):
        del stats, rng
        return extra

    def targets(self, label_B):
        """Probabilities of classes f32 [B, K], with `label_smoothing` shared out among all; zeros for no label."""
        there_B1 = ((label_B >= 0) & (label_B < self.classes))[:, None]
        one_hot_BK, smoothing = jax.nn.one_hot(label_B, self.classes), self.config.label_smoothing
        return jnp.where(there_B1, (1 - smoothing) * one_hot_BK + smoothing / self.classes, 0)

    def logits(self, params, extra, batch, keys_B):
        """Of images, clips or kept latents as they are: [B, K], at least fp32. keys_B: for a codec that draws."""
        return self._logits(params, self._acdit.latents(extra, batch, keys_B))

    def _logits(self, params, latents):
        rows_BLD = self.network.apply({"params": params}, self._acdit.in_blocks(latents), method="clean_rows")
        return self._head.apply({"params": params[_HEAD]}, rows_BLD)


def clean_stream(config: settings.ACDiTClassifier) -> settings.ACDiT:
    """Settings of an ACDiT with these layers and this codec, which is told nothing."""
    shared = {f.name for f in fields(settings.ACDiT)} & {f.name for f in fields(config)} - {"kind", "classes"}
    return settings.ACDiT(**{name: getattr(config, name) for name in shared}, classes=0)


def _check(c: settings.ACDiTClassifier, batch_size: int):
    if c.classes < 2:
        raise UserError(f"config: model.classes={c.classes}, of which there must be 2 at least to tell apart")
    if c.mixup < 0 or not 0 <= c.erase <= 1 or not 0 <= c.label_smoothing < 1:
        raise UserError(
            f"config: model.mixup={c.mixup} must not be negative, model.erase={c.erase} lie in [0, 1], "
            f"model.label_smoothing={c.label_smoothing} in [0, 1)"
        )
    if c.mixup and batch_size == 1:
        raise UserError(
            f"config: model.mixup={c.mixup} mixes the images of a batch, train.batch_size is 1; set model.mixup=0"
        )
