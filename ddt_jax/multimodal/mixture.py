"""Choices in exact proportions: number m of an endless series is a pure function of (weights, seed, m).

The options are the leaves of a binary tree. A node that has seen m items has given floor((m a + phase) / w) of them to
its left side, whose weight is a of w: so any prefix of the series has each option's share to within the depth of the
tree. After w items a node has given each side exactly its weight, and it begins again where it was: the whole series
repeats itself after as many items as the weights' sum, and is kept as a table of those.
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
        self._weights = np.array(whole_weights(weights, what))
        period = int(self._weights.sum())
        self._choice, self._rank = np.zeros(period, np.int32), np.arange(period)
        self._descend(key, 0, len(self.names), np.arange(period))

    def __call__(self, index) -> tuple[np.ndarray, np.ndarray]:
        """(choice, rank): the option of each number, and how many before it had the same. int64 like index."""
        turns, place = np.divmod(np.asarray(index, np.int64), len(self._choice))
        choice = self._choice[place]
        return choice.astype(np.int64), self._rank[place] + turns * self._weights[choice]

    def _descend(self, key, low, high, members):
        """Members are the numbers whose option lies in [low, high); their ranks are those within this node."""
        if high - low == 1 or not members.size:
            self._choice[members] = low
            return
        middle = (low + high) // 2
        left, whole = int(self._weights[low:middle].sum()), int(self._weights[low:high].sum())
        (phase,) = keyed_integers(1, "proportions", *key, low, high)
        phase = int(phase) % whole
        m = self._rank[members]
        before = (m * left + phase) // whole
        goes_left = (m * left + left + phase) // whole > before
        self._rank[members] = np.where(goes_left, before, m - before)
        self._descend(key, low, middle, members[goes_left])
        self._descend(key, middle, high, members[~goes_left])
