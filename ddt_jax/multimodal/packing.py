"""Packing as a plan: which documents share a row is a pure function of (seed, epoch, sizes), not the state of a stream.

The documents of an epoch are permuted and cut into blocks; each block is packed by itself, best fit in order of falling
length. How many rows each block gives is the index: with its prefix sum any row is found by packing one block. No
document is cut, and each comes once per epoch.

Legend: N documents of a source, D of a block, R resources.
"""

import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ddt_jax.data.permutation import Permutation
from ddt_jax.errors import UserError

ROWS_OF_A_BLOCK = 128  # about; of which the last few rows are not full
_SMALLEST_BLOCK = 2048  # documents; packing has a cost per block as well
_KEPT_BLOCKS = 8
_KEPT_EPOCHS = 2


def best_fit(sizes_DR, limits_R) -> list[np.ndarray]:
    """Packs things into bins, longest first, each into the fullest bin that still holds it.

    Args:
      sizes_DR: int; the first resource (length, at least 1) decides which bin is fullest.
      limits_R: what a bin holds; at least the largest size.

    Returns:
      Bins: numbers of things in rising order.
    """
    kinds, kind_D = np.unique(-np.asarray(sizes_DR, np.int64), axis=0, return_inverse=True)
    order = np.argsort(kind_D.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(kind_D.ravel(), minlength=len(kinds)))
    contents: list[list[int]] = []
    rooms: list[tuple[int, ...]] = []  # what is left in bins, sorted; bins_of says which have so much
    bins_of: dict[tuple[int, ...], list[int]] = {}
    limits = tuple(int(limit) for limit in limits_R)

    def put(room, new):
        if room not in bins_of:
            bins_of[room] = []
            insort(rooms, room)
        bins_of[room] += new

    begin = 0
    for size, end in zip((-kinds).tolist(), ends.tolist(), strict=True):
        members, begin = order[begin:end].tolist(), end
        while members:
            # Things of one size go in together: best fit would put the next into the bin that got the one before.
            at = bisect_left(rooms, (size[0],))
            while at < len(rooms) and any(r < s for r, s in zip(rooms[at], size, strict=True)):
                at += 1
            room = rooms[at] if at < len(rooms) else limits
            fits = min(r // s for r, s in zip(room, size, strict=True) if s)
            wanted = -(-len(members) // fits)
            if at < len(rooms):
                chosen = bins_of[room][-wanted:]
                del bins_of[room][-wanted:]
                if not bins_of[room]:
                    del bins_of[room], rooms[at]
            else:
                chosen = list(range(len(contents), len(contents) + wanted))
                contents += [[] for _ in chosen]
            full = []
            for number, bin_ in enumerate(chosen):
                some = members[number * fits : (number + 1) * fits]
                contents[bin_] += some
                if len(some) == fits:
                    full.append(bin_)
                else:
                    put(tuple(r - len(some) * s for r, s in zip(room, size, strict=True)), [bin_])
            if full:
                put(tuple(r - fits * s for r, s in zip(room, size, strict=True)), full)
            members = members[len(chosen) * fits :]
    return [np.asarray(sorted(bin_), np.int64) for bin_ in contents]


@dataclass(frozen=True)
class Packing:
    """How the documents of one source fill rows.

    Attributes:
      count: N.
      sizes: (document int64 [D], number in the series int64 [D]) → int [D, R]: length and whatever else is limited.
        A document's number is epoch N + its place in the epoch; what it becomes may depend on that (its format).
      limits: R numbers, what a row holds.
      seed, name: of the order.
      block: documents of a block.
      label: the source in messages; "" = name.
    """

    count: int
    sizes: Callable[[np.ndarray, np.ndarray], np.ndarray]
    limits: tuple[int, ...]
    seed: int
    name: str
    block: int
    label: str = ""

    def members(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of a block and their numbers in the series."""
        places = np.arange(block * self.block, min((block + 1) * self.block, self.count))
        return Permutation(self.count, self.seed, f"pack:{self.name}:{epoch}")(places), epoch * self.count + places

    def pack(self, epoch: int, block: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The rows of a block: documents and their numbers in the series, in the order of the epoch.

        Raises:
          UserError: a document is larger than a row.
        """
        documents, numbers = self.members(epoch, block)
        sizes = np.asarray(self.sizes(documents, numbers))
        too_large = np.flatnonzero((sizes > self.limits).any(axis=1))
        if too_large.size:
            worst = sizes[too_large[0]].tolist()
            way = "take a longer context, or let text be cut: raise sequences.context, or set sequences.truncate=True"
            way += " (or split=True of a source of texts alone)"
            if worst[0] <= self.limits[0]:  # cutting is for positions alone
                way = "raise sequences.targets and sequences.images, or set them to 0 for no limit of their own"
            raise UserError(
                f"packing: document {documents[too_large[0]]:,} of {self.label or self.name} needs {worst} (positions, "
                f"then what else is limited), a row holds {list(self.limits)}; {way}"
            )
        rows = best_fit(sizes, self.limits)
        # Best fit leaves the rows in order of length; their own shuffle undoes that.
        order = Permutation(len(rows), self.seed, f"rows:{self.name}:{epoch}:{block}")(np.arange(len(rows)))
        return [(documents[rows[i]], numbers[rows[i]]) for i in order]

    @property
    def blocks(self) -> int:
        """Blocks of an epoch."""
        return -(-self.count // self.block)


def block_size(mean_length: float, context: int) -> int:
    """Documents of a block that fills about ROWS_OF_A_BLOCK rows, or more."""
    return max(_SMALLEST_BLOCK, round(ROWS_OF_A_BLOCK * context / max(mean_length, 1)))


class RowStream:
    """The rows of a source, epoch after epoch, by number.

    To find row n it packs, by sizes alone, the epochs up to that of n once (the index), then the block that n lies in.
    Holds caches, no state: any process may ask for any row. Picklable, index included.
    """

    def __init__(self, packing: Packing):
        self.packing = packing
        self._epoch_ends: list[int] = []  # rows up to and including each epoch
        self._block_ends: OrderedDict[int, np.ndarray] = OrderedDict()
        self._packed: OrderedDict[tuple[int, int], list] = OrderedDict()
        self._lock = threading.RLock()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_packed")}

    def __setstate__(self, state):
        self.__dict__.update(state, _packed=OrderedDict(), _lock=threading.RLock())

    def epoch_rows(self, epoch: int) -> int:
        """How many rows an epoch has."""
        with self._lock:
            while len(self._epoch_ends) <= epoch:
                known = len(self._epoch_ends)
                self._epoch_ends.append(self._first_row(known) + int(self._index(known)[-1]))
            return self._epoch_ends[epoch] - self._first_row(epoch)

    def locate(self, row: int) -> tuple[int, int, int]:
        """(epoch, block, row in the block) of a row of the stream."""
        with self._lock:
            while not self._epoch_ends or self._epoch_ends[-1] <= row:
                self.epoch_rows(len(self._epoch_ends))
            epoch = int(np.searchsorted(self._epoch_ends, row, side="right"))
            row -= self._first_row(epoch)
            ends = self._index(epoch)
            block = int(np.searchsorted(ends, row, side="right"))
            return epoch, block, row - int(ends[block - 1] if block else 0)

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents of a row and their numbers in the series. Raises UserError as `Packing.pack`."""
        epoch, block, at = self.locate(row)
        with self._lock:
            return _cached(self._packed, (epoch, block), _KEPT_BLOCKS, lambda: self.packing.pack(epoch, block))[at]

    def _first_row(self, epoch):
        return self._epoch_ends[epoch - 1] if epoch else 0

    def _index(self, epoch):
        """Rows of the epoch up to and including each block."""

        def make():
            return np.cumsum([len(self.packing.pack(epoch, block)) for block in range(self.packing.blocks)])

        return _cached(self._block_ends, epoch, _KEPT_EPOCHS, make)


def _cached(cache: OrderedDict, key, size, make):
    if key not in cache:
        cache[key] = make()
        if len(cache) > size:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
