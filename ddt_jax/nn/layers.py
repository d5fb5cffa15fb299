"""Linear maps, norms and the MLP, each declaring its parameters with logical axes and with what Muon may do to them.

Matrix products run on two-dimensional operands: reshaping (B, S, D) to (B S, D) costs nothing, and XLA's CPU backend is
faster on it. Where a mesh splits S as well as B they stay apart: a device's part of B S would be in pieces. With dtype
None a layer computes in the widest type of its input and parameters, so that fp64 stays fp64.

Legend: B batch, S sequence, D width, F features.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.mesh import position_axis
from ddt_jax.nn import lora
from ddt_jax.nn.params import declare


def compute_dtype(name: str):
    """The dtype argument of layers for a setting: None (follow the inputs) for float32, else that type."""
    return None if name == "float32" else jnp.dtype(name)


class Dense(nn.Module):
    """Linear map over the trailing dimensions, with bias.

    Attributes:
      features: shape of the output, in place of the `inputs` trailing dimensions of the input.
      axes: logical axes of the kernel: the input's, then the output's.
      inputs: how many trailing dimensions are read.
      matrix: what one matrix of the kernel is, see `params.Declaration`; None leaves it to AdamW.
      kernel_init: None for a truncated normal with variance 1 / fan-in.
      lora: a low-rank update beside the kernel; None or rank 0 for none.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int = 1
    matrix: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    use_bias: bool = True
    kernel_init: Any = None
    dtype: Any = None
    lora: settings.LoRA | None = None

    @nn.compact
    def __call__(self, x, updated=None):
        """updated: what the low-rank update reads in place of x, of its shape; None: x."""
        n = self.inputs
        lead, read = x.shape[:-n], x.shape[-n:]
        shape = (*read, *self.features)
        init = self.kernel_init or nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=tuple(range(n)), out_axis=tuple(range(n, len(shape)))
        )
        how = {"group": "matrix", "matrix": self.matrix}
        if self.matrix is None:
            how = {"reads": tuple(range(-len(shape), n - len(shape)))}
        kernel = self.param("kernel", declare(init, self.axes, **how), shape)
        operands = [x, kernel]
        if self.use_bias:
            declared = declare(nn.initializers.zeros, self.axes[n:], decay=False)
            operands.append(self.param("bias", declared, self.features))
        x, kernel, *bias = nn.dtypes.promote_dtype(*operands, dtype=self.dtype)
        rows = lead if len(lead) > 1 and position_axis(lead[1]) else (math.prod(lead),)
        y = x.reshape(*rows, math.prod(read)) @ kernel.reshape(math.prod(read), -1)
        if bias:
            y = y + bias[0].reshape(-1)
        if self.lora and self.lora.rank:
            seen = x if updated is None else updated.astype(x.dtype)
            y = y + lora.update(self, seen.reshape(*rows, -1), read)
        return y.reshape(*lead, *self.features)


def zeros_dense(features, axes, **kwargs) -> Dense:
    """A Dense that starts at zero."""
    return Dense(features, axes, kernel_init=nn.initializers.zeros, **kwargs)


def _normalized(x, centre: bool, epsilon: float):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if centre:
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)


class LayerNorm(nn.Module):
    """Zero mean and unit variance over the last dimension, computed in at least fp32, returned in the input's type."""

    affine: bool = True
    axis: str = "embed"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        y = _normalized(x, True, self.epsilon)
        if self.affine:
            y = y * self.param("scale", declare(nn.initializers.ones, (self.axis,), decay=False), x.shape[-1:])
            y = y + self.param("bias", declare(nn.initializers.zeros, (self.axis,), decay=False), x.shape[-1:])
        return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """Unit mean square over the last dimension, times a learned scale; at least fp32 inside.

    Attributes:
      groups: leading shape of the scale, broadcast against the input's leading dimensions.
      axis: logical axis of the last dimension.
    """

    groups: tuple[int, ...] = ()
    axis: str = "head_dim"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x):
        axes = (*(None for _ in self.groups), self.axis)
        scale = self.param("scale", declare(nn.initializers.ones, axes, decay=False), (*self.groups, x.shape[-1]))
        return (_normalized(x, False, self.epsilon) * scale).astype(x.dtype)


class MLP(nn.Module):
    """D → hidden → D with tanh-GELU, as in DiT and SD3."""

    hidden: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BSD):
        matrix = ((-2,), (-1,))
        h_BSF = Dense((self.hidden,), ("embed", "mlp"), matrix=matrix, dtype=self.dtype, name="up")(x_BSD)
        h_BSF = nn.gelu(h_BSF, approximate=True)
        return Dense(x_BSD.shape[-1:], ("mlp", "embed"), matrix=matrix, dtype=self.dtype, name="down")(h_BSF)
