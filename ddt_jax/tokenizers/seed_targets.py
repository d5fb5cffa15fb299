"""What SEED's features are learned from: rows of the vision transformer that stands, or what CLIP says of an image.

With the latter an image can be drawn by others too: SEED (arXiv 2307.08041, §2.2) learned the 77 rows of CLIP's text
encoder that Stable Diffusion 1 draws from, SEED-2 (2310.01218) the one vector of its image encoder for unCLIP.

Legend: B batch, T rows of the vision transformer, D their width, M features, F their width, S side of CLIP's pictures,
L ids of a caption; H, W, C an image.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import clip, layers, vit
from ddt_jax.nn.params import missing

TARGET = "target"  # of `extra`: the network, while features are learned


class Target(abc.ABC):
    """See the module's docstring.

    Attributes:
      shape: (M, F).
      caption_length: ids of an image's caption that it needs; 0: none.
    """

    shape: tuple[int, int]
    caption_length: int = 0

    def init(self) -> dict[str, Any]:
        """What it adds to `extra`: nothing, or {TARGET: parameters of a network, boxed}, which a file will fill."""
        return {}

    @abc.abstractmethod
    def __call__(self, extra, rows_BTD, images_BHWC, caption_ids):
        """[B, M, F] in fp32.

        Args:
          caption_ids: int32 [B, caption_length], of `tokenizers.caption_ids.MarkedIds`; None where there are none.
        """


class Rows(Target):
    """The rows themselves, or their mean."""

    def __init__(self, rows: int, width: int, pooled: bool):
        self.shape, self._pooled = (1 if pooled else rows, width), pooled

    def __call__(self, extra, rows_BTD, images_BHWC, caption_ids):
        rows_BTD = rows_BTD.astype(jnp.float32)
        return jnp.mean(rows_BTD, axis=1, keepdims=True) if self._pooled else rows_BTD


class ClipText(Target):
    """All rows of CLIP's text encoder behind its last norm, of the image's caption."""

    def __init__(self, config: settings.CLIPText, dtype):
        c = config
        if c.width % c.heads or c.length < 3:
            raise UserError(
                f"config: model.clip.width={c.width} must be a multiple of model.clip.heads={c.heads}, "
                f"model.clip.length={c.length} at least 3"
            )
        self.shape, self.caption_length = (c.length, c.width), c.length
        self._network = clip.Text(c, dtype)

    def init(self):
        return _network(self._network, jnp.zeros((1, self.caption_length), jnp.int32))

    def __call__(self, extra, rows_BTD, images_BHWC, caption_ids):
        return self._network.apply({"params": extra[TARGET]}, caption_ids).astype(jnp.float32)


class ClipImage(Target):
    """The image's vector in CLIP's space, not made a unit vector: so it was published, and so unCLIP takes it."""

    def __init__(self, config: settings.CLIPImage, dtype):
        vit.check(config.vision, config.image_size, "model.clip.vision")
        if not (config.vision.class_token and config.vision.final_norm):
            raise UserError("config: model.clip.vision needs class_token=True and final_norm=True, as CLIP has them")
        self.shape, self._side = (1, config.width), config.image_size
        self._network = clip.Image(config.vision, config.width, dtype)

    def init(self):
        return _network(self._network, jnp.zeros((1, self._side, self._side, 3)))

    def __call__(self, extra, rows_BTD, images_BHWC, caption_ids):
        shape = (len(images_BHWC), self._side, self._side, 3)
        # A cubic overshoots; a picture in whole numbers, as CLIP has them, can't.
        pixels_BSSC = jnp.clip(jax.image.resize(images_BHWC, shape, "cubic"), -1, 1)
        return self._network.apply({"params": extra[TARGET]}, pixels_BSSC).astype(jnp.float32)[:, None]


def _network(network, example) -> dict[str, Any]:
    return {TARGET: missing(jax.eval_shape(network.init, jax.random.key(0), example)["params"])}


def make_target(c: settings.SEED, rows: int) -> Target:
    """What the settings name. rows: T.

    Raises:
      UserError: for settings that do not go together.
    """
    if c.features != "clip":
        return Rows(rows, c.vision.width, c.features == "pooled")
    if c.stage == "codes" and not c.clip.weights:
        raise UserError("config: model.features='clip' learns from a CLIP; set model.clip.weights to its folder")
    made = ClipText if isinstance(c.clip, settings.CLIPText) else ClipImage
    return made(c.clip, layers.compute_dtype(c.dtype))
