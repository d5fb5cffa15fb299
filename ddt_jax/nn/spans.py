"""Which keys each query sees: at most two intervals of them, a few integers per row instead of an S x S mask.

Every mask of the systems here fits:

    causal                [document, q + 1)
    prefix or image       [document, end of the prefix or image) in its rows, causal elsewhere
    skip-causal, clean    [document, end of the row's block)
    skip-causal, noised   [document, start of the row's block) and [start of its noised copy, end of the copy)
    MMDiT                 the visible tokens, which come first, and all patches
    packing               `document` differs by row; a cache: the same with an offset

Builders that depend on nothing traced return NumPy arrays, from which `attention.attend` can tell at trace time that
nothing is hidden.

Legend: B batch, S queries, T keys, K tokens in front, N image patches or blocks.
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
      reach: row q sees no key behind q + reach; None if that is not known. For kernels that plan ahead.
      second: how long every second interval that is not empty is; None if that is not known.
      blocks: (N, size) where rows and keys are those of `skip_causal` and nothing else; None elsewhere.
    """

    start: Any
    end: Any
    start2: Any = None
    end2: Any = None
    reach: int | None = flax.struct.field(pytree_node=False, default=None)
    second: int | None = flax.struct.field(pytree_node=False, default=None)
    blocks: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)

    def covers(self, num_keys: int) -> bool:
        """Whether every row is known, at trace time, to see all keys through its first interval."""
        known = isinstance(self.start, np.ndarray) and isinstance(self.end, np.ndarray)
        return known and bool(np.all(self.start <= 0) and np.all(self.end >= num_keys))

    def of_rows(self, at_BR) -> "Spans":
        """The spans of some rows. at_BR: int32, their numbers in [0, S)."""

        def taken(x):
            if x is None or x.shape[1] == 1:
                return x
            return jnp.take_along_axis(jnp.broadcast_to(x, (len(at_BR), x.shape[1])), at_BR, axis=1)

        return Spans(*(taken(x) for x in (self.start, self.end, self.start2, self.end2)), second=self.second)


def _rows(x):
    """int32 [B or 1, S or 1] of a scalar, [B] or [B, S]; NumPy stays NumPy."""
    x = (np if isinstance(x, int | np.integer | np.ndarray) else jnp).asarray(x, dtype=np.int32)
    return x if x.ndim == 2 else x.reshape(-1, 1)


def full(num_keys: int) -> Spans:
    """Every row sees every key."""
    return Spans(_rows(0), _rows(num_keys))


def key_prefix(num_visible) -> Spans:
    """Every row sees keys [0, num_visible). num_visible: int32 scalar or [B]."""
    return Spans(_rows(0), _rows(num_visible))


def causal(num_queries: int, offset=0, start=0) -> Spans:
    """Row q sees keys [start, q + offset + 1).

    Args:
      num_queries: S.
      offset: keys before the first query (a cache), int32 scalar or [B].
      start: first key of the row's document, int32 scalar, [B], or [B, S] where documents are packed.
    """
    end = np.arange(num_queries, dtype=np.int32)[None] + (_rows(offset) + np.int32(1))
    return Spans(_rows(start), end, reach=offset if isinstance(offset, int) else None)


def bidirectional(end_BS, offset=0, start=0, longest: int | None = None) -> Spans:
    """Causal rows, of which some see to the end of the prefix or image that they are in.

    Args:
      end_BS: int32, one behind the last key of the row's prefix or image; 0 (or anything up to the row itself) in rows
        that are in none.
      offset, start: as in `causal`.
      longest: rows of the longest prefix or image, if that is known.
    """
    plain = causal(end_BS.shape[1], offset, start)
    lib = np if isinstance(end_BS, np.ndarray) and isinstance(plain.end, np.ndarray) else jnp
    reach = None if longest is None or plain.reach is None else plain.reach + longest - 1
    return Spans(plain.start, lib.maximum(plain.end, end_BS.astype(np.int32)), reach=reach)


def skip_causal(num_blocks: int, block_size: int) -> Spans:
    """One sequence of N clean blocks and then N noised ones (SCAM, arXiv 2412.07720 §4.2).

    Clean block i sees clean blocks 0..i; noised block i sees clean blocks 0..i-1 and itself. Where sequences are packed
    or mixed with text, the four numbers of a row come with its batch and go into `Spans` directly.
    """
    block = np.arange(2 * num_blocks, dtype=np.int32).repeat(block_size)
    noised = block >= num_blocks
    clean_end = np.where(noised, block - num_blocks, block + 1) * block_size
    own = np.where(noised, block, 0) * block_size
    own_end = own + noised * block_size
    seen = (_rows(0), *(_rows(x[None]) for x in (clean_end, own, own_end)))
    return Spans(*seen, reach=block_size - 1, second=block_size, blocks=(num_blocks, block_size))


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
