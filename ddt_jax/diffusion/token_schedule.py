"""Token schedule of the DDT tokenizer: which tokens the decoder may see at noise level u.

One mechanism, two conventions about the order of the tokens:

- "selftok" (released Selftok code, arXiv 2505.07538; DDT-LLaMA, arXiv 2504.14666): tokens 0..k(u) are visible and k
  grows with the noise. Token 0 is always seen and ends up with fine detail; the last token is seen near pure noise only
  and holds what is coarse. An autoregressive model that wants to go from coarse to fine reads the tokens backwards, and
  the first denoising steps need all of them.
- "coarse_first": tokens 0..k(u) are visible and k grows as the noise falls. Token 0 is all there is at pure noise, so
  it holds what is coarse; each prefix can drive the first denoising steps by itself (D-AR, arXiv 2505.23660).

Both schedules are a function f of a progress in [0, 1]: u for "selftok", 1 - u for "coarse_first". u is the time before
it is shifted. Counts include token 0, so they lie in 1..K.

Legend: B batch, K tokens.
"""

import statistics
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import settings
from ddt_jax.errors import UserError

# Added to the progress before groups are counted, taken from it before timesteps are. The sampler's times are rounded
# to fp32; a step that is due to start a group must not fall to the group before it, a timestep not to the one after.
_SLACK = 2.0**-21


@dataclass(frozen=True)
class TokenSchedule:
    """f and its direction.

    Attributes:
      config: kind is one of
        "uniform": f(s) = floor(s K) + 1;
        "timesteps": f(s) = ceil(s K): at timestep t of K tokens 0..t-1, and so the first t of them (DDT-LLaMA). It
          differs from "uniform" at the K timesteps alone, which is where a sampler with K steps looks;
        "late": f(s) = floor(s K / (1 - full_below)) + 1: for "coarse_first", all tokens are visible where
          u < full_below, and the ladder of counts is spent on the highest noise alone;
        "piecewise": floor of a function that is linear between breakpoints, in thousandths of s (the custom schedule of
          Selftok's released 512-token model: 192, 184, 72, 48, 16 tokens up to 200, 400, 600, 800, 1000);
        "logit_normal": f(s) = ceil(Phi((logit s - logit_mean) / logit_std) K) + 1. Selftok's k(t) is the index of the
          last visible token, and so one less than the count here. It is clamped to K - 1, hence tokens 0 and 1 appear
          together (for s > 0), as the last one does with 1 / K of the mass to spare.
        "unpublished": not known. There is a codebook and an encoder, but whatever needs f raises UserError.
        With groups = G, tokens appear K / G at a time: the count is rounded up to a multiple of K / G. "uniform"
        then gives each prefix of groups the same share of the denoising steps (D-AR: 8 groups, 8 steps).
      num_tokens: K.

    Raises:
      UserError: if breakpoints and tokens of "piecewise" do not fit each other and K, full_below is not in [0, 1),
        logit_std is not positive, or groups does not divide K.
    """

    config: settings.Schedule
    num_tokens: int

    def __post_init__(self):
        c = self.config
        if c.kind == "late" and not 0 <= c.full_below < 1:
            raise UserError(f"model.schedule.full_below: {c.full_below} is not in [0, 1)")
        if c.kind == "logit_normal" and not c.logit_std > 0:
            raise UserError(f"model.schedule.logit_std: {c.logit_std} is not positive")
        if c.groups < 0 or (c.groups and self.num_tokens % c.groups):
            raise UserError(
                f"model.schedule.groups: {c.groups} does not divide model.num_tokens = {self.num_tokens}; "
                "choose a divisor, or 0 for no groups"
            )
        if c.kind == "piecewise":
            ends = (0, *c.breakpoints)
            if len(c.breakpoints) != len(c.tokens) or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
                raise UserError(
                    f"model.schedule.breakpoints: {c.breakpoints} must increase and be as many as tokens {c.tokens}"
                )
            if ends[-1] != 1000 or sum(c.tokens) != self.num_tokens:
                raise UserError(
                    f"model.schedule: breakpoints must end at 1000 (got {ends[-1]}) and tokens {c.tokens} "
                    f"sum to model.num_tokens = {self.num_tokens} (got {sum(c.tokens)})"
                )

    def check_known(self) -> None:
        """Raises UserError for the kind "unpublished"."""
        if self.config.kind == "unpublished":
            raise UserError(
                "model.schedule.kind: 'unpublished' does not say which tokens a flow decoder sees; to train or decode "
                "with one, set it to 'uniform', 'timesteps', 'logit_normal' or 'piecewise'"
            )

    def count(self, u_B, sampling: bool = False):
        """How many tokens are visible, int32 like u_B, in 1..K.

        Args:
          sampling: count as the released sampler does, which drops the fraction of 1000 s before "piecewise" looks at
            it; the training does not (mean count of the custom schedule over uniform u: 354.1 of 512, against 353.9).
        """
        c, k = self.config, self.num_tokens
        self.check_known()
        progress = u_B if c.direction == "selftok" else 1 - u_B
        if c.groups:
            progress = progress + _SLACK
        if c.kind == "timesteps":
            last = jnp.ceil((progress - _SLACK) * k).astype(jnp.int32) - 1
        elif c.kind in ("uniform", "late"):
            share = 1.0 if c.kind == "uniform" else 1 - c.full_below
            last = jnp.floor(jnp.minimum(1.0, progress / share) * k).astype(jnp.int32)
        elif c.kind == "piecewise":
            # The product is fp32, as in the published models: 1000 u of 0.46 lies just below 460 there.
            tau = jnp.float32(1000) * progress
            tau = jnp.floor(tau) if sampling else tau
            last = jnp.sum(tau[..., None] >= self.thresholds()[1:], -1, dtype=jnp.int32)
        else:
            last = jnp.sum(progress[..., None] > self.thresholds()[1:], -1, dtype=jnp.int32)
        last = jnp.clip(last, 0, k - 1)
        return (last // self._group + 1) * self._group

    @property
    def _group(self) -> int:
        return self.num_tokens // self.config.groups if self.config.groups else 1

    def thresholds(self) -> np.ndarray | None:
        """What `count` holds the progress against, f32 [K], for "piecewise" in thousandths; None where it has none."""
        if self.config.kind in ("uniform", "timesteps", "late"):
            return None
        return np.float32((1000 if self.config.kind == "piecewise" else 1) * self._appears())

    def _appears(self) -> np.ndarray:
        """Progress at which each token appears, without groups. f64 [K], rising from 0; "logit_normal": just above."""
        c, k = self.config, self.num_tokens
        self.check_known()
        index_K = np.arange(k, dtype=np.float64)
        if c.kind in ("uniform", "timesteps"):
            return index_K / k
        if c.kind == "late":
            return index_K / k * (1 - c.full_below)
        if c.kind == "logit_normal":
            # ceil(Phi K) >= j where Phi > (j - 1) / K. Inverted once here, no device's Phi can round over an integer.
            normal = statistics.NormalDist()
            z = np.array([normal.inv_cdf(j / k) for j in range(1, k - 1)])
            return np.concatenate([[0, 0], 1 / (1 + np.exp(-(c.logit_mean + c.logit_std * z)))])[:k]
        high, granted = np.asarray(c.breakpoints, np.float64), np.asarray(c.tokens, np.float64)
        low, reached = np.concatenate([[0], high[:-1]]), np.cumsum(granted)
        # Token j appears in the segment that raises k to j; at its end if that is all that the segment reaches.
        segment = np.searchsorted(reached, index_K, side="left")
        within = (index_K - (reached - granted)[segment]) / granted[segment]
        return (low[segment] + (high - low)[segment] * within) / 1000

    def probability_visible(self) -> np.ndarray:
        """Share of uniform u at which each token is visible. f64 [K]; the first is 1, and they fall."""
        first_of_group = np.arange(self.num_tokens) // self._group * self._group
        return 1 - self._appears()[first_of_group]

    def gradient_weights(self) -> np.ndarray:
        """1 / P(visible), f32 [K]: evens out how often the tokens hear from the decoder.

        Selftok's later training code has these constants times 0.5, estimated by drawing (78.5 for the last of 512,
        where it is exactly 80). A token that is never visible has no gradient to weigh; its weight is 1.
        """
        probability = self.probability_visible()
        return np.where(probability > 0, 1 / np.maximum(probability, 1e-12), 1).astype(np.float32)

    def steps_driven(self, num_visible: int, u_grid) -> int:
        """How many of a sampler's first steps need no token but the coarsest num_visible ones.

        Args:
          u_grid: times [steps + 1] from 1 to 0; step i looks at u_grid[i].
        Returns:
          0..steps. For "selftok" it is 0 or all: the first step already needs every token.
        """
        u = np.asarray(u_grid, np.float32)[:-1]
        with jax.ensure_compile_time_eval():
            enough = np.asarray(self.count(jnp.asarray(u), sampling=True)) <= num_visible
        return len(u) if enough.all() else int(np.argmin(enough))

    def visible(self, u_B, limit_B=None, sampling: bool = False):
        """Visible tokens [start, end), int32, at noise level u_B.

        Args:
          limit_B: show at most this many tokens, the coarsest ones; int32 scalar or [B], or None.
          sampling: see `count`.
        """
        end = self.count(u_B, sampling)
        start = jnp.zeros_like(end)
        if limit_B is None:
            return start, end
        if self.config.direction == "coarse_first":
            return jnp.broadcast_arrays(start, jnp.minimum(end, limit_B))
        start, end = jnp.broadcast_arrays(self.prefix(limit_B)[0], end)
        return start, jnp.maximum(start, end)

    def prefix(self, count_B):
        """The count_B coarsest tokens as [start, end), int32; all of them if there are not as many."""
        count_B = jnp.clip(jnp.asarray(count_B, jnp.int32), 0, self.num_tokens)
        if self.config.direction == "coarse_first":
            return jnp.zeros_like(count_B), count_B
        return self.num_tokens - count_B, jnp.full_like(count_B, self.num_tokens)


def weigh_gradients(codes_BKd, weight_K):
    """codes_BKd as they are, whose gradient is that of the result times weight_K."""

    @jax.custom_vjp
    def same(codes_BKd):
        return codes_BKd

    def backward(_, gradient_BKd):
        return (gradient_BKd * jnp.asarray(weight_K, gradient_BKd.dtype)[:, None],)

    same.defvjp(lambda codes_BKd: (codes_BKd, None), backward)
    return same(codes_BKd)
