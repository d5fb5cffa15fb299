"""Runs the steps of a comparison, several at a time, and goes on where it was stopped or killed.

In the comparison's folder: ARM/ (tokenizer, codes, a workdir for each run), state/NAME.json (a record for each step),
logs/NAME.log. A step is done when what it makes is there, whoever made it. What fails or diverges is kept, shown, and
not tried again unless it is asked for; what needs it is not run, all else goes on. A rate that diverges has lost: the
choice is among the others.
"""

import fcntl
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from compare_known import Known
from compare_plan import Arm, Chosen, Step, grid, next_rate, steps

from ddt_jax import ledger
from ddt_jax.errors import UserError
from ddt_jax.evaluation import comparison
from ddt_jax.evaluation.comparison import Row
from ddt_jax.scaling import running, sweep_state
from ddt_jax.scaling.trial import Trial
from ddt_jax.training.progress import duration

LOST = ("failed", "diverged")
STATES = ("finished", *LOST, "blocked", "running", "stopped", "waiting")
_TICK_SECONDS = 0.3
_SHOWN = 4  # steps that wait, in the table
_SAID = 60  # characters of what a program prints


@dataclass
class Slot:
    """Cores, and the step that runs on them. child: None of a process that an earlier run of ours has left behind."""

    cores: tuple[int, ...]
    step: Step | None = None
    child: object = None


class Work:
    """How a comparison stands, and its next steps.

    Args:
      root: its folder.
      jobs: steps that run at one time, each on its share of the cores.
      retry: also what has failed or diverged.
      known: comparison.json of earlier parts, whose rows are not made again.
      command: arguments of `ddt-jax` → what is run.

    Raises:
      UserError: more jobs than cores, a step began with other settings, or rows are known that are of another trial.
    """

    def __init__(
        self,
        found: Trial,
        arms: Sequence[Arm],
        root: str,
        *,
        jobs: int = 1,
        retry: bool = False,
        known: Sequence[str] = (),
        command: Callable[[Sequence[str]], Sequence[str]] = running.program,
    ):
        self.found, self.arms, self.root, self._command = found, list(arms), root, command
        self.slots = [Slot(cores) for cores in _shares(jobs)]
        self.chosen: dict[str, Chosen] = {}
        self.known = Known(known, found, arms, root)
        if retry:
            self.known.diverged.clear()
        self.made: set[str] = set()  # names of the steps that are done here
        self._done: set[str] = set()  # made, or known from an earlier part
        self._records: dict[str, sweep_state.Record] = {}
        self._paused: set[str] = set()  # that somebody else has stopped: they have to wait for the next time
        self._retry = retry
        self.plan()

    def plan(self) -> None:
        """Makes the choices that can be made, and the steps that follow from them."""
        while True:
            rows = steps(self.found, self.arms, self.root, self.chosen)
            for step in rows:
                if step.arguments and step.name not in self._records:
                    record = sweep_state.read(self.root, step, step.workdir)
                    again = self._retry and record.state in LOST
                    row = self.known.diverged.get(step.name)
                    if row and record.state == "waiting":
                        record = sweep_state.Record("diverged", row.diverged)
                    self._records[step.name] = sweep_state.Record() if again else record
                    if step.done():
                        self.made.add(step.name)
            self.steps, self._done = rows, self.made | self.known.spared(rows)
            self.stands = self._settle()
            choices = {arm.name: self._choose(arm) for arm in self.arms}
            if choices == self.chosen:
                return
            self.chosen = choices

    def _settle(self) -> dict[str, tuple[str, str]]:
        """Name → (state, name of the step that blocks it)."""
        stands: dict[str, tuple[str, str]] = {}
        for step in self.steps:
            state = self._records[step.name].state if step.name in self._records else "waiting"
            state = "finished" if step.name in self._done else "waiting" if state == "finished" else state
            causes = [cause for need in step.needs if (cause := _cause(need, stands))]
            if state in ("waiting", "stopped") and step.awaits:
                lost = [cause for name in step.awaits if (cause := _cause(name, stands))]
                fatal = [cause for cause in lost if stands[cause][0] == "failed"]
                causes += fatal or (lost if len(lost) == len(step.awaits) else [])
            if state in ("waiting", "stopped") and causes:
                stands[step.name] = ("blocked", causes[0])
            else:
                stands[step.name] = (state, "")
        return stands

    def _choose(self, arm: Arm) -> Chosen:
        """What can be chosen of an arm now. What has been chosen stays as it is while this goes on."""
        before, first = self.chosen.get(arm.name, Chosen()), self.found.seeds[0]
        if before.rate is None:
            looked = grid(self.found, arm.name, before.beyond)
            lost = {rate for rate, name in looked.items() if self._diverged(name)}
            left = [rate for rate, name in looked.items() if name in self._done]
            if not left or len(left) + len(lost) < len(looked):
                return before
            rows = [row for rate in left for row in self._rows(arm, rate, first)]
            best, _ = comparison.choose(arm.name, rows, first)
            if len(before.beyond) < self.found.beyond and (further := next_rate(tuple(looked), best)):
                return Chosen(beyond=(*before.beyond, further))
            return replace(before, rate=best)
        if before.guidance is None:
            swept = [f"{arm.name}-lr{before.rate:g}-s{first}-g{guidance:g}" for guidance in self.found.guidances]
            if not all(name in self._done for name in swept):
                return before
            _, point = comparison.choose(arm.name, self._rows(arm, before.rate, first), first)
            return replace(before, guidance=comparison.guidance(point))
        return before

    def _rows(self, arm: Arm, rate: float, seed: int) -> list[Row]:
        """What a choice looks at: how a run was evaluated."""
        place = arm.run(self.root, rate, seed)
        made = [
            Row(arm.name, place, seed, rate, found["step"], arm.steps, {}, {}, {}, found["drawn_with"], found)
            for found in (ledger.evaluations(place) if Path(place).exists() else ())
        ]
        return [row for row in self.known.merged(arm.name, made) if (row.lr, row.seed) == (rate, seed)]

    def _diverged(self, name) -> bool:
        cause = _cause(name, self.stands)
        return bool(cause) and self.stands[cause][0] == "diverged"

    # What is done with the steps.

    def adopt(self) -> None:
        """Takes the processes that are still at a step, though what started them is gone, for what they are."""
        for step in self.steps:
            record = self._records.get(step.name)
            if record and record.state == "running" and all(slot.step != step for slot in self.slots):
                free = [slot for slot in self.slots if slot.step is None]
                free.sort(key=lambda slot: slot.cores != _cores_of(record.pid))
                (free or [self._spare()])[0].step = step

    def _spare(self) -> Slot:
        self.slots.append(Slot(()))
        return self.slots[-1]

    def collect(self, children: running.Children) -> None:
        """Writes down what has become of steps that have ended."""
        changed = False
        for slot in self.slots:
            step = slot.step
            if step is None:
                continue
            if slot.child is None:
                record = sweep_state.read(self.root, step, step.workdir)
                if record.state == "running":
                    continue
                state, why = ("finished", "") if step.done() else ("stopped", record.why)
                record = self._records[step.name].ended(state, why)
            else:
                code = children.ended(slot.child)
                if code is None:
                    continue
                state, why = running.became(code, self._log(step), step.verb)
                if state == "finished" and not step.done():
                    state, why = "failed", f"{step.verb} ended well, but {step.made} is not as it should be"
                record = self._records[step.name].ended(state, why)
                if state == "stopped":
                    self._paused.add(step.name)
            self._records[step.name] = sweep_state.write(self.root, step, record)
            self.made |= {step.name} if state == "finished" else set()
            slot.step = slot.child = None
            changed = True
        if changed:
            self.slots = [slot for slot in self.slots if slot.cores or slot.step]
            self.plan()

    def ready(self) -> list[Step]:
        busy = {slot.step.workdir for slot in self.slots if slot.step}
        return [
            step
            for step in self.steps
            if step.arguments
            and self.stands[step.name][0] in ("waiting", "stopped")
            and step.name not in self._paused
            and step.workdir not in busy
            and all(need in self._done for need in step.needs)
        ]

    def start(self, children: running.Children) -> None:
        """Starts steps while there is room and something to do."""
        while (free := [slot for slot in self.slots if slot.step is None]) and (ready := self.ready()):
            slot, step = free[0], ready[0]
            log = self._log(step)
            log.parent.mkdir(parents=True, exist_ok=True)
            slot.step = step
            slot.child = children.start(self._command(step.arguments), log, slot.cores if len(self.slots) > 1 else ())
            record = self._records[step.name].started(step, slot.child.pid)
            self._records[step.name] = sweep_state.write(self.root, step, record)
            self.stands = self._settle()

    def idle(self) -> bool:
        return all(slot.step is None for slot in self.slots)

    def ours(self) -> bool:
        return any(slot.child is not None for slot in self.slots)

    def diverged(self) -> list[Row]:
        """The runs of transformers that did."""
        rows = []
        for step in self.steps:
            if step.kind == "training" and self.stands[step.name][0] == "diverged":
                of, why = dict(step.overrides), self._records[step.name].why
                rate, seed = float(of["optimizer.lr"]), int(of["seed"])
                rows.append(Row(step.arm, step.workdir, seed, rate, 0, step.steps, {}, {}, {}, {}, {}, (), why))
        return rows

    def lost(self) -> list[str]:
        """Lines about what was not done, but for what has diverged."""
        lines, behind = [], self._behind()
        for name, (state, _) in self.stands.items():
            if state == "failed":
                also = f"; {behind[name]} steps that need it were not run" if name in behind else ""
                lines.append(f"{name} failed: {self._records[name].why}{also}")
        left = sum(state in ("waiting", "running", "stopped") for state in self.states())
        return lines + ([f"{left} of {len(self.steps)} steps are not done yet"] if left else [])

    def _behind(self) -> dict[str, int]:
        """What has failed or diverged → how many steps it blocks."""
        causes = [cause for state, cause in self.stands.values() if state == "blocked"]
        return {cause: causes.count(cause) for cause in causes}

    def _log(self, step) -> Path:
        return Path(self.root) / "logs" / f"{step.name}.log"

    # How it stands, for a screen.

    def states(self) -> list[str]:
        return [state for state, _ in self.stands.values()]

    def table(self) -> str:
        now, every = time.time(), self.states()
        counts = {state: every.count(state) for state in STATES}
        lines, waiting = [], []
        for step in self.steps:
            state = self.stands[step.name][0]
            if state == "waiting":
                waiting.append(step.name)
            elif state not in ("finished", "blocked"):
                lines.append(self._line(step, state, now))
        lines += [f"  blocked   {count} steps need {cause}" for cause, count in self._behind().items()]
        lines += [f"  waiting   {name}" for name in waiting[:_SHOWN]]
        lines += [f"  ... {len(waiting) - _SHOWN} more wait"] if len(waiting) > _SHOWN else []
        listed = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        ends = f"; ends {self._ends(now)}" if counts["running"] or counts["waiting"] or counts["stopped"] else ""
        picked = [
            f"{arm} {choice.rate:g}" + ("" if choice.guidance is None else f" with guidance {choice.guidance:g}")
            for arm, choice in self.chosen.items()
            if choice.rate
        ]
        lines += [f"  best rates: {', '.join(picked)}"] if picked else []
        return "\n".join([f"{len(self.steps)} steps: {listed}{ends}", *lines])

    def _line(self, step, state, now) -> str:
        record, parts = self._records[step.name], [f"  {state:<9} {step.name}"]
        if state in ("running", "stopped") and step.verb == "train":
            line = sweep_state.last_line(step.workdir)
            parts.append(f"step {line.get('step', 0):,}/{step.steps:,}")
            parts += [f"loss {line['loss']:.4g}"] if line else []
        parts.append(duration(self._spent(record, now)))
        if state == "running" and step.verb != "train":
            said = self._log(step).read_text(errors="replace").splitlines() if self._log(step).exists() else []
            parts += [said[-1].strip()[:_SAID]] if said else []
        return "  ".join([*parts, *([record.why] if record.why and state != "running" else [])])

    def _spent(self, record, now) -> float:
        return record.seconds + (now - record.since if record.state == "running" else 0.0)

    def _ends(self, now) -> str:
        """When all is done, at the speed so far, a step like those of its kind and arm, or of its kind."""
        left, known = 0.0, True
        speeds: dict[tuple[str, str], list[float]] = {}
        for step in self.steps:
            record = self._records.get(step.name)
            if record and step.name in self._done and record.seconds:
                for key in ((step.kind, step.arm), (step.kind, "")):
                    speeds.setdefault(key, []).append(record.seconds / (step.flops or 1.0))
        for step in self.steps:
            state = self.stands[step.name][0]
            if state not in ("running", "waiting", "stopped"):
                continue
            record = self._records.get(step.name, sweep_state.Record())
            spent, share = self._spent(record, now), 0.0
            if state != "waiting" and step.verb == "train":
                share = sweep_state.last_line(step.workdir).get("step", 0) / max(step.steps, 1)
            of = speeds.get((step.kind, step.arm)) or speeds.get((step.kind, ""))
            if share > 0:
                left += spent * (1 - share) / share
            elif of:
                left += max(sum(of) / len(of) * (step.flops or 1.0) - spent, 0.0)
            else:
                known = False
        if not left:
            return "unknown" if not known else "soon"
        seconds = left / len(self.slots)
        at = time.strftime("%a %H:%M", time.localtime(now + seconds))
        return f"in {duration(seconds)}, {at}" if known else f"not before {at}: not every kind of step has been timed"


def run(work: Work, stream=None) -> bool:
    """Runs all that can be run.

    Returns:
      Whether nothing is left that could be run; else it was asked to stop, and goes on with the same command.
    """
    screen = running.Screen(stream or sys.stderr, work)
    with _alone(work.root), running.Children() as children:
        work.adopt()
        while True:
            work.collect(children)
            if not children.asked.is_set():
                work.start(children)
            screen.show()
            if work.idle() or (children.asked.is_set() and not work.ours()):
                break
            time.sleep(_TICK_SECONDS)
        screen.show(last=True)
    return not any(state in ("running", "waiting", "stopped") for state in work.states())


def listing(work: Work) -> str:
    """Lines for a shell: what each arm costs, and every command that is known by now."""
    lines = []
    for arm in work.arms:
        listed = ", ".join(f"{what} {value:.3e}" for what, value in arm.flops.items())
        lines.append(f"# {arm.name}: {sum(arm.flops.values()):.3e} FLOPs in all: {listed}; {arm.steps:,} steps")
        lines += [f"# {arm.name}: {line}" for line in arm.uncounted]
    for step in work.steps:
        state = work.stands[step.name][0]
        command = shlex.join(["ddt-jax", *step.arguments]) if step.arguments else "once the best are known"
        lines += [f"# {step.name}: {state}" + ("" if step.arguments else f", {command}")]
        lines += [command] if step.arguments and state != "finished" else []
    return "\n".join(lines)


def workdirs(work: Work) -> dict[str, list[str]]:
    """Arm → workdirs of its runs that were evaluated here."""
    found: dict[str, list[str]] = {arm.name: [] for arm in work.arms}
    for step in work.steps:
        if step.kind == "evaluation" and step.name in work.made:
            found[step.arm] += [step.workdir] if step.workdir not in found[step.arm] else []
    return found


def _cause(name: str, stands: Mapping[str, tuple[str, str]]) -> str:
    """The step that has failed or diverged, because of which this one is not done; "" if there is none."""
    state, cause = stands[name]
    return name if state in LOST else cause


def _shares(jobs: int) -> list[tuple[int, ...]]:
    """The cores of this machine in equal parts."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if not 1 <= jobs <= len(cores):
        raise UserError(f"compare: --jobs {jobs} is not between 1 and the {len(cores)} cores of this machine")
    each = len(cores) // jobs
    return [tuple(cores[i * each : (i + 1) * each]) for i in range(jobs)]


def _cores_of(pid: int) -> tuple[int, ...]:
    try:
        return tuple(sorted(os.sched_getaffinity(pid)))
    except (AttributeError, OSError):
        return ()


@contextmanager
def _alone(root: str):
    """One process at a time runs a comparison. Raises UserError."""
    Path(root).mkdir(parents=True, exist_ok=True)
    with open(Path(root) / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"compare: another process runs the comparison in {root}; wait for it") from error
        yield
