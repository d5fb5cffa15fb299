"""Which learning rate is best at each size.

Runs of one size on equally much data that differ in their rate are a curve; seeds of a rate are averaged. The best rate
of a curve is its lowest one, and, between rates, the bottom of the parabola over log rate through it and its two
neighbours. A lowest rate at an end of the grid is only a bound, and is said to be one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from ddt_jax.scaling.points import Point

MIN_RATES = 3


@dataclass(frozen=True)
class Curve:
    """The metric of a size over rates.

    Attributes:
      width: of the model; None where runs do not say it.
      rates: learning rates, rising; values: the metric there, mean over `runs` of them.
      best: the rate with the lowest value; bottom: of the parabola, None where `best` is at an end.
    """

    width: float | None
    params: float
    tokens: float
    rates: tuple[float, ...]
    values: tuple[float, ...]
    runs: tuple[int, ...]
    best: float
    bottom: float | None

    @property
    def name(self) -> str:
        return f"{self.params:.3g} parameters" if self.width is None else f"width {self.width:g}"


def curves(used: Sequence[Point], metric: str) -> list[Curve]:
    """One for each size and amount of data with MIN_RATES rates or more, the smallest size first."""
    key = lambda p: (p.tokens, p.params)  # noqa: E731
    with_rate = sorted((p for p in used if p.lr is not None), key=key)
    found = []
    for (tokens, params), group in groupby(with_rate, key):
        of = list(group)
        rates = sorted({p.lr for p in of})
        if len(rates) < MIN_RATES:
            continue
        values = [[p.metrics[metric] for p in of if p.lr == rate] for rate in rates]
        means = [float(np.mean(v)) for v in values]
        least = int(np.argmin(means))
        bottom = _bottom(rates[least - 1 : least + 2], means[least - 1 : least + 2]) if least else None
        counts = tuple(map(len, values))
        found.append(Curve(of[0].width, params, tokens, tuple(rates), tuple(means), counts, rates[least], bottom))
    return found


def _bottom(rates, values) -> float | None:
    """Of the parabola through three points whose middle one is lowest; None where there is no third."""
    if len(rates) < 3:
        return None
    a, b, _ = np.polyfit(np.log(rates), values, 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else float(rates[1])  # a = 0: three equal values


def moved(found: Sequence[Curve]) -> float | None:
    """How many factors of 2 the best rate of the largest size lies above that of the smallest: by the bottoms, or where
    one has none by the grid. None with less than two sizes.
    """
    if len(found) < 2 or found[0].params == found[-1].params:
        return None
    first, last = found[0], found[-1]
    if first.bottom and last.bottom:
        return math.log2(last.bottom / first.bottom)
    return math.log2(last.best / first.best)
