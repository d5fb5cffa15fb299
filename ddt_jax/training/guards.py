"""Guards against steps that are finite and yet harm: spikes of loss or gradient, and updates that are too long.

Both look at a window of what came before and set a limit at so many standard deviations above its mean. Public
wrappers of this kind poison themselves: a NaN enters the window, and from then on every step is skipped, or the update
is multiplied by 0, and 0 x NaN is NaN. Here a value that is not finite never enters a window, and one above the limit
enters as the limit, so that a lasting change of level is followed after a while.

Legend: R figures that are watched side by side, W length of the window.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.tokenizers.image_loss import DISCRIMINATOR

_FLOOR = 0.01  # least standard deviation, as a share of the mean: a steady figure makes nobody suspicious


class Window(NamedTuple):
    """The last W values of R figures.

    Attributes:
      values_RW: float32; columns not yet filled are 0.
      count: int32, values that have entered.
    """

    values_RW: Any
    count: Any

    @classmethod
    def empty(cls, figures: int, length: int) -> "Window":
        return cls(jnp.zeros((figures, length), jnp.float32), jnp.zeros((), jnp.int32))

    def limits(self, deviations: float):
        """float32 [R]: mean + deviations · standard deviation of the window; inf until it is half full."""
        length = self.values_RW.shape[1]
        n = jnp.minimum(self.count, length)
        filled_W = jnp.arange(length) < n
        total = jnp.maximum(n, 1)
        mean_R = jnp.sum(self.values_RW * filled_W, axis=1) / total
        variance_R = jnp.sum(jnp.square(self.values_RW - mean_R[:, None]) * filled_W, axis=1) / total
        spread_R = jnp.maximum(jnp.sqrt(variance_R), _FLOOR * jnp.abs(mean_R))
        return jnp.where(2 * n >= length, mean_R + deviations * spread_R, jnp.inf)

    def entered(self, values_R, limits_R, finite) -> "Window":
        """The window after a step: unchanged if it was not finite."""
        values_R = jnp.minimum(values_R.astype(jnp.float32), limits_R)
        column = self.count % self.values_RW.shape[1]
        new = Window(self.values_RW.at[:, column].set(values_R), self.count + 1)
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, self)


class Guarded(NamedTuple):
    """The optimizer state of a run with guards.

    Attributes:
      inner: of optax.
      steps: Window of the loss and the gradients' norms, or None.
      updates: Window of the updates' norms over the learning rate, which the schedule alone does not move, or None.
    """

    inner: Any
    steps: Window | None
    updates: Window | None


def sides(tree) -> tuple:
    """The parts of a tree of parameters (or gradients) that have a norm each: all but a discriminator, and that."""
    if DISCRIMINATOR not in tree:
        return (tree,)
    return {key: value for key, value in tree.items() if key != DISCRIMINATOR}, tree[DISCRIMINATOR]


def scaled(tree, factors_R):
    """Each side times its factor; a factor of 1 changes no bit."""
    one = lambda part, factor: jax.tree.map(lambda x: x * factor.astype(x.dtype), part)  # noqa: E731
    parts = [one(part, factors_R[i]) for i, part in enumerate(sides(tree))]
    return parts[0] if DISCRIMINATOR not in tree else {**parts[0], DISCRIMINATOR: parts[1]}


def with_guards(s: settings.Optimizer, opt_state, count: int):
    """The optimizer state of a fresh run: itself where no guard is set, so that its layout stays what it was.

    Args:
      count: of sides.
    """
    if not (s.spike_skip or s.clip_update):
        return opt_state
    steps = Window.empty(1 + count, s.guard_window) if s.spike_skip else None
    return Guarded(opt_state, steps, Window.empty(count, s.guard_window) if s.clip_update else None)


def split(opt_state) -> Guarded:
    """Any optimizer state as one with (or without) guards."""
    return opt_state if isinstance(opt_state, Guarded) else Guarded(opt_state, None, None)


def join(guarded: Guarded):
    """The inverse of `split`."""
    return guarded.inner if guarded.steps is None and guarded.updates is None else guarded
