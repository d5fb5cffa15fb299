"""Plots of figures: the loss over a run; quality, classes and entropy over tokens; use of the codebook; several runs.

Drawn with Matplotlib, which is imported when something is drawn.
"""

import math
from typing import Any

import numpy as np
from etils import epath

from ddt_jax.evaluation import canvas
from ddt_jax.training.writers import read_metrics


def loss_curve(metrics_path, path) -> list:
    """Draws the metrics of a run over its steps, the loss first: nine of those that are not zero throughout.

    Args:
      metrics_path: a `metrics.jsonl`; a run that was shorter than `train.log_every` has written nothing to it.
      path: where the PNG goes.
    Returns:
      [the path], or [] where there is nothing to draw.
    """
    if not epath.Path(metrics_path).exists():
        return []
    series: dict[str, list] = {}
    for record in read_metrics(metrics_path):
        for name, value in record.items():
            if name != "step":
                series.setdefault(name, []).append((record["step"], value))
    moved = [name for name, points in series.items() if any(value != 0 for _, value in points)]
    order = sorted(moved, key=lambda name: name != "loss")[:9]
    if not order:
        return []
    columns = min(3, len(order))
    lines = math.ceil(len(order) / columns)
    figure = canvas.new(4.2 * columns, 2.7 * lines)
    for i, name in enumerate(order):
        axis = figure.add_subplot(lines, columns, i + 1)
        steps, values = np.array(series[name], float).T
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        axis.plot(steps, values, color=canvas.CURVE, linewidth=1.4, marker="o" if len(values) < 3 else None)
        if len(values) and values.min() > 0 and values.max() > 10 * values.min():
            axis.set_yscale("log")
        canvas.style(axis, name)
        axis.set_xlabel("step", fontsize=8, color=canvas.FAINT)
    return [canvas.save(figure, path)]


def tokens_plot(psnr_by_tokens: dict, path):
    """Draws PSNR over the number of tokens shown ({"2": 17.6, "4": 21.1, ...}) and returns the path."""
    counts = sorted(int(k) for k in psnr_by_tokens)
    values = [psnr_by_tokens[str(k)] for k in counts]
    figure = canvas.new(4.6, 3.2)
    axis = figure.add_subplot()
    axis.plot(counts, values, color=canvas.CURVE, marker="o", markersize=5, linewidth=1.6)
    for k, value in zip(counts, values, strict=True):
        axis.annotate(f"{value:.1f}", (k, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axis.margins(x=0.08, y=0.16)
    canvas.style(axis, "PSNR (dB) by tokens shown")
    _count_axis(axis, counts, "tokens")
    return canvas.save(figure, path)


def probe_plot(by_tokens: dict[str, dict], chance: float, path):
    """Draws the accuracies of `probes.probe_prefixes` with their intervals, and that of the commonest class."""
    counts = sorted(int(k) for k in by_tokens)
    figure = canvas.new(4.6, 3.2)
    axis = figure.add_subplot()
    names = {"linear": "linear probe", "knn": "k nearest neighbours"}
    for (kind, label), colour, shift in zip(names.items(), canvas.COLOURS, (0.985, 1.015), strict=False):
        found = [by_tokens[str(k)][kind] for k in counts]
        value = np.array([f["accuracy"] for f in found])
        low, high = np.array([f["interval"] for f in found]).T
        # Beside each other, or the bars of one would hide those of the other.
        x = np.array(counts) * shift
        bars = np.maximum(0, [value - low, high - value])
        axis.errorbar(x, value, bars, color=colour, marker="o", markersize=4, linewidth=1.6, capsize=3, label=label)
    axis.axhline(chance, color=canvas.FAINT, linewidth=1, linestyle=":", label="commonest class")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    canvas.style(axis, "Class from the first tokens")
    _count_axis(axis, counts, "tokens")
    canvas.legend(figure)
    return canvas.save(figure, path)


def entropy_plot(by_stride: dict[str, dict], codebook_size: int, path):
    """Draws `probes.order_entropies`: what a code costs at each place of an order, for several orders."""
    figure = canvas.new(5.6, 3.2)
    axis = figure.add_subplot()
    for (stride, found), colour in zip(by_stride.items(), canvas.COLOURS, strict=False):
        values = found["by_place"]
        label = f"{'own order' if stride == '1' else f'stride {stride}'}, mean {found['mean']:.2f}"
        places = np.arange(1, len(values) + 1)
        marker = "o" if len(values) <= 32 else None
        axis.plot(places, values, color=colour, linewidth=1.4, marker=marker, markersize=3.5, label=label)
    axis.axhline(math.log(codebook_size), color=canvas.FAINT, linewidth=1, linestyle=":", label="uniform codes")
    axis.xaxis.get_major_locator().set_params(integer=True)
    canvas.style(axis, "Nats per code when the one before it is known")
    axis.set_xlabel("place in the order", fontsize=8, color=canvas.FAINT)
    canvas.legend(figure)
    return canvas.save(figure, path)


def usage_plot(results: dict[str, Any], path):
    """Draws how many codes each position uses, and their perplexity, from the results of an evaluation."""
    used, perplexity = results["codebook_used_by_position"], results["codebook_perplexity_by_position"]
    figure = canvas.new(5.6, 3.2)
    axis = figure.add_subplot()
    positions = np.arange(len(used))
    width = 0.8 if len(used) <= 64 else 1.0  # many bars with gaps between them flicker
    axis.bar(positions, used, width, color=canvas.PALE, label="codes seen")
    axis.bar(positions, perplexity, width, color=canvas.CURVE, label="perplexity")
    # Of a few images no position can show more codes than there are images.
    most, of = min((results["codebook_size"], "codebook"), (results["n"], "images"))
    axis.axhline(most, color=canvas.FAINT, linewidth=1, linestyle=":", label=f"{of}: {most:,}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.margins(x=0.02)
    canvas.style(axis, "Codes in use by position")
    axis.grid(axis="x", visible=False)
    axis.set_axisbelow(True)
    axis.set_xlabel("position of the token", fontsize=8, color=canvas.FAINT)
    canvas.legend(figure)
    return canvas.save(figure, path)


def comparison_plot(runs: dict[str, dict[str, Any]], path):
    """Draws PSNR over the tokens shown for several runs; over their bits where codebooks differ in size."""
    sizes = {results["codebook_size"] for results in runs.values()}
    figure = canvas.new(6.0, 3.8)
    axis = figure.add_subplot()
    for i, (name, results) in enumerate(runs.items()):
        counts = sorted(int(k) for k in results["psnr_by_tokens"])
        bits = 1 if len(sizes) == 1 else math.log2(results["codebook_size"])
        values = [results["psnr_by_tokens"][str(k)] for k in counts]
        style = ("-", "--", ":")[i // len(canvas.COLOURS) % 3]
        colour = canvas.COLOURS[i % len(canvas.COLOURS)]
        axis.plot(np.array(counts) * bits, values, style, color=colour, marker="o", markersize=4, label=name)
    canvas.style(axis, "PSNR (dB)")
    shown = {int(k) for results in runs.values() for k in results["psnr_by_tokens"]}
    if len(sizes) == 1:
        _count_axis(axis, sorted(shown) if len(shown) <= 10 else None, "tokens")
    else:
        _count_axis(axis, None, "bits of the tokens shown")
    canvas.legend(figure, columns=min(3, len(runs)))
    return canvas.save(figure, path)


def _count_axis(axis, counts, label):
    """Doublings are equally far apart. counts: what is marked; None: powers of two."""
    axis.set_xscale("log", base=2)
    if counts is not None:
        axis.set_xticks(counts, [str(k) for k in counts])
    axis.minorticks_off()
    if counts is None:
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel(label, fontsize=8, color=canvas.FAINT)
