"""Floating-point operations of the matrix products and convolutions of a function, counted where it is traced.

The compiler's own count takes the body of a loop once and knows nothing of library calls; this one multiplies by the
trips of a loop and sees the function as it is written, less what no result depends on, which no compiler runs either:
a train step asks its loss once more for the counts of terms alone. A multiplication and an addition are two operations;
all that is no product (normalisation, activations, softmax, the optimizer's element-wise part) is left out, as in
published figures.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(function: Callable, *args: Any) -> float:
    """Operations of `function(*args)` over all devices; nothing is computed.

    Args:
      args: arrays, or `jax.ShapeDtypeStruct`s in their place.

    Returns:
      The count. Gradients, and what is computed again for them, count when the function makes them. Of branches the
      dearest counts; a loop whose trips are not known when it is traced counts once, and so does the body of a kernel:
      where attention may be computed by either, ask for settings that hold all its logits (`model_flops.every_pair`).
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _of(needed)


def _of(jaxpr) -> float:
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        left, (contracted, _) = equation.invars[0].aval, params["dimension_numbers"][0]
        return 2.0 * equation.outvars[0].aval.size * math.prod(left.shape[d] for d in contracted)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "cond":
        return max(_of(branch.jaxpr) for branch in params["branches"])
    inside = sum(map(_of, _bodies(params)))
    if name == "scan":
        return params["length"] * inside
    if name == "shard_map":
        mesh = params["mesh"]
        return inside * math.prod(mesh.shape[axis] for axis in params.get("manual_axes", mesh.axis_names))
    return inside


def _of_convolution(equation) -> float:
    """Each output reads a window of the kernel through its group's channels. Kernels and inputs that are spread with
    zeros, as in gradients, count as if they were not: what multiplies a zero is no work that anyone asked for.
    """
    out, kernel = equation.outvars[0].aval, equation.invars[1].aval
    numbers = equation.params["dimension_numbers"]
    window = math.prod(kernel.shape[d] for d in numbers.rhs_spec[2:])
    channels = kernel.shape[numbers.rhs_spec[1]]
    spread = math.prod(equation.params["lhs_dilation"])
    return 2.0 * out.size * window * channels / spread


def _bodies(params) -> Iterator[Any]:
    """The functions inside an equation. Rules for gradients are none yet: they are traced when they are asked for."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
