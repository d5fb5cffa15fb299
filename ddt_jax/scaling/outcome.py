"""What became of a run, read from its workdir: how far it came, what its figures are, whether it can be believed."""

import json
import math
from dataclasses import dataclass
from typing import Any

from etils import epath

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.scaling import points
from ddt_jax.training import checkpoint
from ddt_jax.training.writers import METRICS_FILE, read_metrics

_LAST = 0.05  # share of a run whose training figures are averaged: single ones are noisy


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    step: of the newest checkpoint.
    status: "finished", "diverged" or "stopped"; `why` says more.
    metrics: held-out figures of results.json, and under their own names those of the log: training figures averaged
      over the last steps, figures of evaluations while it trained as they were last.
    """

    step: int
    status: str
    why: str
    metrics: dict[str, float]


def read(workdir: str, s: settings.Experiment) -> Outcome:
    """Args:
      s: its settings.

    Raises:
      UserError: results.json is of another step, or is no JSON.
    """
    step = max(checkpoint.saved_steps(workdir), default=0)
    log = epath.Path(workdir) / METRICS_FILE
    records = [r for r in read_metrics(log) if r["step"] <= step] if log.exists() else []
    metrics = last_figures(records)
    losses = [record["loss"] for record in records if "loss" in record]
    if step < s.train.steps:
        return Outcome(step, "stopped", f"at step {step:,} of {s.train.steps:,}", metrics)
    metrics |= results(workdir, step)
    if losses and not math.isfinite(metrics["loss"]):
        return Outcome(step, "diverged", f"the loss ends at {metrics['loss']}", metrics)
    if losses and metrics["loss"] > losses[0]:
        return Outcome(
            step, "diverged", f"the loss ends at {metrics['loss']:.4g} and began at {losses[0]:.4g}", metrics
        )
    return Outcome(step, points.FINISHED, "", metrics)


def last_figures(records: list[dict[str, Any]]) -> dict[str, float]:
    """Name → value at the end of a log."""
    if not records:
        return {}
    since = records[-1]["step"] * (1 - _LAST)
    names = {name for record in records for name in record} - {"step"}
    found = {}
    for name in sorted(names):
        steps = [(record["step"], record[name]) for record in records if name in record]
        recent = [value for step, value in steps if step > since and not name.startswith("eval/")] or [steps[-1][1]]
        found[name] = sum(recent) / len(recent)
    return found


def results(workdir, step: int) -> dict[str, float]:
    """The figures of WORKDIR/results.json, {} where it was not evaluated. Raises UserError as `read`."""
    path = epath.Path(workdir) / "results.json"
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"fit: {path} is no JSON ({error}); evaluate that run again") from error
    if tree.get("step") != step:
        raise UserError(f"fit: {path} is of step {tree.get('step')}, the run is at {step}; evaluate it again")
    figures = {k: float(v) for k, v in tree.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: v for k, v in figures.items() if k not in ("step", *points.COLUMNS)}
