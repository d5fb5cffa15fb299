"""Solvers of the flow's ODE dx/dt = v(x, t) from noise (t = 1) to an image (t = 0), in one compiled loop."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

Method = Literal["euler", "heun", "dpmpp_2m"]


def integrate(velocity: Callable, x, u_grid, t_grid, method: Method = "euler", first=None):
    """x at the end of the grid, of x's shape and type.

    Args:
      velocity: (x, u, t) → dx/dt, u and t scalars: the unshifted time and the noise level.
      x: start, at t_grid[0].
      u_grid, t_grid: [steps + 1], decreasing.
      method: "euler", one evaluation per step; "heun", two (the step to t = 0 stays Euler, as in EDM, arXiv 2206.00364:
        there x0- and noise-predictions have no velocity); "dpmpp_2m", one evaluation and the one before it:
        DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) on the path's half log SNR, log((1 - t) / t). Its first step
        is Euler's, the one after t = 1 too (that point is infinitely far), and the step to t = 0, which goes to the
        predicted x0.
      first: dx/dt at the start, where that is known already.
    """
    u_grid, t_grid = jnp.asarray(u_grid), jnp.asarray(t_grid)

    def euler(x, last, slope, times):
        _, _, t, t_next, _ = times
        return x + (t_next - t) * slope, last

    def heun(x, last, slope, times):
        _, u_next, t, t_next, _ = times
        ahead = x + (t_next - t) * slope
        both = (slope + velocity(ahead, u_next, t_next)) / 2
        return jnp.where(t_next > 0, x + (t_next - t) * both, ahead), last

    def dpmpp_2m(x, last, slope, times):
        _, _, t, t_next, extrapolate = times
        x0 = x - t * slope
        towards = x0 + extrapolate * (x0 - last)
        return towards + t_next / t * (x - towards), x0

    advance = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}[method]

    def step(carry, times, slope=None):
        x, last = carry
        moved, last = advance(x, last, velocity(x, times[0], times[2]) if slope is None else slope, times)
        return (moved.astype(x.dtype), None if last is None else last.astype(x.dtype)), None

    last = jnp.zeros_like(x) if method == "dpmpp_2m" else None
    times = (u_grid[:-1], u_grid[1:], t_grid[:-1], t_grid[1:], _extrapolation(t_grid))
    carry = (x, last)
    if first is not None:
        carry, _ = step(carry, [each[0] for each in times], first)
        times = [each[1:] for each in times]
    (x, _), _ = jax.lax.scan(step, carry, tuple(times))
    return x


def _extrapolation(t_grid):
    """Half of each step over the step before it, both in log SNR [steps]; 0 where a step is of first order."""
    log_snr = jnp.log1p(-t_grid) - jnp.log(t_grid)
    step = jnp.diff(log_snr)
    ratio = step[1:] / (2 * step[:-1])  # 0 after t = 1, where the step before has no end
    ratio = jnp.where(t_grid[2:] > 0, ratio, 0)
    return jnp.concatenate([jnp.zeros_like(t_grid[:1]), ratio])


def guide(conditional, unconditional, scale):
    """Classifier-free guidance (arXiv 2207.12598): 1 is the conditional prediction itself, 0 the unconditional one."""
    return (1 - scale) * unconditional + scale * conditional
