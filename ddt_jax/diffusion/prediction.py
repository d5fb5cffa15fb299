"""What a network predicts on the rectified-flow path, and how one prediction is turned into another.

With x_t = (1 - t) x0 + t noise and velocity v = noise - x0:

    x0 = x_t - t v          noise = x_t + (1 - t) v

so an error e in v is an error t e in x0 and (1 - t) e in the noise. That ratio is all that a loss weighting is.
"""

from typing import Literal

import jax.numpy as jnp

from ddt_jax.diffusion.paths import over

Kind = Literal["x0", "velocity", "noise"]

_SMALLEST = 1e-3  # of t (or 1 - t) that is divided by


def target(kind: Kind, x0, noise):
    """What the network should predict."""
    return {"x0": x0, "velocity": noise - x0, "noise": noise}[kind]


def error_scale(kind: Kind, t):
    """Size of an error in `kind` that comes with a unit error in the velocity."""
    return {"x0": t, "velocity": jnp.ones_like(t), "noise": 1 - t}[kind]


def loss_weight(prediction: Kind, space: Kind, t):
    """Factor on the squared error of a prediction that makes it the squared error in `space`."""
    if prediction == space:
        return jnp.ones_like(t)
    return jnp.square(error_scale(space, t) / jnp.maximum(error_scale(prediction, t), _SMALLEST))


def to_velocity(kind: Kind, predicted, x_t, t_B):
    """The velocity that a prediction at x_t implies."""
    if kind == "velocity":
        return predicted
    t = over(t_B, x_t)
    if kind == "x0":
        return (x_t - predicted) / jnp.maximum(t, _SMALLEST)
    return (predicted - x_t) / jnp.maximum(1 - t, _SMALLEST)


def to_x0(kind: Kind, predicted, x_t, t_B):
    """The clean image that a prediction at x_t implies."""
    return predicted if kind == "x0" else x_t - over(t_B, x_t) * to_velocity(kind, predicted, x_t, t_B)
