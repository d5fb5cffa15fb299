"""What a long measurement runs and where: the machine, the checkout, and programs that are watched while they run.

Measurements call these through the module, so that a test can put a stand-in for `ddt-jax` in one place.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 10  # seconds in which the children of a run may follow it
POLL = 0.01  # seconds between two looks at what a run has written
SAVED = 75  # exit code of a run that was asked to stop and has saved


class Failed(Exception):
    """A run that should have worked did not: the measurement has no figures."""


def git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict:
    """CPU, memory and versions."""
    cpu, memory = platform.processor() or platform.machine(), None
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    with contextlib.suppress(OSError, ValueError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "cpu": cpu,
        "cores": usable,
        "memory_gb": memory,
        "accelerators": _accelerators(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "load_before": round(os.getloadavg()[0], 2),
    }


def _accelerators() -> list[str]:
    """Names of the GPUs, asked of their driver: this process must not take them from those that it starts."""
    with contextlib.suppress(OSError):
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True)
        return done.stdout.splitlines() if done.returncode == 0 else []
    return []


@dataclass
class Outcome:
    code: int
    stdout: str
    seconds: float
    complaints: list[str]  # warnings and tracebacks that it printed
    leftover: int  # processes of its session that outlived it
    session: int
    heard: list[str] = field(default_factory=list)  # all lines of its stderr


def run(
    args: list[str],
    *,
    after: float | Callable[[], bool] | None = None,
    send: signal.Signals = signal.SIGKILL,
    whole_session: bool = False,
    env: dict[str, str] | None = None,
    watch: Callable[[int], None] | None = None,
) -> Outcome:
    """Runs a command in a session of its own and shows what it says.

    Args:
      after: send it a signal after so many seconds, or once this is true, if it still runs then.
      whole_session: send it to what the command has started as well.
      env: variables beside those of this process.
      watch: called with the number of the process again and again while it runs.
    """
    start, complaints, heard = time.monotonic(), [], []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "bufsize": 1}
    child = subprocess.Popen(args, cwd=ROOT, start_new_session=True, env={**os.environ, **(env or {})}, **pipes)

    def follow():
        for line in child.stderr:
            print(f"    {line.rstrip()}", file=sys.stderr, flush=True)
            heard.append(line.rstrip())
            if "Warning" in line or "Traceback" in line:
                complaints.append(line.rstrip())

    said = []
    readers = [threading.Thread(target=follow), threading.Thread(target=lambda: said.extend(child.stdout))]
    for reader in readers:
        reader.start()
    try:
        if callable(after) or watch:
            reached = after if callable(after) else lambda: after is not None and time.monotonic() - start >= after
            while child.poll() is None and not reached():
                if watch:
                    watch(child.pid)
                time.sleep(POLL)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(after)
        if child.poll() is None:
            os.killpg(child.pid, send) if whole_session else child.send_signal(send)
        code = child.wait()
        seconds = time.monotonic() - start
        leftover = session_members(child.pid, patience=PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # on Ctrl-C the child, else what it left behind
        child.wait()
        for reader, pipe in zip(readers, (child.stderr, child.stdout), strict=True):
            reader.join()
            pipe.close()
    return Outcome(code, "".join(said), seconds, complaints, leftover, child.pid, heard)


def session_members(session: int, patience: float) -> int:
    """How many processes of a session are still there after some seconds of patience."""
    end = time.monotonic() + patience
    while True:
        done = subprocess.run(["ps", "-o", "stat=", "-s", str(session)], capture_output=True, text=True)
        count = sum(not line.startswith("Z") for line in done.stdout.split())
        if not count or time.monotonic() > end:
            return count
        time.sleep(0.2)


def must(outcome: Outcome, what: str, codes: tuple[int, ...] = (0,)) -> Outcome:
    if outcome.code not in codes:
        raise Failed(f"{what} ended with code {outcome.code}; its output is above")
    return outcome


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "ddt_jax.cli", *args]


def digest(workdir: Path) -> str:
    return must(run(command("checkpoint", "digest", "--workdir", str(workdir))), "checkpoint digest").stdout.split()[-1]


def train_and_evaluate(
    config: str,
    workdir: Path,
    seed: int,
    options,
    minutes: float | None = None,
    also: tuple[str, ...] = (),
    to_evaluate: tuple[str, ...] = (),
):
    """The figures of `evaluate`, and the outcomes of both commands; after `minutes` training is asked to stop.

    also, to_evaluate: more arguments of the training and of the evaluation.
    """
    overrides = (f"--config.seed={seed}", *also, *options.overrides)
    args = command("train", "--config", config, "--workdir", str(workdir), *overrides)
    trained = run(args, after=minutes and minutes * 60, send=signal.SIGTERM)
    must(trained, "train", (0, SAVED) if minutes else (0,))
    path = workdir / "soak.json"
    evaluated = must(run(command("evaluate", "--workdir", str(workdir), "--json", str(path), *to_evaluate)), "evaluate")
    return json.loads(path.read_text()), [trained, evaluated]


def codes_of(tokenizer: Path, folder: Path, sources: dict[str, tuple[str, int]]) -> list[Outcome]:
    """Outcomes of writing the codes of sources, name of a folder → (source, records), into folders of these names."""
    outcomes = []
    for to, (source, records) in sources.items():
        what = ("--to", str(folder / to), "--source", source, "--records", str(records))
        outcomes.append(must(run(command("tokenize", "--workdir", str(tokenizer), *what)), "tokenize"))
    return outcomes


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder; unfinished ones have a longer name."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def load_config(config: str, options):
    from ddt_jax import config as configs

    pairs = [text.removeprefix("--config.").partition("=") for text in options.overrides]
    return configs.load(str(ROOT / config), tuple((key, value) for key, _, value in pairs))


def dump_config(config: str, options) -> dict:
    from ddt_jax import config as configs

    return configs.dump(load_config(config, options))
