"""Charts as SVG text for a page that stands alone: curves of several runs, bars by position.

Written by hand rather than by Matplotlib: a chart is a few kB, takes the width of what it stands in and the page's
colours, and its text stays text.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ddt_jax.evaluation.canvas import COLOURS

_WIDTH, _HEIGHT = 360, 220  # units; a chart is as wide as the page lets it
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 26, 36
_POINTS = 240  # of a curve, but for its ends and what is no number
_DOTS = 12  # up to which each point of a curve is marked
_LETTERS = 48  # of a title, that a chart has room for
_AIR = 0.03  # of the height of a curve, above and below it
_FROM_ZERO = 0.1  # an axis of steps begins at 0 if the first lies below this share of the last


class Curve(NamedTuple):
    """Attributes:
    colour: which of the page's, from 0.
    points: (x, y), x rising; y may be no finite number, which is a cross at the upper edge.
    """

    label: str
    colour: int
    points: Sequence[tuple[float, float]]


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def curves(title: str, shown: Sequence[Curve], x_label: str = "step") -> str:
    """Curves in one frame; a logarithmic axis where all values are above 0 and span more than a factor of ten."""
    finite = [(x, y) for curve in shown for x, y in curve.points if math.isfinite(y)]
    if not finite:
        return ""
    xs, ys = zip(*finite, strict=True)
    logarithmic = min(ys) > 0 and max(ys) > 10 * min(ys)
    scale = math.log10 if logarithmic else float
    first = 0.0 if 0 < min(xs) < _FROM_ZERO * max(xs) else min(xs)
    low, high = scale(min(ys)), scale(max(ys))
    air = _AIR * (high - low)
    frame = _Frame((first, max(xs)), (low - air, high + air))
    parts = _axes(frame, title, x_label, logarithmic)
    if logarithmic:
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="14" text-anchor="end" class="axis">logarithmic</text>')
    for curve in shown:
        of, run = _thinned([(x, scale(y) if math.isfinite(y) else y) for x, y in curve.points]), []
        for x, y in [*of, (0, math.nan)]:
            if math.isfinite(y):
                run.append(frame.at(x, y))
                continue
            if len(run) > 1:
                line = " ".join(f"{px:.1f},{py:.1f}" for px, py in run)
                parts.append(
                    f'<polyline points="{line}" fill="none" stroke="{colour(curve.colour)}" stroke-width="1.6"/>'
                )
            elif run:
                parts.append(f'<circle cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="3" fill="{colour(curve.colour)}"/>')
            run = []
        for x, y in curve.points:
            if math.isfinite(y) and 1 < len(curve.points) <= _DOTS:
                px, py = frame.at(x, scale(y))
                parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{colour(curve.colour)}"/>')
            if not math.isfinite(y):
                px = frame.at(x, frame.y[1])[0]
                parts.append(f'<text x="{px:.1f}" y="{_TOP + 4}" class="bad" text-anchor="middle">×</text>')
    return _svg(title, parts)


def bars(title: str, values: Sequence[float], inner: Sequence[float], top: float, x_label: str, index: int = 0) -> str:
    """A bar for each position, an inner one in a stronger tone, and a dotted line at what they can reach."""
    frame = _Frame((0, len(values)), (0.0, max(top, *values)))
    parts = _axes(frame, title, x_label, False)
    for i, (value, within) in enumerate(zip(values, inner, strict=True)):
        for height, opacity in ((value, 0.3), (within, 1)):
            x, y = frame.at(i + 0.1, height)
            width = (frame.at(i + 0.9, 0)[0]) - x
            rest = f'width="{width:.1f}" height="{frame.at(i, 0)[1] - y:.1f}" opacity="{opacity}"'
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" {rest} fill="{colour(index)}"/>')
    y = frame.at(0, top)[1]
    parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="limit"/>')
    return _svg(title, parts)


class _Frame(NamedTuple):
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the picture."""
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)


def _axes(frame, title, x_label, logarithmic) -> list[str]:
    room = _LETTERS - (12 if logarithmic else 0)
    said = title if len(title) <= room else f"{title[: room - 1]}…"
    parts, base = [f'<text x="6" y="15" class="title">{escape(said)}</text>'], _HEIGHT - _BOTTOM
    for value in (_decades if logarithmic else _ticks)(*frame.y):
        y = frame.at(frame.x[0], value)[1]
        text = f"{10**value:.3g}" if logarithmic else f"{value:.4g}"
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for value in _ticks(*frame.x):
        x = frame.at(value, frame.y[0])[0]
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}" class="base"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{_short(value)}</text>')
    parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}" class="base"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 6}" text-anchor="middle" class="axis">{escape(x_label)}</text>')
    return parts


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers between two."""
    if high <= low:
        return [low]
    rough = (high - low) / about
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Logarithms of round numbers between two, of as few kinds as give three of them."""
    for kinds in ((1,), (1, 3), (1, 2, 5)):
        logs = [k + math.log10(m) for k in range(math.floor(low), math.ceil(high) + 1) for m in kinds]
        found = [value for value in logs if low <= value <= high]
        if len(found) >= 3:
            break
    return found[:: max(1, math.ceil(len(found) / 6))]


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def _thinned(points):
    """About _POINTS of them, first and last among them: of each stretch the lowest and the highest, so that no spike is
    lost; what is no number stays.
    """
    if len(points) <= _POINTS:
        return points
    every = math.ceil(2 * len(points) / _POINTS)
    kept = {0, len(points) - 1} | {i for i, (_, y) in enumerate(points) if not math.isfinite(y)}
    for start in range(0, len(points), every):
        finite = [i for i in range(start, min(start + every, len(points))) if math.isfinite(points[i][1])]
        if finite:
            kept |= {choose(finite, key=lambda i: points[i][1]) for choose in (min, max)}
    return [points[i] for i in sorted(kept)]


def _svg(title, parts) -> str:
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
    return "\n".join([head, *parts, "</svg>"])
