"""What compares decoded images with originals: pixels, LPIPS and a discriminator that is trained beside the tokenizer.

All terms are in one loss with one gradient. The two sides are kept apart by what each of them may move: the generator's
terms hold the discriminator's parameters fixed, the discriminator's hold the decoded images fixed. So accumulation,
meshes and the skipping of bad steps treat a pair of adversaries as they treat any other model.

Legend: B batch, H height, W width, C channels; h, w places that a discriminator judges.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import layers, lpips
from ddt_jax.nn.discriminator import Discriminator
from ddt_jax.nn.params import in_group

DISCRIMINATOR = "discriminator"  # its key in the parameters, and its term's in the loss
LPIPS = "lpips"


class ImageLoss:
    """Terms of a loss between decoded images and originals, both [B, H, W, 3] in [-1, 1].

    Attributes:
      loss_weights: of the terms, see `tokenizers.base.ImageTokenizer`.
      notes: what a user should know when a run starts.

    Raises:
      UserError: if the settings do not go together or do not fit the image size.
    """

    def __init__(self, config: settings.ImageLoss, image_size: int, dtype: str = "float32"):
        self.config = config
        self.notes: tuple[str, ...] = ()
        c, d = config, config.discriminator
        adversarial = self._weight(c.adversarial_weight, c.adversarial_weight_late)
        perceptual = self._weight(c.lpips_weight, c.lpips_weight_late)
        self._adversary = Discriminator(d, layers.compute_dtype(dtype)) if adversarial is not None else None
        if bool(c.lpips_backbone_file) != bool(c.lpips_heads_file):
            raise UserError(
                "config: model.image_loss.lpips_backbone_file and model.image_loss.lpips_heads_file go together; "
                "set both, or neither to train without LPIPS"
            )
        self.has_lpips = perceptual is not None and bool(c.lpips_backbone_file)
        if perceptual is not None and not self.has_lpips:
            self.notes = (
                "WITHOUT LPIPS: model.image_loss gives it a weight but no files, so its term is left out; "
                "set model.image_loss.lpips_backbone_file and model.image_loss.lpips_heads_file",
            )
        if self.has_lpips and image_size < lpips.MIN_SIZE[c.lpips_backbone]:
            raise UserError(
                f"config: model.image_loss.lpips_backbone={c.lpips_backbone!r} needs images of "
                f"{lpips.MIN_SIZE[c.lpips_backbone]} pixels or more, data.image_size is {image_size}; "
                "set model.image_loss.lpips_weight and lpips_weight_late to 0"
            )
        if self._adversary is not None:
            if d.layers < 1 or image_size % 2**d.layers:
                raise UserError(
                    f"config: model.image_loss.discriminator.layers={d.layers} do not halve data.image_size="
                    f"{image_size} evenly; choose 1 or more, and fewer where the size has fewer factors of 2"
                )
            if d.norm_groups and 2 * d.width % d.norm_groups:
                raise UserError(
                    f"config: model.image_loss.discriminator.norm_groups={d.norm_groups} does not divide twice "
                    f"model.image_loss.discriminator.width={d.width}; choose a divisor, or 0 for no normalisation"
                )
        weights = {"pixel": self._weight(c.pixel_weight, c.pixel_weight)}
        weights[LPIPS] = perceptual if self.has_lpips else None
        if self._adversary is not None:
            # The discriminator waits until it is listened to: before, it would only learn to win.
            on = self._weight(float(c.adversarial_weight > 0), float(c.adversarial_weight_late > 0))
            r1 = self._weight(c.r1_weight * (c.adversarial_weight > 0), c.r1_weight * (c.adversarial_weight_late > 0))
            weights |= {"adversarial": adversarial, DISCRIMINATOR: on, "r1": r1}
        self.loss_weights = {name: weight for name, weight in weights.items() if weight is not None}

    def init(self, rng):
        """What it adds to a tokenizer's (params, extra): boxed parameters of the discriminator, LPIPS's weights.

        The latter are NaN until they are read from their files, so that a run that never got them can't go unnoticed.
        """
        params, extra = {}, {}
        if self._adversary is not None:
            size = 2**self.config.discriminator.layers
            fresh = self._adversary.init(rng, jnp.zeros((1, size, size, 3)))["params"]
            params[DISCRIMINATOR] = in_group(fresh, "discriminator")
        if self.has_lpips:
            missing = lambda s: jnp.full(s.shape, jnp.nan, s.dtype)  # noqa: E731
            extra[LPIPS] = jax.tree.map(missing, lpips.abstract(self.config.lpips_backbone))
        return params, extra

    def read_lpips(self):
        """LPIPS's weights from their files, NumPy arrays.

        Raises:
          UserError: if the files do not hold them.
        """
        c = self.config
        return lpips.load(c.lpips_backbone, c.lpips_backbone_file, c.lpips_heads_file)

    def terms(self, params, extra, fake_BHWC, real_BHWC):
        """Sums over the images and their counts, as `loss_fn` of a tokenizer returns them.

        Args:
          params, extra: of the whole tokenizer, plain arrays.
          fake_BHWC, real_BHWC: decoded and original images; the gradient reaches only the former.
        """
        real_BHWC = jax.lax.stop_gradient(real_BHWC)
        error_BHWC = fake_BHWC - real_BHWC
        size = jnp.abs if self.config.pixel == "l1" else jnp.square
        each = {"pixel": jnp.mean(size(error_BHWC), axis=(1, 2, 3))}
        if self.has_lpips:
            weights = jax.lax.stop_gradient(extra[LPIPS])
            each[LPIPS] = lpips.distance(
                weights,
                fake_BHWC,
                real_BHWC,
                backbone=self.config.lpips_backbone,
                precision=jax.lax.Precision.DEFAULT,  # of a loss; metrics take more
            )
        if self._adversary is not None:
            each |= self._adversarial(params[DISCRIMINATOR], fake_BHWC, real_BHWC)
        count = jnp.float32(real_BHWC.shape[0])
        return {name: jnp.sum(value_B) for name, value_B in each.items()}, dict.fromkeys(each, count)

    def _adversarial(self, params, fake_BHWC, real_BHWC):
        """Hinge losses of both sides, and the judgements behind them."""

        def judge(params, x_BHWC):
            return self._adversary.apply({"params": params}, x_BHWC)

        mean = lambda y_Bhw: jnp.mean(y_Bhw, axis=(1, 2))  # noqa: E731
        hidden_Bhw = judge(jax.lax.stop_gradient(params), fake_BHWC)
        fake_Bhw = judge(params, jax.lax.stop_gradient(fake_BHWC))
        real_Bhw = judge(params, real_BHWC)
        each = {
            "adversarial": -mean(hidden_Bhw),
            DISCRIMINATOR: 0.5 * mean(jax.nn.relu(1 - real_Bhw) + jax.nn.relu(1 + fake_Bhw)),
            "judged_original": mean(real_Bhw),
            "judged_decoded": mean(fake_Bhw),
        }
        if self.config.r1_weight:
            slope_BHWC = jax.grad(lambda x_BHWC: jnp.sum(mean(judge(params, x_BHWC))))(real_BHWC)
            each["r1"] = jnp.sum(jnp.square(slope_BHWC), axis=(1, 2, 3))
        return each

    def _weight(self, early: float, late: float) -> float | Callable | None:
        """A constant, a function of the optimizer step, or None if it is always 0."""
        if self.config.late_from <= 0 or early == late:
            return late or None
        return lambda step: jnp.where(step < self.config.late_from, early, late)
