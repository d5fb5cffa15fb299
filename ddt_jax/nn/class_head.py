"""Classes from rows of a transformer: the mean of their norms, then a linear map that starts at zero.

Legend: B batch, L rows, D width, K classes.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax.nn.layers import RMSNorm, zeros_dense


class ClassHead(nn.Module):
    """See the module's docstring."""

    classes: int
    dtype: Any = None

    @nn.compact
    def __call__(self, rows_BLD):
        """Logits [B, K], at least fp32."""
        mean_BD = jnp.mean(RMSNorm(axis="embed", name="norm")(rows_BLD), axis=1)
        logits_BK = zeros_dense((self.classes,), ("embed", None), dtype=self.dtype, name="out")(mean_BD)
        return logits_BK.astype(jnp.promote_types(logits_BK.dtype, jnp.float32))
