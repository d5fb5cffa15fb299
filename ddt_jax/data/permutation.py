"""A shuffle that is computed, not stored: permutation of [0, n) by a Feistel network with cycle walking.

Position i of epoch e is a pure function of (seed, e, i), so a run can start at any step on any number of hosts and no
buffer has to be refilled. The network permutes [0, 2^bits) with 2^bits < 2n; a result outside [0, n) is put in again,
which ends inside (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

import hashlib

import numpy as np

ROUNDS = 8  # 4 are enough for a wide block (Luby-Rackoff); narrow ones need more to look random
_MASK = (1 << 64) - 1


def keyed_integers(count: int, *key: int | str) -> list[int]:
    """`count` integers of 64 bits from a key; the same on every machine and in every version."""
    text = ":".join(str(part) for part in key).encode()
    digest = hashlib.shake_128(text).digest(8 * count)
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(count)]


def keyed_generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator from a key."""
    return np.random.Generator(np.random.Philox(key=keyed_integers(2, *key)))


class Permutation:
    """A bijection of [0, n), different for each (seed, epoch).

    Args:
      n: size, at least 1, below 2^62.
    """

    def __init__(self, n: int, seed: int, epoch: int | str):
        if not 1 <= n < 1 << 62:
            raise ValueError(f"a permutation of {n} things")
        self.n = n
        bits = (n - 1).bit_length()
        self._right = bits // 2
        self._left = bits - self._right
        self._keys = keyed_integers(ROUNDS, "permutation", seed, epoch)

    def __call__(self, index):
        """Maps positions to records: an int to an int, an integer array to int64 of its shape."""
        if isinstance(index, (int, np.integer)):
            return self._scalar(int(index))
        index = np.asarray(index)
        if index.size and (index.min() < 0 or index.max() >= self.n):
            raise IndexError(f"positions outside [0, {self.n})")
        x = self._network(index.astype(np.uint64).ravel())
        while True:
            outside = np.flatnonzero(x >= self.n)
            if not outside.size:
                return x.astype(np.int64).reshape(index.shape)
            x[outside] = self._network(x[outside])

    def _scalar(self, x: int) -> int:
        if not 0 <= x < self.n:
            raise IndexError(f"position {x} outside [0, {self.n})")
        while True:
            left_bits, right_bits = self._left, self._right
            left, right = x >> right_bits, x & ((1 << right_bits) - 1)
            for key in self._keys:
                left, right = right, left ^ (_mix(right, key) & ((1 << left_bits) - 1))
                left_bits, right_bits = right_bits, left_bits
            x = left << right_bits | right  # an even number of rounds: the halves have their first sizes again
            if x < self.n:
                return x

    def _network(self, x):
        left_bits, right_bits = self._left, self._right
        left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
        for key in self._keys:
            left, right = right, left ^ (_mix_array(right, key) & np.uint64((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return left << np.uint64(right_bits) | right


def _mix(x: int, key: int) -> int:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014) of x + key."""
    x = (x + key) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


def _mix_array(x, key: int):
    x = x + np.uint64(key)  # arrays of uint64 wrap silently, which is what is wanted
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
