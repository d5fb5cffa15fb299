"""Where the runs of a sweep stand: a small record for each, beside its workdir.

A sweep's folder holds runs/NAME (an ordinary workdir), state/NAME.json (the record), logs/NAME.log and sweep.json. The
record is written before and after everything that a run does, so whatever is killed is found again as it was.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from etils import epath

from ddt_jax.errors import UserError
from ddt_jax.io import atomic
from ddt_jax.scaling.sweep import Run
from ddt_jax.training.progress import duration
from ddt_jax.training.writers import METRICS_FILE, read_metrics

DONE = ("finished", "diverged", "failed")
_SHOWN = 5  # runs that wait, in the table


@dataclass(frozen=True)
class Record:
    """Attributes:
    state: "waiting", "running", "stopped" (goes on), or one of DONE.
    why: a line about one that is not well.
    overrides: with which it began.
    seconds: that it has taken, in all tries that have ended.
    since: when the present try began, seconds of the clock.
    host, pid: of the process that is at it.
    """

    state: str = "waiting"
    why: str = ""
    overrides: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    since: float = 0.0
    host: str = ""
    pid: int = 0

    def started(self, run, pid: int) -> "Record":
        now = {"since": time.time(), "host": socket.gethostname(), "pid": pid}
        return replace(self, state="running", why="", overrides=run.overrides, **now)

    def ended(self, state: str, why: str = "") -> "Record":
        return replace(self, state=state, why=why, seconds=self.seconds + time.time() - self.since, pid=0)

    def alive(self, workdir: str) -> bool:
        """Whether the process that is at it lives, as far as this machine can tell. Of another machine it can't, and
        believes the record.
        """
        if not self.pid:
            return False
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        arguments = Path(f"/proc/{self.pid}/cmdline")
        # Numbers of processes come again; a zombie has no arguments.
        return not arguments.exists() or workdir.encode() in arguments.read_bytes()


def workdir(root, run: Run) -> str:
    return str(epath.Path(root) / "runs" / run.name)


def read(root, run, folder: str = "") -> Record:
    """The record of a run; one that says "running" though its process has died is "stopped".

    Args:
      run: a Run, or whatever else has a name and overrides.
      folder: its workdir, if that is not a sweep's.

    Raises:
      UserError: the run began with other settings than the sweep has now.
    """
    path = _path(root, run)
    if not path.exists():
        return Record()
    tree = json.loads(path.read_text())
    record = Record(**tree | {"overrides": tuple(map(tuple, tree["overrides"]))})
    if record.overrides != run.overrides:
        differing = sorted(name for name, _ in set(record.overrides) ^ set(run.overrides))
        raise UserError(
            f"sweep: {run.name} in {root} began with other settings ({', '.join(dict.fromkeys(differing))}); "
            "use another --to for what has changed"
        )
    if record.state == "running" and not record.alive(folder or workdir(root, run)):
        return replace(record, state="stopped", why="its process is gone")
    return record


def write(root, run, record: Record) -> Record:
    atomic.write_text(_path(root, run), json.dumps(asdict(record), indent=2) + "\n")
    return record


def _path(root, run):
    return epath.Path(root) / "state" / f"{run.name}.json"


def last_line(folder: str) -> dict[str, float]:
    """The newest line of the log in a workdir, {} before there is one."""
    path = epath.Path(folder) / METRICS_FILE
    records = [record for record in read_metrics(path) if "loss" in record] if path.exists() else []
    return records[-1] if records else {}


def seconds_left(root, runs: Sequence[Run], records: Sequence[Record], now: float) -> float | None:
    """Until all have ended, one after the other, at the FLOPs per second so far; None while nothing is known."""
    flops, seconds, left = 0.0, 0.0, 0.0
    for run, record in zip(runs, records, strict=True):
        share = _share(root, run, record)
        if record.state in ("finished", "diverged", "running"):
            flops += share * run.flops
            seconds += record.seconds + (now - record.since if record.state == "running" else 0)
        if record.state not in DONE:
            left += (1 - share) * run.flops
    return left * seconds / flops if flops else None if left else 0.0


def _share(root, run, record) -> float:
    if record.state in ("finished", "diverged"):
        return 1.0
    return last_line(workdir(root, run)).get("step", 0) / run.steps if record.state in ("running", "stopped") else 0.0


def table(root, runs: Sequence[Run], records: Sequence[Record], now: float) -> str:
    """What runs, what is left, what went wrong, and when all ends. Runs that are well and done are only counted."""
    counts = {
        state: sum(record.state == state for record in records) for state in (*DONE, "running", "stopped", "waiting")
    }
    waiting, lines = 0, []
    for run, record in zip(runs, records, strict=True):
        waiting += record.state == "waiting"
        if record.state == "finished" or (record.state == "waiting" and waiting > _SHOWN):
            continue
        lines.append(_line(root, run, record, now))
    if waiting > _SHOWN:
        lines.append(f"  ... {waiting - _SHOWN} more wait")
    done = sum(run.flops for run, record in zip(runs, records, strict=True) if record.state in DONE)
    total, left = sum(run.flops for run in runs), seconds_left(root, runs, records, now)
    ends = (
        "unknown" if left is None else f"in {duration(left)}, {time.strftime('%a %H:%M', time.localtime(now + left))}"
    )
    listed = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    unfinished = any(record.state not in DONE for record in records)
    head = f"{len(runs)} runs: {listed}; {done:.3g} of {total:.3g} FLOPs"
    return "\n".join([head + (f"; ends {ends}" if unfinished else ""), *lines])


def _line(root, run, record, now) -> str:
    parts = [f"  {record.state:<9} {run.name}"]
    if record.state in ("running", "stopped"):
        line = last_line(workdir(root, run))
        parts.append(f"step {line.get('step', 0):,}/{run.steps:,}")
        parts += [f"loss {line['loss']:.4g}"] if line else []
    if record.state != "waiting":
        parts.append(duration(record.seconds + (now - record.since if record.state == "running" else 0)))
    return "  ".join([*parts, *([record.why] if record.why else [])])
