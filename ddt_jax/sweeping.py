"""`ddt-jax sweep`: trains and evaluates the runs of a grid, one after the other or one in each job of a cluster, and
collects what came of them. `scaling.sweep` has the grid, `scaling.sweep_state` the records, docs/scaling.md the rest.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
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
from ddt_jax.scaling import points, sweep, sweep_jobs, sweep_state
from ddt_jax.scaling.sweep import Cost, Run, Sweep
from ddt_jax.training.loop import EXIT_STOPPED

_LOOK_SECONDS = 2.0  # between two looks at a run that is going on
_SAY_SECONDS = 60.0  # between two tables in a log file where nothing has changed
_NOT_FINITE = "were not finite"  # what `train` says of a run that it gives up
_ASKED = (
    EXIT_STOPPED,
    -signal.SIGTERM,
    -signal.SIGINT,
)  # ends of a run that was asked to, before it could save or after

Launch = Callable[[list[str], Path, Callable[[int], None]], int]


@dataclass(frozen=True)
class Planned:
    """A sweep that can run: its file, its folder, its runs with steps and costs."""

    sweep: Sweep
    root: str
    runs: list[Run]

    def records(self) -> list[sweep_state.Record]:
        return [sweep_state.read(self.root, run) for run in self.runs]

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
    screen = _Screen(stream or sys.stderr, planned)
    with _Stopping() as stopping, screen.living():
        for one in planned.runs:
            record = sweep_state.read(planned.root, one)
            if record.state == "running" and record.host != socket.gethostname():
                if not alone:
                    screen.say(f"{one.name} is run on {record.host}; left to it")
                    continue
                record = replace(record, state="stopped")
            if record.state == "running":
                screen.say(f"{one.name} is still run by process {record.pid} on {record.host}; waiting for it")
                while record.state == "running" and not stopping.asked.wait(_LOOK_SECONDS):
                    record = sweep_state.read(planned.root, one)
            again = retry and record.state in ("failed", "diverged")
            if record.state in sweep_state.DONE and not again:
                continue
            if stopping.asked.is_set():
                return False
            _one(planned, one, record, launch or stopping.launch)
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
            code = launch(one.arguments(verb, folder), file, began)
            said = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
        why = said[-1].removeprefix("ddt-jax: ") if said else ""
        if code in _ASKED:
            sweep_state.write(root, one, record.ended("stopped", "asked to stop"))
            return
        if code:
            state = "diverged" if _NOT_FINITE in why else "failed"
            killed = f"{verb} was killed by signal {-code}" if code < 0 else ""
            sweep_state.write(root, one, record.ended(state, killed or why or f"{verb} ended with code {code}"))
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


class _Stopping:
    """SIGINT and SIGTERM reach the run that is going on, once, as SIGTERM: it saves."""

    def __init__(self):
        self.asked = threading.Event()
        self._child: subprocess.Popen | None = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        else:
            self._before = {}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self._child and not self.asked.is_set():
            self._child.terminate()
        self.asked.set()

    def launch(self, arguments: list[str], log: Path, began: Callable[[int], None]) -> int:
        command = [sys.executable, "-m", "ddt_jax.cli", *arguments]
        # A package that is not installed is found where this one was; Ctrl-C reaches the run through us alone.
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))))
        with open(log, "ab") as file:
            how = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
            self._child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **how)
        began(self._child.pid)
        try:
            return self._child.wait()
        finally:
            self._child = None


class _Screen:
    """The live table: on a terminal always in the same place; in a log file anew when a run begins or ends, and now and
    then.
    """

    def __init__(self, stream, planned: Planned):
        self._stream, self._planned = stream, planned
        self._live = bool(getattr(stream, "isatty", lambda: False)())
        self._lines, self._states, self._at = 0, None, 0.0
        self._over = threading.Event()

    @contextmanager
    def living(self):
        thread = threading.Thread(target=self._run, name="sweep-table", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            self._show(last=True)

    def say(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._lines = 0

    def _run(self):
        self._show()
        while not self._over.wait(_LOOK_SECONDS):
            self._show()

    def _show(self, last=False):
        now = time.time()
        states = [record.state for record in self._planned.records()]
        if not (self._live or last or states != self._states or now - self._at > _SAY_SECONDS):
            return
        self._states, self._at = states, now
        text = self._planned.table()
        up = f"\x1b[{self._lines}F\x1b[J" if self._live and self._lines else ""
        self._stream.write(f"{up}{text}\n")
        self._stream.flush()
        self._lines = text.count("\n") + 1
