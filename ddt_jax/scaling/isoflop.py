"""Iso-FLOP parabolas: of runs of one cost, the size that loses least; and how that size grows with the cost.

Hoffmann et al. 2022 (arXiv 2203.15556) §3.2: for each budget a parabola of the loss over log N; the sizes at their
bottoms are taken to be a power of the budget.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 0.1  # by how much costs of runs of one budget differ at most, each from the next
SAME_TOKENS = 0.02  # the same of tokens: rows that another seed has packed hold a few more or less
_CERTAIN = 0.975  # share of resampled parabolas that must have a bottom
MIN_SIZES = 4  # three sizes lie on a parabola whatever they are


@dataclass(frozen=True)
class Valley:
    """The runs of one budget.

    Attributes:
      flops: geometric mean of their costs.
      curve: (c2, c1, c0) of the loss over ln N; None: too few sizes.
      params, tokens, loss: at the bottom; None: `why` says why there is none.
      params_interval: of 95 %.
    """

    flops: float
    runs: list[int]
    curve: tuple[float, float, float] | None = None
    params: float | None = None
    tokens: float | None = None
    loss: float | None = None
    params_interval: tuple[float, float] | None = None
    why: str = ""


@dataclass(frozen=True)
class IsoFlop:
    """Parabolas of all budgets, and N_opt = coefficient * C^exponent; None for fewer than two bottoms."""

    valleys: list[Valley]
    coefficient: float | None = None
    exponent: float | None = None
    exponent_interval: tuple[float, float] | None = None


def budgets(flops: Sequence[float], tolerance: float = TOLERANCE) -> list[list[int]]:
    """Indices of runs of about the same cost, from the cheapest on."""
    groups: list[list[int]] = []
    order = sorted(range(len(flops)), key=lambda i: flops[i])
    for before, i in zip([None, *order], order, strict=False):
        if before is None or flops[i] > flops[before] * (1 + tolerance):
            groups.append([])
        groups[-1].append(i)
    return groups


def amounts(params: Sequence[float], tokens: Sequence[float]) -> list[list[int]]:
    """Indices of runs of one size on about as many tokens, the smallest size first."""
    found = []
    for size in sorted(set(params)):
        of = [i for i in range(len(params)) if params[i] == size]
        found += [[of[j] for j in group] for group in budgets([tokens[i] for i in of], SAME_TOKENS)]
    return found


def fit(params, tokens, flops, losses, *, draws: int = 1000, seed: int = 0) -> IsoFlop:
    """Parabolas and the power law through their bottoms.

    Args:
      params, tokens, flops, losses: of each run [S].
      draws: of the bootstrap. Each budget has few runs, so residuals are drawn from those of all budgets together, as
        large as they would be had three coefficients not followed them.
    """
    params, tokens, losses = (np.asarray(x, float) for x in (params, tokens, losses))
    groups, fitted, pool = budgets(flops), {}, []
    for g, runs in enumerate(groups):
        if len(set(params[runs])) >= MIN_SIZES:
            x = np.log(params[runs])
            curve, freedom = np.polyfit(x, losses[runs], 2), len(runs) - 3
            residuals = losses[runs] - np.polyval(curve, x)
            pool.append(residuals * math.sqrt(len(runs) / freedom))
            fitted[g] = (x, curve)
    noise = np.concatenate(pool) if pool else np.zeros(1)
    rng = np.random.default_rng(seed)
    valleys, bottoms = [], {}
    for g, runs in enumerate(groups):
        cost = float(np.exp(np.mean(np.log(np.asarray(flops, float)[runs]))))
        if g not in fitted:
            few = f"{len(set(params[runs]))} sizes, a parabola takes {MIN_SIZES}"
            valleys.append(Valley(cost, runs, why=few))
            continue
        x, curve = fitted[g]
        again = np.polyval(curve, x) + rng.choice(noise, (draws, len(x)))
        curves = np.linalg.lstsq(np.vander(x - x.mean(), 3), again.T, rcond=None)[0]
        drawn = _bottom(curves) + x.mean()
        valley = _valley(cost, runs, x, curve, np.log(tokens[runs]), drawn)
        valleys.append(valley)
        if valley.params:
            bottoms[g] = (math.log(cost), math.log(valley.params), drawn)
    if len(bottoms) < 2:
        return IsoFlop(valleys)
    costs, sizes, drawn = zip(*bottoms.values(), strict=True)
    exponent, constant = np.polyfit(costs, sizes, 1)
    drawn = np.stack(drawn)
    drawn = np.polyfit(costs, drawn[:, np.isfinite(drawn).all(0)], 1)[0]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return IsoFlop(valleys, math.exp(constant), float(exponent), (float(low), float(high)))


def _bottom(curves):
    """Where parabolas [3, ...] have their bottom; nan for one that opens downwards."""
    return np.where(curves[0] > 0, -curves[1] / (2 * np.where(curves[0] > 0, curves[0], 1)), np.nan)


def _valley(cost, runs, x, curve, log_tokens, drawn) -> Valley:
    shape = tuple(map(float, curve))
    at = float(_bottom(curve))
    if not math.isfinite(at):
        return Valley(cost, runs, shape, why="the parabola opens downwards: noise, or sizes too close to each other")
    if not x.min() <= at <= x.max():
        side, word = ("above", "larger") if at > x.max() else ("below", "smaller")
        why = f"the bottom would lie {side} all sizes; train {word} ones"
        return Valley(cost, runs, shape, why=why)
    if np.mean(np.isfinite(drawn)) < _CERTAIN:
        return Valley(cost, runs, shape, why="too noisy: resampled runs have parabolas that open downwards")
    low, high = np.exp(np.nanpercentile(drawn, [2.5, 97.5]))
    tokens = math.exp(np.polyval(np.polyfit(x, log_tokens, 1), at))  # at one cost, close to a line with slope -1
    loss = float(np.polyval(curve, at))
    return Valley(cost, runs, shape, math.exp(at), tokens, loss, (float(low), float(high)))
