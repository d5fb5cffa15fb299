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

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from ddt_jax import settings
from ddt_jax.errors import UserError


@dataclass(frozen=True)
class TokenSchedule:
    """f and its direction.

    Attributes:
      config: kind is one of
        "uniform": f(s) = floor(s K) + 1;
        "late": f(s) = floor(s K / (1 - full_below)) + 1: for "coarse_first", all tokens are visible where
          u < full_below, and the ladder of counts is spent on the highest noise alone;
        "piecewise": linear between breakpoints, in whole thousandths of s.
      num_tokens: K.

    Raises:
      UserError: if breakpoints and tokens of "piecewise" do not fit each other and K, or full_below is not in [0, 1).
    """

    config: settings.Schedule
    num_tokens: int

    def __post_init__(self):
        c = self.config
        if c.kind == "late" and not 0 <= c.full_below < 1:
            raise UserError(f"model.schedule.full_below: {c.full_below} is not in [0, 1)")
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

    def count(self, u_B):
        """How many tokens are visible, int32 like u_B, in 1..K."""
        progress = u_B if self.config.direction == "selftok" else 1 - u_B
        if self.config.kind == "piecewise":
            last = self._piecewise(progress)
        else:
            share = 1.0 if self.config.kind == "uniform" else 1 - self.config.full_below
            last = jnp.floor(jnp.minimum(1.0, progress / share) * self.num_tokens).astype(jnp.int32)
        return jnp.clip(last, 0, self.num_tokens - 1) + 1

    def visible(self, u_B, limit_B=None):
        """Visible tokens [start, end), int32, at noise level u_B.

        Args:
          limit_B: show at most this many tokens, the coarsest ones; int32 scalar or [B], or None.
        """
        end = self.count(u_B)
        start = jnp.zeros_like(end)
        if limit_B is None:
            return start, end
        if self.config.direction == "coarse_first":
            return jnp.broadcast_arrays(start, jnp.minimum(end, limit_B))
        start, end = jnp.broadcast_arrays(jnp.maximum(self.num_tokens - limit_B, 0), end)
        return start, jnp.maximum(start, end)

    def _piecewise(self, progress):
        """Index of the last visible token. Whole thousandths, truncated in fp32: so do the published models."""
        tau = jnp.floor(jnp.float32(1000) * progress).astype(jnp.int32)
        high = np.asarray(self.config.breakpoints, np.int32)
        low = np.concatenate([[0], high[:-1]]).astype(np.int32)
        granted = np.asarray(self.config.tokens, np.int32)
        base = np.cumsum(granted) - granted
        segment = jnp.clip(jnp.searchsorted(high, tau, side="left"), 0, len(high) - 1)
        width = jnp.asarray(high - low)[segment]
        return jnp.asarray(base)[segment] + (tau - jnp.asarray(low)[segment]) * jnp.asarray(granted)[segment] // width
