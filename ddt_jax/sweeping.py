"""`ddt-jax sweep`: trains and evaluates the runs of a grid, one after the other or one in each job of a cluster, and
collects what came of them. `scaling.sweep` has the grid, `scaling.sweep_state` the records, docs/scaling.md the rest.
"""

import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ddt_jax import ledger, settings
from ddt_jax.errors import UserError
from ddt_jax.io import atomic
from ddt_jax.scaling import points, running, sweep, sweep_jobs, sweep_state
from ddt_jax.scaling.sweep import Cost, Run, Sweep

Launch = Callable[[list[str], Path, Callable[[int], None]], int]


@dataclass(frozen=True)
class Planned:
    """A sweep that can run: its file, its folder, its runs with steps and costs."""

    sweep: Sweep
    root: str
    runs: list[Run]

    def records(self) -> list[sweep_state.Record]:
        return [sweep_state.read(self.root, run) for run in self.runs]

    def states(self) -> list[str]:
        return [record.state for record in self.records()]

    def table(self) -> str:
        """How things stand."""
        return sweep_state.table(self.root, self.runs, self.records(), time.time())

    def listing(self) -> str:
        """Markdown: the runs with what they will cost."""
        lines = ["| run | parameters | steps | tokens or images | FLOPs |", "|---|---:|---:|---:|---:|"]
        for r in self.runs:
            lines.append(
                f"| {r.name} | {r.cost.params:,.0f} | {r.steps:,} | {r.steps * r.cost.tokens:,.0f} | {r.flops:.3g} |"
            )
        total = sum(run.flops for run in self.runs)
        return "\n".join([*lines, "", f"{len(self.runs)} runs, {total:.3g} of {self.sweep.budget:.3g} FLOPs"])

    def as_json(self) -> dict[str, Any]:
        rows = [{"run": r.name, "params": r.cost.params, "steps": r.steps, "flops": r.flops} for r in self.runs]
        return {"sweep": self.sweep.name, "budget": self.sweep.budget, "runs": rows}


def plan(path: str, root: str, overrides: Sequence[tuple[str, str]] = (), only: str = "") -> Planned:
    """The runs of a sweep, or the one called `only`.

    Raises:
      UserError: as `sweep.load`, `grid`, `planned` and `check_budget`; there is no such run; a run in `root` began with
        other settings.
    """
    # This process counts and waits; the devices are for the runs, and most kinds serve one process only.
    jax.config.update("jax_platforms", "cpu")
    found = sweep.load(path)
    runs = sweep.grid(found, path, overrides)
    if only and only not in (names := [run.name for run in runs]):
        raise UserError(f"sweep: --only {only}: there is no such run; there are {', '.join(names)}")
    runs = [sweep.planned(run, found.amount, cost) for run in runs if only in ("", run.name)]
    sweep.check_budget(found, runs)
    planned = Planned(found, root or f"runs/sweeps/{found.name}", runs)
    planned.records()
    return planned


def cost(s: settings.Experiment) -> Cost:
    """What a config costs, by its traced step. Raises UserError as `ledger.sized`."""
    s = ledger.sized(s)
    rows = s.train.batch_size
    tokens = rows * s.sequences.context if isinstance(s.model, settings.Multimodal) else rows
    return Cost(ledger.parameters(s), ledger.step_flops(s), float(rows), float(tokens))


def run(
    planned: Planned, *, retry: bool = False, alone: bool = False, launch: Launch | None = None, stream=None
) -> bool:
    """Runs what is not done, one after the other, and shows the table.

    Args:
      retry: also runs that have failed or diverged.
      alone: whoever else was at these runs is gone, as a scheduler knows that starts a job anew on another machine.
      launch: runs the program with arguments, writes what it prints to a file, tells the number of its process and
        returns its exit code; None: a process of its own.
      stream: where the table goes; None: stderr.

    Returns:
      Whether all have ended; else it was asked to stop, and goes on with the same command.
    """
    screen = running.Screen(stream or sys.stderr, planned)
    with running.Children() as children, screen.living():
        for one in planned.runs:
            record = sweep_state.read(planned.root, one)
            if record.state == "running" and record.host != socket.gethostname():
                if not alone:
                    screen.say(f"{one.name} is run on {record.host}; left to it")
                    continue
                record = replace(record, state="stopped")
            if record.state == "running":
                screen.say(f"{one.name} is still run by process {record.pid} on {record.host}; waiting for it")
                while record.state == "running" and not children.asked.wait(running.LOOK_SECONDS):
                    record = sweep_state.read(planned.root, one)
            again = retry and record.state in ("failed", "diverged")
            if record.state in sweep_state.DONE and not again:
                continue
            if children.asked.is_set():
                return False
            _one(planned, one, record, launch or children.launch)
            if not alone:
                collect(planned, anew=False)
            if sweep_state.read(planned.root, one).state == "stopped":
                return False
    return True


def _one(planned: Planned, one: Run, record: sweep_state.Record, launch: Launch) -> None:
    """Trains and evaluates a run, and writes down what became of it."""
    root, folder = planned.root, sweep_state.workdir(planned.root, one)
    log = epath.Path(root) / "logs" / f"{one.name}.log"
    record = record.started(one, 0)
    for verb in ("train", "evaluate") if planned.sweep.evaluate else ("train",):

        def began(pid, record=record):
            sweep_state.write(root, one, replace(record, pid=pid))

        if verb == "evaluate" and _evaluated(folder, one.steps):
            continue
        with _local(log) as file:
            state, why = running.became(launch(one.arguments(verb, folder), file, began), file, verb)
        if state != "finished":
            sweep_state.write(root, one, record.ended(state, why))
            return
    try:
        found = ledger.point(one.arm, folder)
    except UserError as error:  # whatever cannot be read of one run, the others go on
        sweep_state.write(root, one, record.ended("failed", str(error)))
        return
    state = found.status if found.status in sweep_state.DONE else "failed"
    sweep_state.write(root, one, record.ended(state, found.why))


def _evaluated(folder, step) -> bool:
    path = epath.Path(folder) / "results.json"
    return path.exists() and json.loads(path.read_text()).get("step") == step


def collect(planned: Planned, *, anew: bool = True) -> dict[str, Any]:
    """Writes sweep.json, which `ddt-jax fit` reads: all runs as points, whatever became of them. Returns its tree.

    Args:
      anew: reads all workdirs, some of which may have been evaluated again; else those that it has not read before.
    """
    path = epath.Path(planned.root) / points.SWEEP_FILE
    before = points.read(str(path)) if path.exists() and not anew else []
    known, rows = {p.run: p for p in before if p.status == points.FINISHED}, []
    for one, record in zip(planned.runs, planned.records(), strict=True):
        if record.state == "finished":
            point = known.get(one.name) or ledger.point(one.arm, sweep_state.workdir(planned.root, one))
            rows.append(replace(point, run=one.name))
        else:
            seen = {"params": one.cost.params, "tokens": one.steps * one.cost.tokens, "flops": one.flops}
            if lr := dict(one.overrides).get("optimizer.lr"):
                seen["lr"] = float(lr)
            rows.append(points.Point(one.arm, one.name, **seen, metrics={}, status=record.state, why=record.why))
    tree = {"sweep": planned.sweep.name, "points": points.to_json(rows)}
    atomic.write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")
    return tree


def write_jobs(kind: str, planned: Planned, command: Sequence[str]) -> str:
    """Writes the jobs of all runs that are not done, and returns the path.

    Args:
      kind: "slurm" or "jobset".
      command: `ddt-jax sweep` with what every job is given.

    Raises:
      UserError: there is nothing left to run.
    """
    left = [run for run, r in zip(planned.runs, planned.records(), strict=True) if r.state not in sweep_state.DONE]
    if not left:
        raise UserError(f"sweep: all {len(planned.runs)} runs in {planned.root} have ended; there is no job to write")
    root = epath.Path(planned.root)
    path = root / ("slurm.sh" if kind == "slurm" else "jobset.yaml")
    if kind == "slurm":
        (root / "logs").mkdir(parents=True, exist_ok=True)  # SLURM makes none
        text = sweep_jobs.slurm(planned.sweep.name, left, command, str(root / "logs"), str(path))
    else:
        text = sweep_jobs.jobset(planned.sweep.name, left, command, str(path))
    return str(atomic.write_text(path, text))


@contextmanager
def _local(path):
    """A local file to write a log to; for an object store it is copied there in the end."""
    if atomic.is_local(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        file.write_bytes(path.read_bytes() if path.exists() else b"")
        yield file
        atomic.write_bytes(path, file.read_bytes())
