"""The faults of tools/chaos.py. Each hurts a run once, at a random moment, and says what it did.

A fault is `(job, rng) → row`. A row has "what" in words, "step" that the log had reached, "next" (which start of the
run comes after it), "expected" (the step from which that must go on: the newest sound checkpoint) and "damaged" (the
step of a checkpoint that must be passed over by name, or None) and "half_written" (checkpoints that the kill has cut
off); it is None if the run got to its end first.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import soak_runs as programs
from soak_kill import logged_step

_PATIENCE = 180  # seconds in which the processes of a run must end when one of them has
_LIST = "files.json"  # of a checkpoint that has been read back
_FULL = "File too large"  # what the system says instead of a full disk when it is a limit
_UNFINISHED = ".orbax-checkpoint-tmp"  # part of the name of one that is being written, or removed


@dataclass
class Job:
    """A run that is started again and again.

    Attributes:
      command: makes the command of a start: several processes need a free port each time.
      env: variables of every start.
      starts: from which step each start went on.
      passed_over: steps of checkpoints that were named as damaged.
      outcomes: of the starts.
    """

    workdir: Path
    command: Callable[[], list[str]]
    env: dict[str, str]
    starts: list[int] = field(default_factory=list)
    passed_over: list[int] = field(default_factory=list)
    outcomes: list[programs.Outcome] = field(default_factory=list)

    def go_on(self, after=None, through: tuple[str, ...] = ()) -> programs.Outcome:
        """Starts the run. through: a command that starts it."""
        outcome = programs.run([*through, *self.command()], after=after, whole_session=True, env=self.env)
        self.outcomes.append(outcome)
        fresh = any(" parameters, " in line for line in outcome.heard)
        over = "finished at step" in outcome.stdout and not fresh  # it had ended before, and said no more
        self.starts.append(max(self.checkpoints(), default=0) if over else 0)
        for line in outcome.heard:
            if " passed over: " in line:
                self.passed_over.append(int(line.partition("step ")[2].split()[0]))
            elif line.startswith("goes on from step "):
                self.starts[-1] = int(line.split()[4].replace(",", ""))
        return outcome

    def checkpoints(self) -> list[int]:
        return programs.saved_steps(self.workdir)

    def processes(self) -> list[int]:
        """Numbers of the processes that run it now, without a shell that waits for them."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if str(self.workdir).encode() in words and not words[0].endswith(b"bash"):
                    found.append(int(path.parent.name))
        return sorted(found)

    def folder(self, step: int) -> Path:
        return self.workdir / "checkpoints" / str(step)

    def half_written(self) -> list[str]:
        """Checkpoints that are being written, or were when the run was killed."""
        folder = self.workdir / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return [name for name in names if _UNFINISHED in name and not name.endswith("-removed")]

    def result(self) -> dict:
        """What must not depend on any fault: the state at the end, the log, and every step's figures."""
        files = {name: (self.workdir / name).read_bytes().hex() for name in ("metrics.jsonl", "steps.f32")}
        return {"digest": programs.digest(self.workdir), **files}

    def row(self, what: str, damaged: int | None = None) -> dict:
        """Of a fault that has just struck."""
        sound = [step for step in self.checkpoints() if step != damaged]
        return {
            "what": what,
            "step": logged_step(self.workdir),
            "next": len(self.starts),
            "expected": max(sound, default=0),
            "damaged": damaged,
            "half_written": len(self.half_written()),
        }


def _killed(job: Job, reached: Callable[[], bool]) -> bool:
    """Lets the run go on until something is reached and kills all of it; False if it got to its end first."""
    outcome = job.go_on(after=reached)
    if outcome.code not in (0, -signal.SIGKILL, 128 + signal.SIGKILL):
        raise programs.Failed(f"the run ended by itself with code {outcome.code}; its output is above")
    return outcome.code != 0


def _after(happens: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    """True from so many seconds after something has happened."""
    due = []

    def reached():
        if not due and happens():
            due.append(time.monotonic() + seconds)
        return bool(due) and time.monotonic() >= due[0]

    return reached


def new_steps(job: Job) -> Callable[[], int]:
    """() → the last step that the start to come has logged; 0 before it has logged any."""
    path = job.workdir / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    return lambda: logged_step(job.workdir) if path.exists() and path.stat().st_mtime_ns > before else 0


def _read_back(job: Job) -> set[int]:
    return {step for step in job.checkpoints() if (job.folder(step) / _LIST).exists()}


def kill(job, rng):
    """SIGKILL to all processes after a random step."""
    step, logged = max(job.checkpoints(), default=0) + rng.randint(1, 25), new_steps(job)
    return (
        job.row(f"killed after step {step}")
        if _killed(job, _after(lambda: logged() >= step, rng.random() / 5))
        else None
    )


def _strike(job, rng, send: signal.Signals, code: int | None, what: str):
    """Sends a signal to one of the processes after a random step; all of them must then end by themselves."""
    step, logged, struck = max(job.checkpoints(), default=0) + rng.randint(1, 25), new_steps(job), []

    def hangs():
        if not struck and logged() >= step and (there := job.processes()):
            os.kill(rng.choice(there), send)
            struck.append(time.monotonic())
        return bool(struck) and time.monotonic() - struck[0] > _PATIENCE

    outcome = job.go_on(after=hangs)
    if not struck or outcome.code == 0:
        return None
    seconds = round(time.monotonic() - struck[0], 1)
    if seconds > _PATIENCE or code not in (None, outcome.code):
        raise programs.Failed(f"{what}: the run ended {seconds} s later with code {outcome.code}; its output is above")
    return job.row(f"{what} after step {step}, code {outcome.code}") | {"seconds": seconds}


def kill_one(job, rng):
    """SIGKILL to one process. Without it the others cannot go on: they must say so, and may not wait for ever."""
    row = _strike(job, rng, signal.SIGKILL, None, "one process killed")
    alone = row is None or job.outcomes[-1].code == -signal.SIGKILL  # a run of one process
    if not alone and not any("another process of the run has ended" in line for line in job.outcomes[-1].heard):
        raise programs.Failed("the others did not say why they ended; their output is above")
    return row


def stop_one(job, rng):
    """SIGTERM to one process, as a scheduler sends it to one host: all must save after the same step."""
    return _strike(job, rng, signal.SIGTERM, programs.SAVED, "one process asked to stop")


def kill_in_save(job, rng):
    """SIGKILL while a checkpoint is being written."""
    delay, logged = rng.random() / 20, new_steps(job)  # what an earlier kill has left does not count
    writing = lambda: logged() > 0 and bool(job.half_written())  # noqa: E731
    return job.row(f"killed {delay * 1000:.0f} ms into a save") if _killed(job, _after(writing, delay)) else None


def kill_in_read_back(job, rng):
    """SIGKILL when a checkpoint is whole and has not been read back."""
    before = set(job.checkpoints())
    happens = lambda: bool(set(job.checkpoints()) - before)  # noqa: E731
    return job.row("killed before a checkpoint was read back") if _killed(job, happens) else None


def _damage(hurt: Callable[[Path, random.Random], str]) -> Callable:
    """A fault that kills the run when it has two checkpoints or more, and hurts a file of the newest."""

    def fault(job, rng):
        before = max(job.checkpoints(), default=0)
        two_and_newer = lambda: len(found := _read_back(job)) >= 2 and max(found) > before  # noqa: E731
        if not _killed(job, two_and_newer):
            return None
        step = max(_read_back(job))
        files = [p for p in job.folder(step).rglob("*") if p.is_file() and p.name != _LIST and p.stat().st_size]
        newer = [s for s in job.checkpoints() if s > step]  # whole, and sound, though not yet read back
        what = f"{hurt(rng.choice(sorted(files)), rng)} of checkpoint {step}"
        return job.row(what, None if newer else step)

    return fault


def _flip(path, rng):
    bit = rng.randrange(path.stat().st_size * 8)
    flip(path, bit)
    return f"bit {bit} flipped in {path.name}"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _truncate(path, rng):
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} cut to {size} bytes"


def _delete(path, rng):
    path.unlink()
    return f"{path.name} removed"


def empty_checkpoint(job, rng):
    """A folder that is named like a newer checkpoint and holds nothing."""
    if (row := kill(job, rng)) is not None:
        step = max(job.checkpoints(), default=0) + 5
        job.folder(step).mkdir(parents=True)
        row |= {"what": f"empty folder for step {step}", "damaged": step}
    return row


def torn_log(job, rng):
    """Half a line at the end of the log, as a crash of the machine leaves it."""
    if (row := kill(job, rng)) is not None:
        path = job.workdir / "metrics.jsonl"
        line = path.read_bytes().splitlines()[-1]
        with path.open("ab") as file:
            file.write(line[: rng.randint(1, len(line) - 1)])
        row["what"] = "half a line at the end of the log"
    return row


def compile_cache(job, rng):
    """Every entry of JAX's compilation cache cut in half, for the next start alone: the others would wait for it."""
    if (row := kill(job, rng)) is None:
        return None
    entries = {p: p.read_bytes() for p in Path(job.env["JAX_COMPILATION_CACHE_DIR"]).glob("*") if p.is_file()}
    row["what"] = f"{len(entries)} entries of the compilation cache cut"
    logged = new_steps(job)
    try:
        for path, content in entries.items():
            path.write_bytes(content[: len(content) // 2])
        return row if _killed(job, lambda: logged() > 0) else None
    finally:
        for path, content in entries.items():
            path.write_bytes(content)


def full_disk(job, rng):
    """No file can grow to the size that a checkpoint needs."""
    if not job.checkpoints() and (row := kill_in_read_back(job, rng)) is None:
        return row
    newest = job.folder(max(job.checkpoints()))
    largest = max(p.stat().st_size for p in newest.rglob("*") if p.is_file())
    outcome = job.go_on(through=("bash", "-c", f'ulimit -f {largest * 3 // 4 // 1024}; exec "$@"', "full"))
    if outcome.code == 0:
        return None
    said = any(line.startswith("ddt-jax: ") and _FULL in line for line in outcome.heard)
    if not said or outcome.complaints:
        raise programs.Failed(f"on a full disk the run ended with code {outcome.code}; its output is above")
    return job.row("a full disk ended it with one line")


FAULTS: dict[str, Callable] = {
    "kill": kill,
    "kill_one": kill_one,
    "stop_one": stop_one,
    "kill_in_save": kill_in_save,
    "kill_in_read_back": kill_in_read_back,
    "flip": _damage(_flip),
    "truncate": _damage(_truncate),
    "delete": _damage(_delete),
    "empty_checkpoint": empty_checkpoint,
    "torn_log": torn_log,
    "compile_cache": compile_cache,
    "full_disk": full_disk,
}
