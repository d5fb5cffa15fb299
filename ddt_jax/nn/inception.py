"""Inception-v3 as the Frechet Inception Distance is measured with: 2,048 features of an image.

FID (Heusel et al. 2017) was defined by one TensorFlow graph of 2015. `pt_inception-2015-12-05-6726825d.pth`
(pytorch-fid) holds its weights in PyTorch's layout. It is not torchvision's network: average pools leave out what lies
beyond the border, and the last block pools by the maximum. Plain functions of a dict of parameters, for they are never
trained.

Legend: B batch, H height, W width, C channels, D features.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax.errors import UserError
from ddt_jax.io import torch_file

FEATURES = 2048
_FILE = "pt_inception-2015-12-05-6726825d.pth"
_SIZE = 299  # images are resized to so many pixels first
_BATCH_NORM_EPS = 1e-3


class _Conv(NamedTuple):
    """Convolution, batch normalisation, rectifier. With stride 1 it keeps the size unless it is `valid`."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    valid: bool = False


_AVERAGE, _MAX, _REDUCE = "average", "max", "reduce"  # 3 x 3 pools: two that keep the size, one of stride 2

# A chain is steps one after the other. A step is a convolution, a pool, or a fork: chains side by side, whose channels
# are joined.


def _mixed_a(pool):
    return (
        (_Conv("branch1x1", 64),),
        (_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5))),
        (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3))),
        (_AVERAGE, _Conv("branch_pool", pool)),
    )


_MIXED_B = (
    (_Conv("branch3x3", 384, (3, 3), 2),),
    (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3), 2)),
    (_REDUCE,),
)


def _mixed_c(width):
    long = (("1", (1, 1)), ("2", (7, 1)), ("3", (1, 7)), ("4", (7, 1)))
    return (
        (_Conv("branch1x1", 192),),
        (_Conv("branch7x7_1", width), _Conv("branch7x7_2", width, (1, 7)), _Conv("branch7x7_3", 192, (7, 1))),
        (*(_Conv(f"branch7x7dbl_{i}", width, kernel) for i, kernel in long), _Conv("branch7x7dbl_5", 192, (1, 7))),
        (_AVERAGE, _Conv("branch_pool", 192)),
    )


_MIXED_D = (
    (_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, (3, 3), 2)),
    (
        _Conv("branch7x7x3_1", 192),
        _Conv("branch7x7x3_2", 192, (1, 7)),
        _Conv("branch7x7x3_3", 192, (7, 1)),
        _Conv("branch7x7x3_4", 192, (3, 3), 2),
    ),
    (_REDUCE,),
)


def _mixed_e(pool):
    def fork(name):
        return (_Conv(f"{name}a", 384, (1, 3)),), (_Conv(f"{name}b", 384, (3, 1)),)

    return (
        (_Conv("branch1x1", 320),),
        (_Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (_Conv("branch3x3dbl_1", 448), _Conv("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3")),
        (pool, _Conv("branch_pool", 192)),
    )


_STEM = (
    _Conv("Conv2d_1a_3x3", 32, (3, 3), 2),
    _Conv("Conv2d_2a_3x3", 32, (3, 3), valid=True),
    _Conv("Conv2d_2b_3x3", 64, (3, 3)),
    _REDUCE,
    _Conv("Conv2d_3b_1x1", 80),
    _Conv("Conv2d_4a_3x3", 192, (3, 3), valid=True),
    _REDUCE,
)
_BLOCKS = {
    "Mixed_5b": _mixed_a(32),
    "Mixed_5c": _mixed_a(64),
    "Mixed_5d": _mixed_a(64),
    "Mixed_6a": _MIXED_B,
    "Mixed_6b": _mixed_c(128),
    "Mixed_6c": _mixed_c(160),
    "Mixed_6d": _mixed_c(160),
    "Mixed_6e": _mixed_c(192),
    "Mixed_7a": _MIXED_D,
    "Mixed_7b": _mixed_e(_AVERAGE),
    "Mixed_7c": _mixed_e(_MAX),
}
_CHAINS = (("", _STEM), *((f"{name}.", (block,)) for name, block in _BLOCKS.items()))


def load(path) -> dict[str, Any]:
    """Parameters from the weights file of FID.

    Raises:
      UserError: if the file cannot be read, or a weight is missing or of another shape.
    """
    return from_torch(torch_file.load(path), path)


def from_torch(weights, name="weights") -> dict[str, Any]:
    """Parameters from a state dict in PyTorch's layout; the classifier in it is ignored.

    Batch normalisation is one factor and one term for each channel here; both go into the convolution, in float64.

    Args:
      weights: name → array.
      name: of the file, for messages.
    Returns:
      {"Mixed_5b.branch1x1": {kernel [h, w, in, out], bias [out]}, ...}; float32, or float64 where the weights are.

    Raises:
      UserError: if a weight is missing, not a number or of another shape, or these are torchvision's.
    """
    if isinstance(weights, Mapping) and any(str(key).startswith("AuxLogits.") for key in weights):
        raise UserError(f"inception: {name} holds torchvision's network; FID needs {_FILE}")
    params, inputs = {}, 3
    for prefix, chain in _CHAINS:
        inputs = _read_chain(params, weights, name, prefix, chain, inputs)
    return params


def features(params, image_BHWC, *, precision=jax.lax.Precision.HIGHEST):
    """What FID compares: the last block's average over positions.

    Args:
      params: of `load`.
      image_BHWC: uint8, 3 channels, any size: it is resized without a low-pass, as pytorch-fid does.
      precision: of the convolutions. The highest, because accelerators otherwise round to bfloat16.
    Returns:
      [B, D], D = 2048, in the type of the parameters.

    Raises:
      ValueError: for other images.
    """
    if image_BHWC.ndim != 4 or image_BHWC.shape[-1] != 3 or image_BHWC.dtype != jnp.uint8:
        raise ValueError(f"Inception needs uint8 [B, H, W, 3]; got {image_BHWC.dtype} {image_BHWC.shape}")
    x = image_BHWC.astype(params[_STEM[0].name]["kernel"].dtype) / 255
    x = jax.image.resize(x, (len(x), _SIZE, _SIZE, 3), "linear", antialias=False, precision=precision)
    x = 2 * x - 1
    for prefix, chain in _CHAINS:
        x = _run_chain(params, prefix, chain, x, precision)
    return jnp.mean(x, axis=(1, 2))


def _read_chain(params, weights, name, prefix, chain, inputs) -> int:
    """Fills `params` and returns the number of channels that leave the chain."""
    for step in chain:
        if isinstance(step, _Conv):
            key = prefix + step.name
            kernel = _weight(weights, f"{key}.conv.weight", (step.features, inputs, *step.kernel), name)
            scale, shift, mean, variance = (
                _weight(weights, f"{key}.bn.{part}", (step.features,), name).astype(np.float64)
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            factor = scale / np.sqrt(variance + _BATCH_NORM_EPS)
            dtype = np.promote_types(kernel.dtype, np.float32)
            params[key] = {
                "kernel": (kernel.astype(np.float64) * factor[:, None, None, None]).transpose(2, 3, 1, 0).astype(dtype),
                "bias": (shift - mean * factor).astype(dtype),
            }
            inputs = step.features
        elif isinstance(step, tuple):
            inputs = sum(_read_chain(params, weights, name, prefix, branch, inputs) for branch in step)
    return inputs


def _run_chain(params, prefix, chain, x, precision):
    for step in chain:
        if isinstance(step, _Conv):
            conv = params[prefix + step.name]
            x = jax.lax.conv_general_dilated(
                x,
                conv["kernel"],
                (step.stride, step.stride),
                "VALID" if step.valid or step.stride > 1 else "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                precision=precision,
            )
            x = jax.nn.relu(x + conv["bias"])
        elif isinstance(step, tuple):
            x = jnp.concatenate([_run_chain(params, prefix, branch, x, precision) for branch in step], axis=-1)
        elif step == _AVERAGE:
            x = _pool(x, jax.lax.add, 0.0) / _pool(jnp.ones((1, *x.shape[1:3], 1), x.dtype), jax.lax.add, 0.0)
        else:
            x = _pool(x, jax.lax.max, -jnp.inf, reduce=step == _REDUCE)
    return x


def _pool(x, operation, start, reduce=False):
    stride = 2 if reduce else 1
    return jax.lax.reduce_window(
        x, start, operation, (1, 3, 3, 1), (1, stride, stride, 1), "VALID" if reduce else "SAME"
    )


def _weight(weights, key, shape, name) -> np.ndarray:
    if not isinstance(weights, Mapping) or key not in weights:
        raise UserError(f"inception: {name} has no {key}; FID needs {_FILE}")
    found = np.asarray(weights[key])
    if found.shape != shape or found.dtype.kind not in "fV":
        raise UserError(f"inception: {key} in {name} is {found.dtype} {found.shape}, the network has floats {shape}")
    return found
