"""Runs as points of a scaling study: what they cost, what came of them, and which a fit may use.

A run that failed, diverged or is not finished stays in the list with the reason; a fit says that it left it out, and
plots show it.
"""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from etils import epath

from ddt_jax.errors import UserError

SWEEP_FILE = "sweep.json"  # of a sweep's folder: its runs as points
FINISHED = "finished"
STATES = (FINISHED, "failed", "diverged", "running", "stopped", "waiting")
_NUMBERS = ("params", "tokens", "flops")
_MORE = ("lr", "width")  # numbers that a run may have
_TEXTS = ("family", "run", "status", "why")
COLUMNS = (*_NUMBERS, *_MORE, *_TEXTS, "metrics")  # of a file of runs; a column of another name is a metric
_RULE = re.compile(r"^\s*([\w/.]+)\s*(<=|>=)\s*([-+\w.]+)\s*$")


@dataclass(frozen=True)
class Point:
    """A run.

    Attributes:
      family: what is fitted together and compared with other families: an arm.
      params: its parameters.
      tokens: what it learned from: tokens, or images.
      flops: operations of its training; 6 * params * tokens where nothing better is known.
      metrics: name → value after training.
      status: of STATES; only finished ones are fitted.
      why: what happened to one that is not finished, a line.
      lr, width: its learning rate, and how wide its model is; None where nobody says.
    """

    family: str
    run: str
    params: float
    tokens: float
    flops: float
    metrics: dict[str, float]
    status: str = FINISHED
    why: str = ""
    lr: float | None = None
    width: float | None = None


@dataclass(frozen=True)
class Rule:
    """A bound on a metric beyond which a run is no part of a fit: the outlier rules of Transfusion (arXiv 2408.11039)
    §4.2, fn 16 are of this kind.
    """

    metric: str
    side: str
    bound: float

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.side == "<=" else value >= self.bound

    def __str__(self):
        return f"{self.metric}{self.side}{self.bound:g}"


@dataclass(frozen=True)
class Chosen:
    """Points that a fit of one metric uses, and the others with the reason."""

    used: list[Point]
    left_out: list[tuple[Point, str]] = field(default_factory=list)


def rule(text: str) -> Rule:
    """From "fid<=100". Raises UserError."""
    found = _RULE.match(text)
    try:
        return Rule(found[1], found[2], float(found[3]))
    except (TypeError, ValueError):
        raise UserError(f"fit: --keep {text} is no rule; write METRIC<=NUMBER or METRIC>=NUMBER") from None


def choose(points: Sequence[Point], metric: str, rules: Sequence[Rule] = ()) -> Chosen:
    """Splits points into those that a fit of a metric uses, and the others with a line that says why not."""
    found = Chosen([])
    for point in points:
        value = point.metrics.get(metric)
        broken = next((r for r in rules if r.metric == metric and value is not None and not r.holds(value)), None)
        if point.status != FINISHED:
            reason = f"{point.status}: {point.why}" if point.why else point.status
        elif value is None:
            reason = f"has no {metric}"
        elif not (math.isfinite(value) and value > 0):
            reason = f"{metric} is {value:g}, which has no logarithm"
        elif broken:
            reason = f"{metric} is {value:g}, outside of the rule {broken}"
        else:
            found.used.append(point)
            continue
        found.left_out.append((point, reason))
    return found


def read(path: str) -> list[Point]:
    """Points of a CSV file (a header, a run on each line) or a JSON file (a list of objects, or one under "points").

    Columns: family, run, params, tokens, flops, status, why, lr, width; all others are metrics. A run needs no more
    than params and tokens: flops are then 6 * params * tokens. Lines of a CSV file that begin with # are remarks.

    Raises:
      UserError: the file is missing, is of neither kind, or a row is not a run; the row is named.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"fit: {path} does not exist; name a .csv or .json file of runs, a sweep or a workdir")
    text = file.read_text()
    if file.suffix == ".json":
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise UserError(f"fit: {path} is no JSON ({error})") from error
        rows = tree.get("points") if isinstance(tree, dict) else tree
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f'fit: {path} holds no list of runs; it must be one, or have one under "points"')
    elif file.suffix == ".csv":
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        rows = list(csv.DictReader(lines, skipinitialspace=True))
    else:
        raise UserError(f"fit: {path} is neither .csv nor .json")
    return [_point(row, f"{path}, run {i + 1}", file.stem) for i, row in enumerate(rows)]


def _point(row: dict[str, Any], where: str, family: str) -> Point:
    if None in row:
        raise UserError(f"fit: {where} has more values than the header has names")
    row = {name: value for name, value in row.items() if value not in (None, "")}
    metrics = row.get("metrics", {}) | {k: v for k, v in row.items() if k not in COLUMNS}
    values = {name: _number(row[name], where, name) for name in (*_NUMBERS, *_MORE) if name in row}
    for name in ("params", "tokens"):
        if not values.get(name, 0) > 0:
            raise UserError(f"fit: {where}: {name} must be a number above 0, got {row.get(name, 'nothing')}")
    values.setdefault("flops", 6 * values["params"] * values["tokens"])
    status = row.get("status", FINISHED)
    if status not in STATES:
        raise UserError(f"fit: {where}: status {status} is not one of {', '.join(STATES)}")
    return Point(
        family=str(row.get("family", family)),
        run=str(row.get("run", where.rpartition(", ")[2])),
        metrics={name: _number(value, where, name) for name, value in metrics.items()},
        status=status,
        why=str(row.get("why", "")),
        **values,
    )


def _number(value, where, name) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"fit: {where}: {name} is {value!r}, which is no number") from None


def to_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """What `read` reads; numbers that JSON does not have are text."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(v) for name, v in value.items()}
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return [plain(asdict(point)) for point in points]


def to_csv(points: Sequence[Point]) -> str:
    """What `read` reads."""
    metrics = sorted({name for point in points for name in point.metrics})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["family", "run", *_NUMBERS, *_MORE, "status", "why", *metrics])
    for p in points:
        values = [p.metrics.get(name, "") for name in metrics]
        more = ["" if x is None else x for x in (p.lr, p.width)]
        writer.writerow([p.family, p.run, p.params, p.tokens, p.flops, *more, p.status, p.why, *values])
    return buffer.getvalue()
