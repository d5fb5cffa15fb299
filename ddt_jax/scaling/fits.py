"""A scaling study: all that is fitted to the runs of some families, as one JSON tree.

docs/scaling.md says what each part means. The parts themselves are `law`, `isoflop`, `parity` and `rates`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ddt_jax.errors import UserError
from ddt_jax.scaling import isoflop, law, parity, points, rates
from ddt_jax.scaling.points import Point, Rule


def study(
    runs: Sequence[Point], metrics: Sequence[str], *, rules: Sequence[Rule] = (), draws: int = law.DRAWS, seed: int = 0
) -> dict[str, Any]:
    """Fits everything that the runs allow, and says why of the rest.

    Args:
      metrics: names of what was measured. The law and the parabolas are of those that fall with the cost; of rates
        the one with the least is best.
      rules: see `points.Rule`.
      draws: of every bootstrap.

    Raises:
      UserError: no run has one of the metrics, or there are no runs.
    """
    if not runs:
        raise UserError("fit: there are no runs; name a file of runs, a sweep or workdirs")
    known = sorted({name for point in runs for name in point.metrics})
    for name in (*metrics, *(rule.metric for rule in rules)):
        if name not in known:
            raise UserError(f"fit: no run has {name}; there are {', '.join(known) or 'no metrics at all'}")
    how = {"draws": draws, "seed": seed}
    return {
        "points": points.to_json(runs),
        "rules": [str(rule) for rule in rules],
        "draws": draws,
        "metrics": {name: _metric(runs, name, rules, how) for name in metrics},
    }


def _metric(runs, name, rules, how) -> dict[str, Any]:
    families = list(dict.fromkeys(point.family for point in runs))
    chosen = {f: points.choose([p for p in runs if p.family == f], name, rules) for f in families}
    best = {f: _best(of.used, name, how) for f, of in chosen.items()}
    lines = {f: _line(of, name, how) for f, of in best.items()}
    found = {f: _family(of, best[f], name, lines[f], how) for f, of in chosen.items()}
    ratios = []
    for family, of in lines.items():
        others = [f for f in families if f != family and best[f]]
        ratios += [asdict(parity.parity(family, of, best[f], name)) for f in others if of]
    return {"families": found, "parity": ratios}


def _best(used, name, how) -> list[Point]:
    """Of each size and amount of data the runs with the best rate: a worse one only ever adds to a loss, so that a fit
    through all rates is one of the grid. Best is least, or greatest where the metric rises with the cost either way.
    """
    least = rates.best(used, name)
    if len(least) < len(used) and _rises(_line(least, name, how)):
        greatest = rates.best(used, name, max)
        if _rises(_line(greatest, name, how)):
            return greatest
    return least


def _rises(line) -> bool:
    return line is not None and line.slope > 0


def _line(used, name, how):
    return parity.line([p.flops for p in used], [p.metrics[name] for p in used], **how)


def _family(chosen, used, name, line, how) -> dict[str, Any]:
    """used: of the chosen those with the best rate; rates themselves are compared over all of them."""
    kept = {point.run for point in used}
    worse = [point.run for point in chosen.used if point.run not in kept]
    left_out = [{"run": point.run, "why": why} for point, why in chosen.left_out]
    costs = len(isoflop.budgets([point.flops for point in used]))
    found: dict[str, Any] = {
        "used": [point.run for point in used],
        "left_out": [*left_out, *({"run": run, "why": "another rate is better"} for run in worse)],
        "other_rates": worse,
        "line": {"why": f"{costs} costs, a line takes {parity.MIN_RUNS}"},
        "rates": _rates(chosen.used, name),
    }
    if line:
        found["line"] = {k: v for k, v in asdict(line).items() if k != "draws"}
    if _rises(line):
        rises = {"why": f"{name} rises with the cost, so it is no loss"}
        return found | {"law": rises, "isoflop": rises}
    params, tokens, flops = (np.array([getattr(p, k) for p in used]) for k in ("params", "tokens", "flops"))
    losses = np.array([point.metrics[name] for point in used])
    found["law"] = _law(params, tokens, flops, losses, [point.run for point in used], how)
    found["isoflop"] = _isoflop(params, tokens, flops, losses, how)
    return found


def _rates(used, name) -> dict[str, Any]:
    found = rates.curves(used, name)
    if not found:
        return {"why": f"no size was trained with {rates.MIN_RATES} of them"}
    one_amount = len(isoflop.budgets([curve.tokens for curve in found], isoflop.SAME_TOKENS)) == 1
    between = [c.name if one_amount else f"{c.name}, {c.tokens:.3g} tokens" for c in rates.ends(found) or ()]
    curves = [asdict(curve) | {"name": curve.name} for curve in found]
    return {"curves": curves, "moved": rates.moved(found), "between": between}


def _law(params, tokens, flops, losses, runs, how) -> dict[str, Any]:
    try:
        fit = law.fit(params, tokens, losses, flops=flops, **how)
    except UserError as error:
        return {"why": str(error).removeprefix("fit: ")}
    for exponent, amount in (("alpha", "parameters"), ("beta", "tokens")):
        if (value := getattr(fit.law, exponent)) <= 0:
            return {"why": f"of these runs the loss does not fall with more {amount} ({exponent} = {value:.3g})"}
    per_token = float(np.exp(np.median(np.log(flops / params / tokens))))
    best_params, best_tokens = fit.law.optimum(flops.max(), per_token)
    intervals = {name: list(fit.interval(name)) for name in (*law.NAMES, "exponent")}
    return {
        **asdict(fit.law),
        "exponent": fit.law.exponent,
        "intervals": intervals,
        "huber": fit.huber,
        "residual": float(np.sqrt(np.mean(fit.residuals**2))),
        "flops_per_parameter_and_token": per_token,
        "optimum": {"flops": float(flops.max()), "params": float(best_params), "tokens": float(best_tokens)},
        "held_out": _held_out(params, tokens, flops, losses, runs),
    }


def _held_out(params, tokens, flops, losses, runs) -> dict[str, Any]:
    """How well the law of all smaller runs says what those of the largest size lose."""
    rest = params < params.max()
    try:
        fit = law.fit(params[rest], tokens[rest], losses[rest], flops=flops[rest], draws=1)
    except UserError as error:
        return {"why": f"without the largest size {str(error).removeprefix('fit: ')}"}
    predicted = fit.law.loss(params[~rest], tokens[~rest])
    errors = predicted / losses[~rest] - 1
    rows = zip(np.array(runs)[~rest].tolist(), predicted.tolist(), losses[~rest].tolist(), errors.tolist(), strict=True)
    return {
        "params": float(params.max()),
        "runs": [dict(zip(("run", "predicted", "measured", "error"), row, strict=True)) for row in rows],
        "mean_error": float(np.abs(errors).mean()),
        "max_error": float(np.abs(errors).max()),
    }


def _isoflop(params, tokens, flops, losses, how) -> dict[str, Any]:
    found = isoflop.fit(params, tokens, flops, losses, **how)
    if not any(valley.curve for valley in found.valleys):
        return {"why": f"no budget has runs of {isoflop.MIN_SIZES} sizes"}
    return asdict(found)


def markdown(tree: dict[str, Any]) -> str:
    """What `study` found, for people."""
    parts = []
    for name, metric in tree["metrics"].items():
        parts += [f"## {name}", ""]
        for family, found in metric["families"].items():
            parts += [f"### {family}", "", *_family_text(found), ""]
        if metric["parity"]:
            parts += ["### Parity", "", *_parity_text(metric["parity"]), ""]
    rules = ", ".join(tree["rules"]) or "none"
    unfinished = sum(point["status"] != points.FINISHED for point in tree["points"])
    head = f"{len(tree['points'])} runs, {unfinished} of them not finished. Outlier rules: {rules}. "
    head += f"Intervals are of 95 %, from {tree['draws']:,} resamplings."
    return "\n".join(["# Scaling", "", head, "", *parts])


def _family_text(found) -> list[str]:
    lines = [f"Runs used: {len(found['used'])}."]
    lines += [f"- left out: {row['run']}: {row['why']}" for row in found["left_out"]]
    lines += ["", *_law_text(found["law"]), "", *_isoflop_text(found["isoflop"]), "", _line_text(found["line"])]
    return [*lines, "", *_rates_text(found["rates"])]


def _law_text(found) -> list[str]:
    if "why" in found:
        return [f"No law L(N, D): {found['why']}."]
    lines = ["L(N, D) = E + A / N^alpha + B / D^beta", "", "| | value | interval |", "|---|---:|---|"]
    for name, (low, high) in found["intervals"].items():
        label = "a in N_opt ~ C^a" if name == "exponent" else name
        lines.append(f"| {label} | {found[name]:.4g} | {low:.4g} to {high:.4g} |")
    best, held_out = found["optimum"], found["held_out"]
    lines += ["", f"It misses a run by {found['residual']:.2%} (root of the mean square)."]
    lines[-1] += f" At {best['flops']:.3g} FLOPs least is lost by {best['params']:.3g} parameters"
    lines[-1] += f" on {best['tokens']:.3g} tokens."
    if "why" in held_out:
        return [*lines, f"No held-out size: {held_out['why']}."]
    worst = f"{held_out['mean_error']:.2%} off on average and {held_out['max_error']:.2%} at most"
    return [*lines, f"Fitted without the largest size ({held_out['params']:.3g} parameters), it is {worst} there."]


def _isoflop_text(found) -> list[str]:
    if "why" in found:
        return [f"No iso-FLOP parabolas: {found['why']}."]
    lines = ["| FLOPs | runs | best size | interval | tokens | loss |", "|---:|---:|---:|---|---:|---:|"]
    for v in found["valleys"]:
        row = f"| {v['flops']:.3g} | {len(v['runs'])} "
        if v["params"] is None:
            lines.append(f"{row}| {v['why']} | | | |")
        else:
            low, high = v["params_interval"]
            lines.append(f"{row}| {v['params']:.3g} | {low:.3g} to {high:.3g} | {v['tokens']:.3g} | {v['loss']:.4g} |")
    if found["exponent"] is not None:
        low, high = found["exponent_interval"]
        law = f"N_opt = {found['coefficient']:.3g} C^{found['exponent']:.3f}"
        lines += ["", f"{law} (exponent {low:.3f} to {high:.3f})."]
    return lines


def _line_text(found) -> str:
    if "why" in found:
        return f"No line over FLOPs: {found['why']}."
    low, high = found["slope_interval"]
    # By its value among the runs: that of 1 FLOP may be no number that a float holds.
    value = math.exp(found["constant"] + found["slope"] * math.log(found["centre"]))
    law = f"metric = {value:.4g} (C / {found['centre']:.3g})^{found['slope']:.4f}"
    return f"{law} (exponent {low:.4f} to {high:.4f})."


def _rates_text(found) -> list[str]:
    if "why" in found:
        return [f"No best learning rate: {found['why']}."]
    lines = ["| size | tokens | rates | best | bottom of a parabola | value |", "|---|---:|---:|---:|---|---:|"]
    for c in found["curves"]:
        bottom = "none: the best is at an end" if c["bottom"] is None else f"{c['bottom']:.3g}"
        row = f"| {c['name']} | {c['tokens']:.3g} | {len(c['rates'])} | {c['best']:.3g} | {bottom} "
        lines.append(f"{row}| {min(c['values']):.4g} |")
    if found["moved"] is not None:
        sizes = f"From the smallest to the largest size ({' to '.join(found['between'])})"
        lines += ["", f"{sizes} the best rate moves by 2^{found['moved']:+.2f}."]
    return lines


def _parity_text(ratios) -> list[str]:
    lines = ["| family | reaches | of | for its FLOPs times | interval | |", "|---|---:|---|---:|---|---|"]
    for r in ratios:
        bounds = "open: the slope may be 0" if r["interval"] is None else "{:.3g} to {:.3g}".format(*r["interval"])
        note = "extrapolated" if r["extrapolated"] else ""
        lines.append(f"| {r['family']} | {r['value']:.4g} | {r['run']} | {r['ratio']:.3g} | {bounds} | {note} |")
    return lines
