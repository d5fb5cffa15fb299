"""The faults of tools/chaos.py. Each hurts a run once, at a random moment, and says what it did.

A fault is `(job, rng) → row`. A row has "what" in words, "step" that the log had reached, "next" (which start of the
run comes after it), "expected" (the step from which that must go on: the newest sound checkpoint) and "damaged" (the
step of a checkpoint that must be passed over by name, or None); it is None if the run got to its end first.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import soak_runs as programs
from soak_kill import logged_step

_LIST = "files.json"  # of a checkpoint that has been read back


@dataclass
class Job:
    """A run that is started again and again with one command.

    Attributes:
      starts: from which step each start went on.
      passed_over: steps of checkpoints that were named as damaged.
      outcomes: of the starts.
    """

    workdir: Path
    command: list[str]
    env: dict[str, str]
    starts: list[int] = field(default_factory=list)
    passed_over: list[int] = field(default_factory=list)
    outcomes: list[programs.Outcome] = field(default_factory=list)

    def go_on(self, after=None, through: tuple[str, ...] = ()) -> programs.Outcome:
        """Starts the run. through: a command that starts it."""
        outcome = programs.run([*through, *self.command], after=after, whole_session=True, env=self.env)
        self.outcomes.append(outcome)
        self.starts.append(0)
        for line in outcome.heard:
            if " passed over: " in line:
                self.passed_over.append(int(line.partition("step ")[2].split()[0]))
            elif line.startswith("goes on from step "):
                self.starts[-1] = int(line.split()[4].replace(",", ""))
        return outcome

    def checkpoints(self) -> list[int]:
        return programs.saved_steps(self.workdir)

    def folder(self, step: int) -> Path:
        return self.workdir / "checkpoints" / str(step)

    def result(self) -> dict:
        """What must not depend on any fault: the state at the end, the log, and every step's figures."""
        files = {name: (self.workdir / name).read_bytes().hex() for name in ("metrics.jsonl", "steps.f32")}
        return {"digest": programs.digest(self.workdir), **files}

    def row(self, what: str, damaged: int | None = None) -> dict:
        """Of a fault that has just struck."""
        sound = [step for step in self.checkpoints() if step != damaged]
        step, expected = logged_step(self.workdir), max(sound, default=0)
        return {"what": what, "step": step, "next": len(self.starts), "expected": expected, "damaged": damaged}


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


def _new_steps(job: Job) -> Callable[[], int]:
    """() → the last step that the start to come has logged; 0 before it has logged any."""
    path = job.workdir / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else 0
    return lambda: logged_step(job.workdir) if path.exists() and path.stat().st_mtime_ns > before else 0


def _read_back(job: Job) -> set[int]:
    return {step for step in job.checkpoints() if (job.folder(step) / _LIST).exists()}


def kill(job, rng):
    """SIGKILL to all processes after a random step."""
    step, logged = max(job.checkpoints(), default=0) + rng.randint(1, 25), _new_steps(job)
    return (
        job.row(f"killed after step {step}")
        if _killed(job, _after(lambda: logged() >= step, rng.random() / 5))
        else None
    )


def kill_in_save(job, rng):
    """SIGKILL while a checkpoint is being written."""
    folder, delay = job.workdir / "checkpoints", rng.random() / 10
    logged = _new_steps(job)  # what an earlier kill has left half written does not count

    def writing():
        return logged() > 0 and any(".orbax-checkpoint-tmp" in p.name for p in folder.iterdir())

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
    """The last line of the log cut in half."""
    if (row := kill(job, rng)) is not None:
        path = job.workdir / "metrics.jsonl"
        os.truncate(path, path.stat().st_size - rng.randint(1, 40))
        row["what"] = "last line of the log cut"
    return row


def compile_cache(job, rng):
    """Every entry of JAX's compilation cache cut in half."""
    if (row := kill(job, rng)) is not None:
        entries = [p for p in Path(job.env["JAX_COMPILATION_CACHE_DIR"]).glob("*") if p.is_file()]
        for path in entries:
            os.truncate(path, path.stat().st_size // 2)
        row["what"] = f"{len(entries)} entries of the compilation cache cut"
    return row


def full_disk(job, rng):
    """No file can grow to the size that a checkpoint needs."""
    if not job.checkpoints() and (row := kill_in_read_back(job, rng)) is None:
        return row
    newest = job.folder(max(job.checkpoints()))
    largest = max(p.stat().st_size for p in newest.rglob("*") if p.is_file())
    outcome = job.go_on(through=("bash", "-c", f'ulimit -f {largest * 3 // 4 // 1024}; exec "$@"', "full"))
    if outcome.code == 0:
        return None
    if not any("checkpoint: cannot be written" in line for line in outcome.heard):
        raise programs.Failed(f"on a full disk the run ended with code {outcome.code}; its output is above")
    return job.row("a full disk ended it with one line")


FAULTS: dict[str, Callable] = {
    "kill": kill,
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
