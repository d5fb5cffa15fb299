"""LPIPS: how different two images look to a network trained on photographs, by its features and five learned heads.

Zhang et al. 2018 (arXiv 1801.03924), version 0.1 of the released heads. Plain functions of a dict of parameters, for
these weights are never trained; they come from files, see `load`. As a loss it is differentiable in both images.

Legend: B batch, H height, W width, C channels of a tap.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax.errors import UserError
from ddt_jax.io import torch_file

Backbone = Literal["vgg16", "alexnet"]

# From [-1, 1] to what the backbones were trained on: ImageNet's mean and deviation, carried over from [0, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


@dataclass(frozen=True)
class _Conv:
    index: int  # N in torchvision's key features.N.weight
    features: int
    size: int
    stride: int = 1
    padding: int = 1
    pool: int = 0  # width of the max-pool of stride 2 before it
    tap: bool = False  # whether its rectified output is compared


_LAYERS: dict[str, tuple[_Conv, ...]] = {
    "vgg16": (
        _Conv(0, 64, 3),
        _Conv(2, 64, 3, tap=True),
        _Conv(5, 128, 3, pool=2),
        _Conv(7, 128, 3, tap=True),
        _Conv(10, 256, 3, pool=2),
        _Conv(12, 256, 3),
        _Conv(14, 256, 3, tap=True),
        _Conv(17, 512, 3, pool=2),
        _Conv(19, 512, 3),
        _Conv(21, 512, 3, tap=True),
        _Conv(24, 512, 3, pool=2),
        _Conv(26, 512, 3),
        _Conv(28, 512, 3, tap=True),
    ),
    "alexnet": (
        _Conv(0, 64, 11, stride=4, padding=2, tap=True),
        _Conv(3, 192, 5, padding=2, pool=3, tap=True),
        _Conv(6, 384, 3, pool=3, tap=True),
        _Conv(8, 256, 3, tap=True),
        _Conv(10, 256, 3, tap=True),
    ),
}
MIN_SIZE = {"vgg16": 16, "alexnet": 31}  # pixels; below, the last tap has none


def load(backbone: Backbone, backbone_path, heads_path) -> dict[str, Any]:
    """Parameters from PyTorch files.

    Args:
      backbone: "vgg16" or "alexnet".
      backbone_path: torchvision's state dict of the classifier (`features.0.weight`, ...); its classifier is ignored.
      heads_path: the heads of LPIPS 0.1 for that backbone (`lin0.model.1.weight` to `lin4.model.1.weight`).
    Returns:
      see `from_torch`.

    Raises:
      UserError: if a file cannot be read, or a weight is missing or of another shape.
    """
    features, heads = torch_file.load(backbone_path), torch_file.load(heads_path)
    return from_torch(backbone, features, heads, (backbone_path, heads_path))


def from_torch(backbone: Backbone, features, heads, names=("backbone", "heads")) -> dict[str, Any]:
    """Parameters from state dicts in PyTorch's layout.

    Args:
      backbone: "vgg16" or "alexnet".
      features, heads: name → array.
      names: of their files, for messages.
    Returns:
      `features`: a list of {kernel [h, w, in, out], bias [out]}, and `heads`: a list of five [C]; float32.

    Raises:
      UserError: if a weight is missing, not a number or of another shape.
    """
    convs, inputs, taps = [], 3, []
    for layer in _layers(backbone):
        shape = (layer.features, inputs, layer.size, layer.size)
        kernel = _weight(features, f"features.{layer.index}.weight", shape, names[0], backbone)
        bias = _weight(features, f"features.{layer.index}.bias", (layer.features,), names[0], backbone)
        convs.append({"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias})
        inputs = layer.features
        taps += [layer.features] if layer.tap else []
    keys = [(f"lin{i}.model.1.weight", (1, c, 1, 1)) for i, c in enumerate(taps)]
    return {"features": convs, "heads": [_weight(heads, k, s, names[1], backbone).reshape(-1) for k, s in keys]}


def abstract(backbone: Backbone) -> dict[str, Any]:
    """Shapes of what `load` gives: ShapeDtypeStructs."""
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    inputs = (3, *(conv.features for conv in _layers(backbone)))
    convs = [
        {"kernel": spec(conv.size, conv.size, n, conv.features), "bias": spec(conv.features)}
        for n, conv in zip(inputs, _layers(backbone), strict=False)
    ]
    return {"features": convs, "heads": [spec(conv.features) for conv in _layers(backbone) if conv.tap]}


def taps(params, image_BHWC, *, backbone: Backbone, precision=jax.lax.Precision.HIGHEST) -> list:
    """The backbone's five rectified features that are compared, from fine to coarse.

    Args:
      params: of `load`.
      image_BHWC: float in [-1, 1], 3 channels.
      precision: of the convolutions. The highest, because accelerators otherwise round to bfloat16, which a metric
        must not; a loss may.
    Returns:
      five [B, h, w, C].

    Raises:
      ValueError: for another number of channels, or images too small for the backbone.
    """
    layers = _layers(backbone)
    height, width, channels = image_BHWC.shape[-3:]
    if image_BHWC.ndim != 4 or channels != 3 or min(height, width) < MIN_SIZE[backbone]:
        least = MIN_SIZE[backbone]
        raise ValueError(f"LPIPS on {backbone} needs [B, H, W, 3] of {least} pixels or more; got {image_BHWC.shape}")
    x = image_BHWC.astype(jnp.promote_types(image_BHWC.dtype, jnp.float32))
    x = (x - jnp.asarray(_SHIFT, x.dtype)) / jnp.asarray(_SCALE, x.dtype)
    found = []
    for layer, conv in zip(layers, params["features"], strict=True):
        if layer.pool:
            window = (1, layer.pool, layer.pool, 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
        x = jax.lax.conv_general_dilated(
            x,
            conv["kernel"].astype(x.dtype),
            (layer.stride, layer.stride),
            [(layer.padding, layer.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
        )
        x = jax.nn.relu(x + conv["bias"].astype(x.dtype))
        if layer.tap:
            found.append(x)
    return found


def distance(params, a_BHWC, b_BHWC, *, backbone: Backbone, precision=jax.lax.Precision.HIGHEST):
    """LPIPS of each pair of images; 0 for equal ones, but for rounding.

    Args:
      params: of `load`.
      a_BHWC, b_BHWC: float in [-1, 1], 3 channels, equal shapes.
      precision: see `taps`.
    Returns:
      at least fp32 [B].

    Raises:
      ValueError: for unequal shapes, and as `taps`.
    """
    if a_BHWC.shape != b_BHWC.shape:
        raise ValueError(f"LPIPS compares images of one shape; got {a_BHWC.shape} and {b_BHWC.shape}")
    total_B = 0.0
    pairs = zip(*(taps(params, x, backbone=backbone, precision=precision) for x in (a_BHWC, b_BHWC)), strict=True)
    for (x_BHWC, y_BHWC), head_C in zip(pairs, params["heads"], strict=True):
        square_BHWC = jnp.square(_unit(x_BHWC) - _unit(y_BHWC))
        # The mean over positions and the 1x1 head commute.
        total_B += jnp.mean(square_BHWC, axis=(1, 2)) @ head_C.astype(square_BHWC.dtype)
    return total_B


def _unit(x_BHWC):
    """Unit length along the channels; where all are 0 they stay so, and the gradient, which the rectifier before stops,
    is finite: NaN would pass it."""
    square = jnp.sum(jnp.square(x_BHWC), axis=-1, keepdims=True)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x_BHWC / (length + _EPSILON)


def _layers(backbone: str) -> tuple[_Conv, ...]:
    if backbone not in _LAYERS:
        raise ValueError(f"LPIPS has the backbones {', '.join(_LAYERS)}; got {backbone!r}")
    return _LAYERS[backbone]


def _weight(weights, key, shape, name, backbone) -> np.ndarray:
    if not isinstance(weights, Mapping) or key not in weights:
        raise UserError(f"lpips: {name} has no {key}; it must hold the state dict for {backbone}")
    found = np.asarray(weights[key])
    if found.shape != shape or found.dtype.kind not in "fV":
        raise UserError(f"lpips: {key} in {name} is {found.dtype} {found.shape}, {backbone} has floats {shape}")
    return found.astype(np.float32)
