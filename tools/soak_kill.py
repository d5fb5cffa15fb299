"""A run that is killed again and again, held against an undisturbed one."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import soak_runs as programs
from soak_gates import at_least, at_most, note, quiet


def kill(options, folder: Path) -> dict:
    """SIGKILL again and again; each time the same command goes on. One kill in five hits the start-up, the others hit
    random steps, from the last checkpoint to some checkpoints later, saves included.
    """
    rng = random.Random(options.seeds[0])
    steps, every, reach = 200, 10, 40
    overrides = [f"--config.seed={options.seeds[0]}", f"--config.train.steps={steps}", *options.overrides]
    overrides += [f"--config.train.checkpoint_every={every}", "--config.train.log_every=1"]

    def train(workdir):
        return programs.command("train", "--config", "configs/smoke.py", "--workdir", str(workdir), *overrides)

    undisturbed = programs.must(programs.run(train(folder / "undisturbed")), "the undisturbed run")
    wanted, log = programs.digest(folder / "undisturbed"), (folder / "undisturbed" / "metrics.jsonl").read_bytes()
    note(f"undisturbed: {undisturbed.seconds:.1f} s, digest {wanted[:16]}")

    kills, ends, outcomes, runs, began = [], [], [undisturbed], 0, time.monotonic()
    workdir = folder / "killed0"
    while True:
        enough = len(kills) >= options.kills
        saved = max(programs.saved_steps(workdir), default=0)
        moment = None if enough else next_kill(rng, workdir, saved, reach, undisturbed.seconds)
        outcome = programs.run(train(workdir), after=moment)
        outcomes.append(outcome)
        if outcome.code == -signal.SIGKILL:
            at = logged_step(workdir)
            kills.append({"run": runs, "after_seconds": round(outcome.seconds, 2), "went_on_from": saved, "step": at})
            left = (time.monotonic() - began) / len(kills) * (options.kills - len(kills)) / 60
            note(f"kill {len(kills)} of {options.kills}: from step {saved} to {at}; about {left:.0f} min left")
            continue
        programs.must(outcome, f"run {runs} after {sum(k['run'] == runs for k in kills)} kills")
        same = (workdir / "metrics.jsonl").read_bytes() == log
        count = sum(k["run"] == runs for k in kills)
        ends.append({"run": runs, "kills": count, "digest": programs.digest(workdir), "same_log": same})
        note(f"run {runs} reached its end after {count} kills, digest {ends[-1]['digest'][:16]}")
        if enough:
            break
        shutil.rmtree(workdir)
        runs += 1
        workdir = folder / f"killed{runs}"
    disturbed = [end for end in ends if end["kills"]]
    return {
        "config": "configs/smoke.py",
        "seeds": options.seeds[:1],
        "results": {
            "digest": wanted,
            "undisturbed_seconds": round(undisturbed.seconds, 1),
            "kills": kills,
            "ends": ends,
        },
        "gates": [
            at_least("kills", len(kills), options.kills),
            at_least(
                "of these, of a run that had gone on from a checkpoint",
                sum(k["went_on_from"] > 0 for k in kills),
                options.kills // 3,
            ),
            at_least("runs that were killed and reached their end", len(disturbed), 1),
            at_most("of these, with another digest", sum(end["digest"] != wanted for end in disturbed), 0),
            at_most("of these, with another log", sum(not end["same_log"] for end in disturbed), 0),
            *quiet(outcomes),
        ],
    }


def next_kill(rng: random.Random, workdir: Path, saved: int, reach: int, seconds: float) -> float | Callable[[], bool]:
    """When the next kill is due: see `run`."""
    if rng.random() < 0.2:
        return rng.uniform(0.1, 0.5) * seconds
    step, delay = saved + rng.randint(1, reach), rng.uniform(0, 0.3)
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns if (workdir / "metrics.jsonl").exists() else 0
    due = None

    def reached():
        nonlocal due
        path = workdir / "metrics.jsonl"
        # The log of the killed run may be ahead of its checkpoint, until the new one cuts it back.
        if due is None and path.exists() and path.stat().st_mtime_ns > before and logged_step(workdir) >= step:
            due = time.monotonic() + delay
        return due is not None and time.monotonic() >= due

    return reached


def logged_step(workdir: Path) -> int:
    """The last step in a run's log; 0 without one."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last line may be half written
    return json.loads(lines[-1])["step"] if lines else 0
