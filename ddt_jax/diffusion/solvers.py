"""Solvers of the flow's ODE dx/dt = v(x, t) from noise (t = 1) to an image (t = 0), in one compiled loop."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp


def integrate(velocity: Callable, x, u_grid, t_grid, method: Literal["euler", "heun"] = "euler"):
    """x at the end of the grid.

    Args:
      velocity: (x, u, t) → dx/dt, u and t scalars: the unshifted time and the noise level.
      x: start, at t_grid[0].
      u_grid, t_grid: [steps + 1], decreasing.
      method: "euler", one evaluation per step; "heun", two (the step to t = 0 stays Euler, as in EDM, arXiv 2206.00364:
        there x0- and noise-predictions have no velocity).
    """

    def step(x, times):
        u, u_next, t, t_next = times
        slope = velocity(x, u, t)
        ahead = x + (t_next - t) * slope
        if method == "heun":
            both = (slope + velocity(ahead, u_next, t_next)) / 2
            ahead = jnp.where(t_next > 0, x + (t_next - t) * both, ahead)
        return ahead.astype(x.dtype), None

    u_grid, t_grid = jnp.asarray(u_grid), jnp.asarray(t_grid)
    x, _ = jax.lax.scan(step, x, (u_grid[:-1], u_grid[1:], t_grid[:-1], t_grid[1:]))
    return x


def guide(conditional, unconditional, scale):
    """Classifier-free guidance (arXiv 2207.12598): scale 1 is the conditional prediction itself."""
    return unconditional + scale * (conditional - unconditional)
