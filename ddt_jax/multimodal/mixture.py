"""Choices in exact proportions: number m of an endless series is a pure function of (weights, seed, m).

The options are the leaves of a binary tree. A node that has seen m items has given floor((m a + phase) / w) of them to
its left side, whose weight is a of w: so any prefix of the series has each option's share to within the depth of the
tree, and any number is found without the ones before it.
"""

from collections.abc import Mapping
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from ddt_jax.data.permutation import keyed_integers
from ddt_jax.errors import UserError

MAX_WEIGHT = 1 << 20  # the sum of whole-number weights; positions up to 2^42 then stay within 63 bits


def whole_weights(weights: Mapping[str, float], what: str) -> list[int]:
    """Weights as the smallest whole numbers in the same proportion, taken from their decimal digits.

    Raises:
      UserError: one is negative or no number, all are zero, or they need larger numbers than 2^20.
    """
    try:
        exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    except ValueError:
        raise UserError(f"{what}: weights {dict(weights)} must be numbers") from None
    for name, weight in exact.items():
        if weight < 0:
            raise UserError(f"{what}: weight {float(weight)} of {name} is negative; leave {name} out or set it to 0")
    if not any(exact.values()):
        raise UserError(f"{what}: weights {dict(weights)} leave nothing to choose; give one that is above 0")
    common = lcm(*(w.denominator for w in exact.values()))
    whole = [int(w * common) for w in exact.values()]
    divisor = gcd(*whole)
    whole = [w // divisor for w in whole]
    if sum(whole) > MAX_WEIGHT:
        raise UserError(f"{what}: weights {dict(weights)} have too many digits; write them with 5 or fewer")
    return whole


class Proportions:
    """An endless series of choices.

    Args:
      weights: by name; any scale. A choice is the number of a name.
      key: of the phases, so that two series with the same weights do not run in step.
      what: names the setting in messages.

    Raises:
      UserError: see `whole_weights`.
    """

    def __init__(self, weights: Mapping[str, float], *key: int | str, what: str = "mixture"):
        self.names = tuple(weights)
        self._weights = np.cumsum([0, *whole_weights(weights, what)])
        self._key = key
        self._phases: dict[tuple[int, int], int] = {}

    def __call__(self, index) -> tuple[np.ndarray, np.ndarray]:
        """(choice, rank): the option of each number, and how many before it had the same. int64 like index."""
        index = np.asarray(index, np.int64)
        choice, rank = np.zeros_like(index.ravel()), index.ravel().copy()
        self._descend(0, len(self.names), np.arange(index.size), choice, rank)
        return choice.reshape(index.shape), rank.reshape(index.shape)

    def _descend(self, low, high, members, choice, rank):
        """Members are the numbers whose option lies in [low, high); rank is theirs within this node."""
        if not members.size:
            return
        if high - low == 1:
            choice[members] = low
            return
        middle = (low + high) // 2
        left, whole = self._weights[middle] - self._weights[low], self._weights[high] - self._weights[low]
        phase = self._phase(low, high, int(whole))
        m = rank[members]
        before = (m * left + phase) // whole
        goes_left = (m * left + left + phase) // whole > before
        rank[members] = np.where(goes_left, before, m - before)
        self._descend(low, middle, members[goes_left], choice, rank)
        self._descend(middle, high, members[~goes_left], choice, rank)

    def _phase(self, low, high, whole):
        """Of a node. Kept: single documents ask for it again and again."""
        if (low, high) not in self._phases:
            (phase,) = keyed_integers(1, "proportions", *self._key, low, high)
            self._phases[low, high] = int(phase) % whole
        return self._phases[low, high]
