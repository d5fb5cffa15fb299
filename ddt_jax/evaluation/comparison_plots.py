"""Plots of a comparison (`evaluation.comparison`): each figure with its interval by arm, and what rates and guidance
were chosen from.
"""

import textwrap
from collections.abc import Mapping, Sequence

from ddt_jax.evaluation import canvas
from ddt_jax.evaluation.comparison import CHOSEN_BY, FIGURES, SHARES, Arm, Comparison, Row, guidance
from ddt_jax.evaluation.samples import Sample

COLUMNS = 9  # prompts whose pictures are shown
RIGHT = "#2e9e5b"


def draw(found: Comparison, rows: Sequence[Row], drawn: Mapping[str, Sequence[Sample]], folder) -> list:
    """All plots of a comparison, and what its arms have drawn.

    Args:
      drawn: arm → samples of a run; those of prompts that all of them got are shown, and nothing if there are none.
      folder: a path that `/` works on.

    Returns:
      The paths of the PNGs.
    """
    written = [_figure(found.arms, name, folder / f"{name}.png") for name in FIGURES]
    written.append(_rates(found, rows, folder / "rates.png"))
    written.append(_guidances(found, rows, folder / "guidance.png"))
    by_text = {arm: {s.text: s for s in reversed(samples)} for arm, samples in drawn.items()}
    texts = [text for text in next(iter(by_text.values()), {}) if all(text in of for of in by_text.values())]
    return [*written, _drawn(by_text, texts[::-1][:COLUMNS], folder / "drawn.png")] if texts else written


def _drawn(by_text, texts, path):
    """A row for each arm, a column for each prompt; a frame around what is right."""
    figure = canvas.new(1.02 * len(texts) + 0.9, 0.95 * len(by_text) + 1.1)
    axes = figure.subplots(len(by_text), len(texts), squeeze=False)
    for (arm, of), row in zip(by_text.items(), axes, strict=True):
        row[0].set_ylabel(arm, fontsize=8, color=canvas.FAINT)
        for text, axis in zip(texts, row, strict=True):
            axis.imshow(of[text].picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            right = bool(of[text].right)
            axis.spines[:].set(color=RIGHT if right else "#d5d8dd", linewidth=2.4 if right else 0.8)
    for text, axis in zip(texts, axes[-1], strict=True):
        axis.set_xlabel(textwrap.fill(text, 17), fontsize=5.5, color=canvas.FAINT)
    figure.suptitle("drawn by the second seed; framed: right", fontsize=10, x=0.01, ha="left", color="#262a30")
    return canvas.save(figure, path)


def _figure(arms: Sequence[Arm], name, path):
    """A line for each arm: the mean of its seeds, its interval of 95 %, and the seeds as dots."""
    figure = canvas.new(6.4, 1.2 + 0.38 * len(arms))
    axis = figure.add_subplot()
    for i, arm in enumerate(arms):
        of, colour = arm.figures[name], canvas.COLOURS[i % len(canvas.COLOURS)]
        if not of:
            axis.annotate("no value", (0.5, i), xycoords=("axes fraction", "data"), fontsize=8, color=canvas.FAINT)
            continue
        axis.scatter(of["values"], [i] * len(of["values"]), s=14, facecolors="none", edgecolors=colour, zorder=3)
        if of["low"] is not None:
            bars = [[of["value"] - of["low"]], [of["high"] - of["value"]]]
            axis.errorbar([of["value"]], [i], xerr=bars, color=colour, linewidth=1.8, capsize=4)
        axis.scatter([of["value"]], [i], s=42, color=colour, zorder=4)
    canvas.style(axis, f"{FIGURES[name]}: mean of the seeds, interval of 95 %, each seed")
    axis.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axis.set_ylim(len(arms) - 0.5, -0.5)  # the first on top, as in the table
    if name in SHARES:
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.set_xlabel("share of answers", fontsize=8, color=canvas.FAINT)
    else:
        axis.set_xlabel(f"{FIGURES[name]} (lower is better)", fontsize=8, color=canvas.FAINT)
    return canvas.save(figure, path)


def _rates(found, rows, path):
    """What rates are chosen by, over the rate; the best one is filled. One that diverged is a cross at the bottom."""
    figure = canvas.new(6.4, 3.6)
    axis = figure.add_subplot()
    axis.set_xscale("log")
    seed, every = _tuning(found), sorted({row.lr for row in rows})
    for arm, colour in zip(found.arms, _colours(), strict=False):
        of = [row for row in rows if row.arm == arm.name and row.seed == seed and not row.diverged]
        points = set.intersection(*({row.point for row in of if row.lr == lr} for lr in {row.lr for row in of}))
        best = {}
        for row in (row for row in of if row.point in points and _score(row) is not None):
            best[row.lr] = max(best.get(row.lr, 0.0), _score(row))
        _chosen_curve(axis, best, arm.lr, colour, arm.name)
        lost = [row.lr for row in rows if row.arm == arm.name and row.seed == seed and row.diverged]
        how = {"marker": "x", "color": colour, "clip_on": False, "transform": axis.get_xaxis_transform()}
        axis.scatter(lost, [0.02] * len(lost), **how)
    canvas.style(axis, "captions and pictures that are right, on the first seed (× diverged)")
    axis.set_xticks(every, [f"{rate:g}" for rate in every])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("learning rate", fontsize=8, color=canvas.FAINT)
    canvas.legend(figure)
    return canvas.save(figure, path)


def _guidances(found, rows, path):
    figure = canvas.new(6.4, 3.6)
    axis = figure.add_subplot()
    seed = _tuning(found)
    for arm, colour in zip(found.arms, _colours(), strict=False):
        of = [row for row in rows if (row.arm, row.seed, row.lr) == (arm.name, seed, arm.lr) and not row.diverged]
        shares = {guidance(row.point): row.results.get("t2i_all_correct") for row in of}
        chosen = guidance(arm.rows[0].point)
        _chosen_curve(axis, {k: v for k, v in shares.items() if v is not None}, chosen, colour, arm.name)
    canvas.style(axis, "pictures that are right, on the first seed at the best learning rate")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    tried = sorted({guidance(row.point) for row in rows if not row.diverged})
    axis.set_xticks(tried, [f"{g:g}" for g in tried])
    axis.set_xlabel("guidance", fontsize=8, color=canvas.FAINT)
    canvas.legend(figure)
    return canvas.save(figure, path)


def _chosen_curve(axis, values, chosen, colour, label):
    xs = sorted(values)
    axis.plot(xs, [values[x] for x in xs], color=colour, linewidth=1.4, label=label)
    filled = [colour if x == chosen else "white" for x in xs]
    axis.scatter(xs, [values[x] for x in xs], s=30, color=filled, edgecolors=colour, zorder=3)


def _tuning(found: Comparison) -> int:
    return min(row.seed for arm in found.arms for row in arm.rows)


def _score(row) -> float | None:
    values = [row.results.get(name) for name in CHOSEN_BY]
    return None if None in values else sum(values) / len(values)


def _colours():
    while True:
        yield from canvas.COLOURS
