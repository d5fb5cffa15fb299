"""Diffusion in steps (DDPM, arXiv 2006.11239): x_n = a_n x0 + s_n noise at n = 1 .. T, where a_n² + s_n² = 1.

n = 0 is the image itself. Tables and coefficients are NumPy in fp64: they are computed once, and what is left to the
device is one linear recurrence, the same for all solvers.

Legend: B batch, T steps that were trained, N steps that are taken.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax.diffusion.prediction import Kind

Schedule = Literal["cosine", "linear"]
Method = Literal["ddpm", "ddim", "dpmpp_2m"]

_OFFSET, _MOST = 0.008, 0.999  # cosine: s and the largest β (arXiv 2102.09672 §3.2)
_LINEAR = (1e-4, 0.02)  # of T = 1000, which shorter and longer ones scale (as in the code of arXiv 2102.09672)


def variance_kept(schedule: Schedule, steps: int) -> np.ndarray:
    """ᾱ at n = 0 .. T, float64 [T + 1], ᾱ[0] = 1."""
    if schedule == "cosine":
        at = np.cos((np.arange(steps + 1) / steps + _OFFSET) / (1 + _OFFSET) * np.pi / 2) ** 2
        beta_T = np.minimum(1 - at[1:] / at[:-1], _MOST)
    else:
        beta_T = np.linspace(*_LINEAR, steps) * (1000 / steps)
    return np.concatenate([[1.0], np.cumprod(1 - beta_T)])


def target(kind: Kind, x0, noise, a, s):
    """What the network should predict at a noise level with signal a and noise s, both shaped like x0.

    The velocity is a noise - s x0 (arXiv 2202.00512).
    """
    return {"x0": x0, "noise": noise, "velocity": a * noise - s * x0}[kind]


def to_x0(kind: Kind, predicted, x, a, s):
    """The clean image that a prediction at x implies."""
    return {"x0": predicted, "noise": (x - s * predicted) / a, "velocity": a * x - s * predicted}[kind]


def x0_error(kind: Kind, a, s):
    """Size of the error in x0 that comes with a unit error in the prediction."""
    return {"x0": jnp.ones_like(a), "noise": s / a, "velocity": s}[kind]


def grid(steps: int, taken: int) -> np.ndarray:
    """Numbers of the steps that a solver stands at, int [N + 1], evenly from T to 0."""
    return np.round(np.linspace(steps, 0, taken + 1)).astype(np.int64)


def recurrence(kept: np.ndarray, method: Method) -> np.ndarray:
    """Coefficients of x, of x0, of the x0 one step before, and of fresh noise, in the x that a step ends at.

    Args:
      kept: ᾱ at the grid, falling noise, 1 at the end. [N + 1].
      method: "ddpm": a draw from q(x_next | x, x0) (arXiv 2006.11239 eq. 6-7, between steps of the grid); "ddim": the
        same without fresh noise, keeping the noise that is implied (arXiv 2010.02502, η = 0); "dpmpp_2m":
        DPM-Solver++(2M) (arXiv 2211.01095 algorithm 2), of first order in its first step and in the last, to n = 0.

    Returns:
      float64 [N, 4].
    """
    a, s = np.sqrt(kept), np.sqrt(1 - kept)
    (now, after), (s_now, s_after) = (a[:-1], a[1:]), (s[:-1], s[1:])
    none = np.zeros_like(now)
    if method == "ddpm":
        left = 1 - kept[:-1] / kept[1:]  # β of the whole step
        of_x = now / after * (s_after / s_now) ** 2
        return np.stack([of_x, after * left / s_now**2, none, s_after / s_now * np.sqrt(left)], axis=1)
    of_x = s_after / s_now
    of_x0 = after - now * of_x
    ahead = none.copy()
    if method == "dpmpp_2m":
        length = np.diff(np.log(a[:-1] / s[:-1]))  # in half log SNR, but for the last step, which is infinitely long
        ahead[1:-1] = length[1:] / (2 * length[:-1])
    return np.stack([of_x, of_x0 * (1 + ahead), -of_x0 * ahead, none], axis=1)


def integrate(denoise: Callable, x, keys_B, kept, numbers: np.ndarray, method: Method, first=None):
    """x at the end of the grid, of x's shape and type, in one compiled loop.

    Args:
      denoise: (x, n) → x0, n an int32 scalar.
      x: [B, ...], at the first number of the grid.
      keys_B: a key of each example, for "ddpm"; others look at none.
      kept: ᾱ [T + 1]; numbers: of `grid`.
      first: x0 at the first number, where that is known already.
    """
    table = jnp.asarray(recurrence(kept[numbers], method), x.dtype)

    def step(carry, at, x0=None):
        x, last = carry
        n, (of_x, of_x0, of_last, of_noise) = at
        x0 = (denoise(x, n) if x0 is None else x0).astype(x.dtype)
        moved = of_x * x + of_x0 * x0
        if method == "dpmpp_2m":
            moved = moved + of_last * last
        if method == "ddpm":
            fresh = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), x.shape[1:], x.dtype))(keys_B)
            moved = moved + of_noise * fresh
        return (moved, x0 if method == "dpmpp_2m" else None), None

    last = jnp.zeros_like(x) if method == "dpmpp_2m" else None
    carry, numbers = (x, last), jnp.asarray(numbers[:-1], jnp.int32)
    if first is not None:
        carry, _ = step(carry, (numbers[0], table[0]), first)
        numbers, table = numbers[1:], table[1:]
    (x, _), _ = jax.lax.scan(step, carry, (numbers, table))
    return x
