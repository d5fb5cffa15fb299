"""Which learning rate is best at each size.

Runs of one size on equally much data (`isoflop.amounts`) that differ in their rate are a curve; seeds of a rate are
averaged. The best rate of a curve is its lowest one, and, between rates, the bottom of the parabola over log rate
through it and its two neighbours. A lowest rate at an end of the grid is only a bound, and is said to be one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ddt_jax.scaling import isoflop
from ddt_jax.scaling.points import Point

MIN_RATES = 3


@dataclass(frozen=True)
class Curve:
    """The metric of a size over rates.

    Attributes:
      width: of the model; None where runs do not say it.
      tokens, flops: of a run, the median.
      rates: learning rates, rising; values: the metric there, mean over `runs` of them.
      best: the rate with the lowest value; bottom: of the parabola, None where `best` is at an end.
    """

    width: float | None
    params: float
    tokens: float
    flops: float
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
    found = []
    for of in _alike([p for p in used if p.lr is not None]):
        rates = sorted({p.lr for p in of})
        if len(rates) < MIN_RATES:
            continue
        values = [[p.metrics[metric] for p in of if p.lr == rate] for rate in rates]
        means = [float(np.mean(v)) for v in values]
        least = int(np.argmin(means))
        bottom = _bottom(rates[least - 1 : least + 2], means[least - 1 : least + 2]) if least else None
        counts = tuple(map(len, values))
        tokens, flops = (float(np.median([getattr(p, name) for p in of])) for name in ("tokens", "flops"))
        size = of[0].width, of[0].params, tokens, flops
        found.append(Curve(*size, tuple(rates), tuple(means), counts, rates[least], bottom))
    return found


def best(used: Sequence[Point], metric: str, choose: Callable = min) -> list[Point]:
    """Of each size and amount of data the runs with the rate whose mean over seeds is best, and those that say no rate.

    Args:
      choose: min where less is better, max where more is.
    """
    kept = set()
    for of in _alike(used):
        means = {rate: np.mean([p.metrics[metric] for p in of if p.lr == rate]) for rate in {p.lr for p in of} - {None}}
        kept |= {id(p) for p in of if p.lr is None or p.lr == choose(means, key=means.get)}
    return [p for p in used if id(p) in kept]


def _alike(used: Sequence[Point]) -> list[list[Point]]:
    groups = isoflop.amounts([p.params for p in used], [p.tokens for p in used])
    return [[used[i] for i in group] for group in groups]


def _bottom(rates, values) -> float | None:
    """Of the parabola through three points whose middle one is lowest; None where there is no third."""
    if len(rates) < 3:
        return None
    a, b, _ = np.polyfit(np.log(rates), values, 2)
    return float(np.exp(-b / (2 * a))) if a > 0 else float(rates[1])  # a = 0: three equal values


def ends(found: Sequence[Curve]) -> tuple[Curve, Curve] | None:
    """The curves of the smallest and of the largest size, None with less than two sizes.

    Both are on equally many tokens, or of equal FLOPs where sizes lie further apart there: at equal FLOPs each size has
    an amount of its own. Of several amounts it is the largest; where no two sizes share one, any will do.
    """
    by_tokens = isoflop.budgets([c.tokens for c in found], isoflop.SAME_TOKENS)
    groups = [*reversed(by_tokens), *reversed(isoflop.budgets([c.flops for c in found]))]
    groups = [sorted((found[i] for i in group), key=lambda c: c.params) for group in groups]
    shared = [of for of in groups if of[0].params < of[-1].params] or [sorted(found, key=lambda c: c.params)]
    of = max(shared, key=lambda of: of[-1].params / of[0].params if of else 0)
    return (of[0], of[-1]) if of and of[0].params < of[-1].params else None


def moved(found: Sequence[Curve]) -> float | None:
    """How many factors of 2 the best rate of the largest size lies above that of the smallest (`ends`): by the bottoms,
    or where one has none by the grid. None with less than two sizes.
    """
    if not (of := ends(found)):
        return None
    first, last = of
    if first.bottom and last.bottom:
        return math.log2(last.bottom / first.bottom)
    return math.log2(last.best / first.best)
