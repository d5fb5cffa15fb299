"""Which keys each query sees: at most two intervals of them, a few integers per row instead of an S x S mask.

Every mask of the systems here fits (causal, prefix, image blocks, packing, MMDiT with a token prefix): the design lists
them. Builders that depend on nothing traced return NumPy arrays, from which `attention.attend` can tell at trace time
that nothing is hidden.

Legend: B batch, S queries, T keys, K tokens in front, N image patches behind them.
"""

from typing import Any

import flax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Spans:
    """Query row s of example b sees keys [start, end) and, if given, [start2, end2).

    Attributes:
      start, end: int32 [B or 1, S or 1], broadcast over examples and rows. An interval with end <= start is empty.
      start2, end2: a second interval, disjoint from the first, or None.
    """

    start: Any
    end: Any
    start2: Any = None
    end2: Any = None

    def covers(self, num_keys: int) -> bool:
        """Whether every row is known, at trace time, to see all keys through its first interval."""
        known = isinstance(self.start, np.ndarray) and isinstance(self.end, np.ndarray)
        return known and bool(np.all(self.start <= 0) and np.all(self.end >= num_keys))


def _rows(x):
    """int32 [B or 1, 1] of a scalar or [B]; NumPy stays NumPy."""
    return (np if isinstance(x, int | np.ndarray) else jnp).asarray(x, dtype=np.int32).reshape(-1, 1)


def full(num_keys: int) -> Spans:
    """Every row sees every key."""
    return Spans(_rows(0), _rows(num_keys))


def key_prefix(num_visible) -> Spans:
    """Every row sees keys [0, num_visible). num_visible: int32 scalar or [B]."""
    return Spans(_rows(0), _rows(num_visible))


def causal(num_queries: int, offset: int = 0, start=0) -> Spans:
    """Row q sees keys [start, q + offset + 1).

    Args:
      num_queries: S.
      offset: keys before the first query (a cache).
      start: first key of the document, int32 scalar or [B].
    """
    return Spans(_rows(start), np.arange(num_queries, dtype=np.int32)[None] + np.int32(offset + 1))


def tokens_and_patches(start, end, num_tokens: int, num_patches: int, *, tokens_see_patches: bool = True) -> Spans:
    """MMDiT with hidden tokens: every row sees tokens [start, end) and all patches, which follow the K tokens.

    Args:
      start, end: int32 scalar or [B], in [0, K].
      tokens_see_patches: False: the rows of the tokens see tokens only.
    """
    num_keys = num_tokens + num_patches
    end2 = _rows(num_keys)
    if not tokens_see_patches:
        end2 = np.where(np.arange(num_keys) < num_tokens, num_tokens, num_keys).astype(np.int32)[None]
    return Spans(_rows(start), _rows(end), _rows(num_tokens), end2)
