"""How many operations one family of runs needs for what another reaches: the parity FLOP ratio.

Transfusion (arXiv 2408.11039) §4.2: in each family the logarithm of a metric is a line over the logarithm of FLOPs. The
ratio is the cost at which a family's line reaches what the other family's dearest run has (the best one, where several
have about that cost), over the cost of that run; below 1 the family is the cheaper one. Which runs are left out is said
by rules (`points.Rule`), never by eye.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddt_jax.scaling import isoflop
from ddt_jax.scaling.points import Point

MIN_RUNS = 3
DRAWS = 2000


@dataclass(frozen=True)
class Line:
    """ln metric = constant + slope * ln FLOPs.

    Attributes:
      slope_interval: of 95 %.
      centre: geometric mean of the FLOPs.
      range: FLOPs of the cheapest and of the dearest run.
      draws: (slope, constant) that may be as well, float [draws, 2].
    """

    slope: float
    constant: float
    slope_interval: tuple[float, float]
    centre: float
    range: tuple[float, float]
    draws: np.ndarray

    def metric(self, flops):
        return np.exp(self.constant + self.slope * np.log(flops))


@dataclass(frozen=True)
class Parity:
    """A family against the dearest run of another.

    Attributes:
      value, flops: of that run.
      interval: of 95 %, from the scatter of the family about its line; the other's run is taken as it is. None: the
        slope may be 0, so that any cost may be needed.
      extrapolated: the cost lies outside of what the family was trained with.
    """

    family: str
    against: str
    run: str
    value: float
    flops: float
    ratio: float
    interval: tuple[float, float] | None
    extrapolated: bool


def line(flops, metric, *, draws: int = DRAWS, seed: int = 0) -> Line | None:
    """The line of a family, by least squares; None for fewer than three costs, as `isoflop.budgets` counts them: costs
    of one budget differ by the rounding of steps, and a line through that is none.

    Families have few runs: of five, a bootstrap of residuals holds the truth too rarely. The draws are those of
    Student's t, which are exact where the scatter of the logarithm is normal.

    Args:
      flops, metric: of each run [S], above 0.
    """
    x, y = np.log(np.asarray(flops, float)), np.log(np.asarray(metric, float))
    freedom = len(x) - 2
    if len(isoflop.budgets(flops)) < MIN_RUNS:
        return None
    centre, spread = x.mean(), np.sqrt(np.sum((x - x.mean()) ** 2))
    slope = np.sum((x - centre) * y) / spread**2
    deviation = np.sqrt(np.sum((y - y.mean() - slope * (x - centre)) ** 2) / freedom)
    rng = np.random.default_rng(seed)
    deviations = deviation * np.sqrt(freedom / rng.chisquare(freedom, draws))
    # Slope and level at the centre are independent of each other.
    slopes = slope + deviations / spread * rng.standard_normal(draws)
    levels = y.mean() + deviations / np.sqrt(len(x)) * rng.standard_normal(draws)
    low, high = np.percentile(slopes, [2.5, 97.5])
    span = float(np.exp(x.min())), float(np.exp(x.max()))
    drawn = np.stack([slopes, levels - slopes * centre], 1)
    constant = float(y.mean() - slope * centre)
    return Line(float(slope), constant, (float(low), float(high)), float(np.exp(centre)), span, drawn)


def parity(family: str, of: Line, against: Sequence[Point], metric: str) -> Parity:
    """The ratio of a family, by its line, against the dearest of another family's runs: the best of about that cost."""
    last = [against[i] for i in isoflop.budgets([point.flops for point in against])[-1]]
    dearest = (max if of.slope > 0 else min)(last, key=lambda point: point.metrics[metric])
    value, flops = dearest.metrics[metric], dearest.flops
    found = {"family": family, "against": dearest.family, "run": dearest.run, "value": value, "flops": flops}
    ratio = _ratio(math.log(value), math.log(flops), of.slope, of.constant)
    drawn = _ratio(math.log(value), math.log(flops), *of.draws.T)
    low, high = of.slope_interval
    bounds = None if low <= 0 <= high else tuple(float(v) for v in np.percentile(drawn, [2.5, 97.5]))
    outside = not of.range[0] <= ratio * flops <= of.range[1]
    return Parity(**found, ratio=float(ratio), interval=bounds, extrapolated=outside)


def _ratio(value, flops, slope, constant):
    """Of logarithms of the value and of what it cost; where a line is almost flat it stays a number."""
    return np.exp(np.clip((value - constant) / slope - flops, -700, 700))
