"""Multi-head attention with a projection of its own for queries, keys and values, and the MLP beside it, in the forms
that published vision and text transformers have.

Legend: B batch, S rows that ask, T rows that are asked, D width, H heads, E head dimension.
"""

from typing import Any

import flax.linen as nn
import jax

from ddt_jax.nn.attention import attend
from ddt_jax.nn.layers import Dense

GELU = {
    "exact": lambda x: nn.gelu(x, approximate=False),
    "tanh": lambda x: nn.gelu(x, approximate=True),
    "quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Attention(nn.Module):
    """[B, S, D] → [B, S, D].

    Attributes:
      biased: which of "q", "k", "v" have a bias.
    """

    heads: int
    biased: str = "qkv"
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BSD, spans, memory_BTM=None):
        """spans: over the rows that are asked. memory_BTM: those, of any width; None: x itself."""
        d = x_BSD.shape[-1]
        asked = x_BSD if memory_BTM is None else memory_BTM
        q, k, v = (self._project(name, rows, d) for name, rows in (("query", x_BSD), ("key", asked), ("value", asked)))
        merge = Dense((d,), ("heads", "head_dim", "embed"), 2, ((-3, -2), (-1,)), dtype=self.dtype, name="output")
        return merge(attend(q, k, v, spans).swapaxes(1, 2))

    def _project(self, name, rows, d):
        """[B, H, rows, E]."""
        dense = Dense(
            (self.heads, d // self.heads),
            ("embed", "heads", "head_dim"),
            matrix=((-3,), (-2, -1)),
            use_bias=name[0] in self.biased,
            dtype=self.dtype,
            name=name,
        )
        return dense(rows).swapaxes(1, 2)


class MLP(nn.Module):
    """D → hidden → D. gelu: one of GELU."""

    hidden: int
    gelu: str = "exact"
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BSD):
        matrix = ((-2,), (-1,))
        h = Dense((self.hidden,), ("embed", "mlp"), matrix=matrix, dtype=self.dtype, name="up")(x_BSD)
        down = Dense(x_BSD.shape[-1:], ("mlp", "embed"), matrix=matrix, dtype=self.dtype, name="down")
        return down(GELU[self.gelu](h))
