"""One interface to the ways in which images are noised, learned and drawn: who trains or samples needs no other.

    process = make_process(settings)
    t_B = process.draw(uniform_B)                       noise levels to train at
    x_t = process.noised(x0, noise, t_B)
    error = network(x_t, t_B) - process.target(x0, noise, t_B)        its square times process.weight(t_B)
    image = process.solve(network, noise, keys_B)       one call, whatever path and solver

t in [0, 1] is the noise level: 0 the image, 1 noise. Steps n of T have t = n / T. Networks are told t alone.

Legend: B batch.
"""

import abc
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddt_jax import settings
from ddt_jax.diffusion import ddpm, paths, prediction, solvers, time
from ddt_jax.errors import UserError


class Process(abc.ABC):
    """See the module's docstring. All arrays of images are [B, ...]; methods take t as a scalar or [B]."""

    def __init__(self, config: settings.DDPM | settings.RectifiedFlow):
        if config.solver_steps < 1 or config.min_snr < 0 or config.clip < 0:
            raise UserError(
                f"config: diffusion.solver_steps={config.solver_steps} must be at least 1, "
                f"diffusion.min_snr={config.min_snr} and diffusion.clip={config.clip} not negative"
            )
        self.config = config

    @abc.abstractmethod
    def draw(self, uniform_B, limit_B=1.0) -> Any:
        """Noise levels [B] to train at, above 0.

        Args:
          uniform_B: in (-1, 1), one number from each example's own key (`paths.uniform`).
          limit_B: the highest level, in (0, 1], scalar or [B]; levels are drawn as if it were all of [0, 1].
        """

    @abc.abstractmethod
    def scales(self, t_B) -> tuple[Any, Any]:
        """(a, s) of x_t = a x0 + s noise."""

    @abc.abstractmethod
    def target(self, x0, noise, t_B) -> Any:
        """What the network should predict."""

    @abc.abstractmethod
    def to_x0(self, predicted, x_t, t_B) -> Any:
        """The clean image that a prediction at x_t implies."""

    @abc.abstractmethod
    def _x0_weight(self, t_B):
        """Factor on the squared error of a prediction that makes it the squared error in x0."""

    @abc.abstractmethod
    def solve(self, predict: Callable, noise, keys_B=None, *, steps: int | None = None, first=None) -> Any:
        """Images from noise, of its shape and type.

        Args:
          predict: (x, t) → what the network predicts, t a scalar.
          keys_B: a key of each example, for solvers that add noise on their way; apart from the key of `noise`.
          steps: static; None: the setting.
          first: what the network predicts of `noise` at t = 1, where every solver begins, if that is known already.
        """

    def noised(self, x0, noise, t_B):
        """x_t of the shape of x0."""
        a_B, s_B = self.scales(t_B)
        return paths.over(a_B, x0) * x0 + paths.over(s_B, x0) * noise

    def weight(self, t_B):
        """Factor on the squared error: 1, or with `min_snr` that of arXiv 2303.09556, min(SNR, γ) in x0."""
        if not self.config.min_snr:
            return jnp.ones_like(t_B)
        a_B, s_B = self.scales(t_B)
        return jnp.minimum(jnp.square(a_B / s_B), self.config.min_snr) * self._x0_weight(t_B)

    def _held(self, x0):
        """x0 inside the range that the settings hold it to when images are drawn."""
        return jnp.clip(x0, -self.config.clip, self.config.clip) if self.config.clip else x0


class Steps(Process):
    """DDPM: the levels are n / T."""

    def __init__(self, config: settings.DDPM):
        super().__init__(config)
        if not 1 <= config.solver_steps <= config.steps:
            raise UserError(
                f"config: diffusion.solver_steps={config.solver_steps} must lie between 1 and "
                f"diffusion.steps={config.steps}"
            )
        self.kept = ddpm.variance_kept(config.schedule, config.steps)

    def draw(self, uniform_B, limit_B=1.0):
        u_B = time.sample(self.config, uniform_B)
        most_B = jnp.maximum(jnp.round(jnp.asarray(limit_B, u_B.dtype) * self.config.steps), 1)
        return jnp.clip(jnp.ceil(u_B * most_B), 1, most_B) / self.config.steps

    def scales(self, t_B):
        t_B = jnp.asarray(t_B)
        n_B = jnp.round(t_B * self.config.steps).astype(jnp.int32)
        table = jnp.asarray(np.stack([self.kept**0.5, (1 - self.kept) ** 0.5]), t_B.dtype)
        return table[0, n_B], table[1, n_B]

    def target(self, x0, noise, t_B):
        return ddpm.target(self.config.prediction, x0, noise, *self._shaped(t_B, x0))

    def to_x0(self, predicted, x_t, t_B):
        return ddpm.to_x0(self.config.prediction, predicted, x_t, *self._shaped(t_B, x_t))

    def solve(self, predict, noise, keys_B=None, *, steps=None, first=None):
        c = self.config
        if c.solver == "ddpm" and keys_B is None:
            raise ValueError("the solver ddpm adds noise on its way and needs keys")

        def denoise(x, n):
            t = (n / c.steps).astype(jnp.promote_types(x.dtype, jnp.float32))
            return self._held(self.to_x0(predict(x, t), x, t))

        numbers = ddpm.grid(c.steps, c.solver_steps if steps is None else steps)
        if first is not None:
            first = self._held(self.to_x0(first, noise, jnp.ones((), jnp.promote_types(noise.dtype, jnp.float32))))
        return ddpm.integrate(denoise, noise, keys_B, self.kept, numbers, c.solver, first)

    def _x0_weight(self, t_B):
        return jnp.square(ddpm.x0_error(self.config.prediction, *self.scales(t_B)))

    def _shaped(self, t_B, x):
        return (paths.over(scale_B, x) for scale_B in self.scales(t_B))


class Straight(Process):
    """Rectified flow: x_t = (1 - t) x0 + t noise."""

    def draw(self, uniform_B, limit_B=1.0):
        return limit_B * time.shift(time.sample(self.config, uniform_B), self.config.shift)

    def scales(self, t_B):
        t_B = jnp.asarray(t_B)
        return 1 - t_B, t_B

    def target(self, x0, noise, t_B):
        return prediction.target(self.config.prediction, x0, noise)

    def to_x0(self, predicted, x_t, t_B):
        return prediction.to_x0(self.config.prediction, predicted, x_t, jnp.asarray(t_B))

    def solve(self, predict, noise, keys_B=None, *, steps=None, first=None):
        c = self.config
        u_grid = time.grid(c.solver_steps if steps is None else steps)

        def implied(predicted, x, t):
            if c.clip:
                return prediction.to_velocity("x0", self._held(self.to_x0(predicted, x, t)), x, t)
            return prediction.to_velocity(c.prediction, predicted, x, t)

        def velocity(x, u, t):
            return implied(predict(x, t), x, t)

        t_grid = time.shift(u_grid, c.shift)
        first = None if first is None else implied(first, noise, t_grid[0])
        return solvers.integrate(velocity, noise, u_grid, t_grid, c.solver, first)

    def _x0_weight(self, t_B):
        return prediction.loss_weight(self.config.prediction, "x0", t_B)


def make_process(config: settings.DDPM | settings.RectifiedFlow) -> Process:
    """The process that config.kind names. Raises UserError if its settings do not go together."""
    return {"ddpm": Steps, "flow": Straight}[config.kind](config)


def by_noise_level(t) -> dict:
    """Name of a metric → where noise levels belong to it, bool like t: mse_t25 up to 0.25, mse_t50 up to 0.5, ...; what
    is not noised belongs to none.
    """
    return {f"mse_t{25 * k}": (t > (k - 1) / 4) & (t <= k / 4) for k in range(1, 5)}
