"""Plots of a scaling study (`scaling.fits.study`): a metric over FLOPs, iso-FLOP parabolas, the law against the runs,
the metric over learning rates.

Runs that no fit used are crosses: at their value, or where they have none at the upper edge. Those that were left out
because another learning rate is better are pale dots.
"""

import math
from typing import Any

import numpy as np

from ddt_jax.evaluation import canvas

_CROSS = {"marker": "x", "color": "#c0392b", "s": 42, "linewidth": 1.6, "zorder": 4, "clip_on": False}


def draw(tree: dict[str, Any], folder) -> list:
    """All plots of a study. folder: a path that `/` works on; returns the paths of the PNGs."""
    written = []
    for name, metric in tree["metrics"].items():
        stem = name.replace("/", "_")
        written.append(flops_plot(tree, name, folder / f"{stem}_flops.png"))
        for family, found in metric["families"].items():
            if "why" not in found["isoflop"]:
                path = folder / f"{stem}_{family}_isoflop.png"
                written.append(isoflop_plot(_used(tree, family, found), name, found["isoflop"], family, path))
            if "why" not in found["law"]:
                path = folder / f"{stem}_{family}_law.png"
                written.append(law_plot(_used(tree, family, found), name, found["law"], family, path))
            if "why" not in found["rates"]:
                left_out = {row["run"] for row in found["left_out"]} - set(found["other_rates"])
                lost = [p["lr"] for p in tree["points"] if p["family"] == family and p["run"] in left_out and p["lr"]]
                path = folder / f"{stem}_{family}_rates.png"
                written.append(rates_plot(name, found["rates"], lost, family, path))
    return written


def _used(tree, family, found):
    by_run = {point["run"]: point for point in tree["points"] if point["family"] == family}
    return [by_run[run] for run in found["used"]]


def flops_plot(tree, name, path):
    """The metric of every run over its FLOPs, a line for each family."""
    figure = canvas.new(6.4, 4.2)
    axis = figure.add_subplot()
    axis.set_xscale("log")
    axis.set_yscale("log")
    lost, nowhere = [], []
    for (family, found), colour in zip(tree["metrics"][name]["families"].items(), _colours(), strict=False):
        used = _used(tree, family, found)
        x = [point["flops"] for point in used]
        axis.scatter(x, [point["metrics"][name] for point in used], s=22, color=colour, label=family, zorder=3)
        line = found["line"]
        if "why" not in line:
            ends = np.array(line["range"])
            axis.plot(ends, np.exp(line["constant"] + line["slope"] * np.log(ends)), color=colour, linewidth=1.4)
        for point in (p for p in tree["points"] if p["family"] == family and p["run"] in found["other_rates"]):
            axis.scatter(point["flops"], point["metrics"][name], s=12, color=colour, alpha=0.35, linewidth=0)
        out = {row["run"] for row in found["left_out"]} - set(found["other_rates"])
        for point in (p for p in tree["points"] if p["family"] == family and p["run"] in out):
            value = float(point["metrics"].get(name, math.nan))
            (lost if math.isfinite(value) and value > 0 else nowhere).append((point["flops"], value))
    label = {"label": "not used"}
    if lost:
        axis.scatter(*zip(*lost, strict=True), **_CROSS, **label)
    if nowhere:
        where = [x for x, _ in nowhere], [0.97] * len(nowhere)
        axis.scatter(*where, transform=axis.get_xaxis_transform(), **_CROSS, **({} if lost else label))
    canvas.style(axis, f"{name} over training FLOPs")
    axis.set_xlabel("FLOPs", fontsize=8, color=canvas.FAINT)
    _plain(axis.yaxis)
    canvas.legend(figure)
    return canvas.save(figure, path)


def isoflop_plot(used, name, found, family, path):
    """Left the runs of each budget with their parabola and its bottom; right the bottoms over the budgets."""
    from matplotlib import colormaps

    figure = canvas.new(9.4, 4.0)
    left, right = figure.subplots(1, 2)
    left.set_xscale("log")
    shades = colormaps["viridis"](np.linspace(0.05, 0.85, len(found["valleys"])))
    for valley, colour in zip(found["valleys"], shades, strict=True):
        runs = [used[i] for i in valley["runs"]]
        size, loss = [p["params"] for p in runs], [p["metrics"][name] for p in runs]
        left.scatter(size, loss, s=18, color=colour, label=f"{valley['flops']:.2g} FLOPs", zorder=3)
        if valley["curve"]:
            x = np.geomspace(min(size), max(size), 60)
            left.plot(x, np.polyval(valley["curve"], np.log(x)), color=colour, linewidth=1.3)
        if valley["params"]:
            left.scatter([valley["params"]], [valley["loss"]], marker="*", s=110, color=colour, zorder=4)
    canvas.style(left, f"{family}: {name} by size at equal FLOPs")
    left.set_xlabel("parameters", fontsize=8, color=canvas.FAINT)
    bottoms = [v for v in found["valleys"] if v["params"]]
    if bottoms:
        right.set_xscale("log")
        right.set_yscale("log")
        cost, size = (np.array([v[k] for v in bottoms]) for k in ("flops", "params"))
        low, high = np.array([v["params_interval"] for v in bottoms]).T
        bars = np.maximum(0, [size - low, high - size])
        right.errorbar(cost, size, bars, color=canvas.CURVE, marker="o", markersize=4, linewidth=0, elinewidth=1.3)
    title = "best size by budget"
    if found["exponent"] is not None:
        right.plot(cost, found["coefficient"] * cost ** found["exponent"], color=canvas.COLOURS[1], linewidth=1.3)
        title += (
            f": C^{found['exponent']:.2f} ({found['exponent_interval'][0]:.2f} to {found['exponent_interval'][1]:.2f})"
        )
    canvas.style(right, title)
    right.set_xlabel("FLOPs", fontsize=8, color=canvas.FAINT)
    canvas.legend(figure)
    return canvas.save(figure, path)


def law_plot(used, name, found, family, path):
    """Left what the law says against what was measured; right its curves over size, one for each of a few counts."""
    figure = canvas.new(9.4, 4.0)
    left, right = figure.subplots(1, 2)
    size, tokens = (np.array([p[k] for p in used]) for k in ("params", "tokens"))
    loss = np.array([p["metrics"][name] for p in used])
    said = _loss(found, size, tokens)
    left.scatter(loss, said, s=18, color=canvas.CURVE, label="fitted with all sizes", zorder=3)
    held_out = found["held_out"].get("runs", ())
    if held_out:
        at = [row["measured"] for row in held_out], [row["predicted"] for row in held_out]
        hollow = {"facecolors": "none", "edgecolors": canvas.COLOURS[1], "linewidth": 1.4}
        left.scatter(*at, s=46, **hollow, label="largest size, fitted without it", zorder=4)
    ends = [min(loss.min(), said.min()), max(loss.max(), said.max())]
    left.plot(ends, ends, color=canvas.FAINT, linewidth=1, linestyle=":")
    canvas.style(left, f"{family}: {name} by the law over measured")
    left.set_xlabel("measured", fontsize=8, color=canvas.FAINT)
    right.set_xscale("log")
    counts = np.unique(tokens)
    shown = counts if len(counts) <= 6 else np.geomspace(counts[0], counts[-1], 5)
    x = np.geomspace(size.min(), size.max(), 60)
    for count, colour in zip(shown, canvas.COLOURS, strict=False):
        right.plot(x, _loss(found, x, count), color=colour, linewidth=1.3)
        right.annotate(f"{count:.2g}", (x[-1], _loss(found, x[-1], count)), (3, -3), textcoords="offset points",
                       fontsize=7, color=colour)  # fmt: skip
    right.scatter(size, loss, s=10, color=canvas.FAINT, zorder=3)
    right.axhline(found["E"], color=canvas.FAINT, linewidth=1, linestyle=":", label="E")
    canvas.style(right, f"{name} by size, for numbers of tokens")
    right.set_xlabel("parameters", fontsize=8, color=canvas.FAINT)
    canvas.legend(figure)
    return canvas.save(figure, path)


def rates_plot(name, found, lost, family, path):
    """The metric over the learning rate, a curve for each size; stars are the best rates. lost: rates of other runs."""
    from matplotlib import colormaps

    figure = canvas.new(6.4, 4.2)
    axis = figure.add_subplot()
    axis.set_xscale("log", base=2)
    for curve, colour in zip(
        found["curves"], colormaps["viridis"](np.linspace(0.05, 0.85, len(found["curves"]))), strict=True
    ):
        axis.plot(curve["rates"], curve["values"], "o-", color=colour, linewidth=1.3, markersize=4, label=curve["name"])
        best = curve["bottom"] or curve["best"]
        axis.scatter([best], [min(curve["values"])], marker="*", s=110, color=colour, zorder=4)
    if lost:
        axis.scatter(lost, [0.97] * len(lost), transform=axis.get_xaxis_transform(), **_CROSS, label="not used")
    moved = "" if found["moved"] is None else f"; to the largest size the best moves by 2^{found['moved']:+.2f}"
    canvas.style(axis, f"{family}: {name} over learning rates{moved}")
    axis.set_xlabel("learning rate", fontsize=8, color=canvas.FAINT)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    canvas.legend(figure)
    return canvas.save(figure, path)


def _loss(found, params, tokens):
    return found["E"] + found["A"] * params ** -found["alpha"] + found["B"] * tokens ** -found["beta"]


def _colours():
    while True:
        yield from canvas.COLOURS


def _plain(axis):
    """Ticks of a logarithmic axis as numbers that people read."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: f"{value:.3g}")
