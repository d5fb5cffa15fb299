"""The part of tools/chaos.py that hurts data sources: reads that are slow, fail for a while, or fail for good.

A `sitecustomize.py` on the path of the run stands between it and the shards of its data, as a bad network file system
would; what is wrong with them is said by a file, which may change while the run goes on.
"""

import io
import os
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import soak_runs as programs
from chaos_faults import Job, new_steps
from soak_gates import at_least, at_most, note

_CONFIG = """
from ddt_jax import config

def get_config():
    c = config.sibling({smoke!r}, "smoke").get_config("linear")
    c.data.source = {source!r}
    c.data.cache_dir = {cache!r}
    return c
"""
_BETWEEN = """
import os, time

shards, state, log = {shards!r}, {state!r}, {log!r}
real = os.pread

def pread(file, size, offset):
    if os.readlink(f"/proc/self/fd/{{file}}").startswith(shards):
        try:
            with open(state) as found:
                fault = found.read()
        except FileNotFoundError:
            fault = ""
        if fault:
            with open(log, "a") as done:
                done.write(fault + "\\n")
        if fault == "slow":
            time.sleep(0.02)
        if fault == "away":
            raise OSError(5, "Input/output error")
    return real(file, size, offset)

os.pread = pread
"""
_IMAGES = 64
_AWAY_SECONDS = 3.0  # of the source that comes back
_PATIENCE = "--config.data.retry_seconds=2"  # of the run whose source does not


def source_faults(
    folder: Path, command: Callable[[Path, Path, list[str]], list[str]], env: dict[str, str], rng: random.Random
) -> dict:
    """Runs on tar shards: undisturbed; on a source that is slow, then away, then back; on one that stays away.

    Args:
      folder: a new one.
      command: (config, workdir, more arguments) → the run.
      env: variables of its commands.

    Returns:
      slow, failed (reads), told (lines about them), same_end (whether the run on the source that came back ended as the
      undisturbed one); of the one that stayed away: code, line (what it said), complaints (warnings and tracebacks),
      lost (steps beyond its newest checkpoint), same_end_later (the same, once it was started again).
    """
    state, log, config = folder / "state", folder / "hurt", folder / "sources.py"
    source = _shards(folder / "shards", rng)
    smoke = str(programs.ROOT / "configs" / "sources.py")
    config.write_text(_CONFIG.format(smoke=smoke, source=source, cache=str(folder / "cache")))
    between = folder / "between"
    between.mkdir()
    words = {"shards": str(folder / "shards"), "state": str(state), "log": str(log)}
    (between / "sitecustomize.py").write_text(_BETWEEN.format(**words))
    env = env | {"PYTHONPATH": os.pathsep.join(p for p in (str(between), os.environ.get("PYTHONPATH")) if p)}

    def job(name, *more):
        workdir = folder / name
        return Job(workdir, lambda: command(config, workdir, list(more)), env)

    undisturbed, comes_back, stays_away = job("undisturbed"), job("comes_back"), job("stays_away", _PATIENCE)
    programs.must(undisturbed.go_on(), "the undisturbed run on shards")
    wanted = undisturbed.result()
    slow_from, away_from = rng.randint(5, 30), rng.randint(50, 80)
    outcome = comes_back.go_on(after=_Weather(comes_back, state, {slow_from: "slow", away_from: "away"}, _AWAY_SECONDS))
    hurt = log.read_text().split() if log.exists() else []
    found = {
        "slow": hurt.count("slow"),
        "failed": hurt.count("away"),
        "told": sum("read again" in line for line in outcome.heard),
        "same_end": outcome.code == 0 and comes_back.result() == wanted,
    }
    note(f"a source that was slow, and away for {_AWAY_SECONDS:g} s: {found}")
    outcome = stays_away.go_on(after=_Weather(stays_away, state, {away_from: "away"}, float("inf")))
    said = [line for line in outcome.heard if line.startswith("ddt-jax: data: ")]
    newest = max(stays_away.checkpoints(), default=0)
    state.unlink(missing_ok=True)
    again = stays_away.go_on()
    return found | {
        "code": outcome.code,
        "line": said[0] if said else "",
        "complaints": len(outcome.complaints),
        "lost": newest - stays_away.starts[-1],
        "same_end_later": again.code == 0 and stays_away.result() == wanted,
    }


def gates(found: dict) -> list[dict]:
    """What must have come of `source_faults`."""
    spoken = "gives errors only" in found["line"] and found["code"] in (2, 76) and not found["complaints"]
    return [
        at_least("sources: reads that were slow", found["slow"], 1),
        at_least("sources: reads that failed", found["failed"], 1),
        at_least("sources: lines that told so", found["told"], 1),
        at_most("sources: runs with another end", (not found["same_end"]) + (not found["same_end_later"]), 0),
        at_most("sources: runs on a dead source that did not end with one line", int(not spoken), 0),
        at_most("sources: steps lost beyond the last checkpoint", found["lost"], 0),
    ]


class _Weather:
    """Called again and again while a run goes on: changes what is wrong with its source. Never ends the run.

    Args:
      changes: step of the log → what is wrong from then on.
      away: seconds after which a source that is away comes back.
    """

    def __init__(self, job: Job, state: Path, changes: dict[int, str], away: float):
        self._logged, self._state, self._changes, self._away = new_steps(job), state, dict(changes), away
        self._back_at = None

    def __call__(self) -> bool:
        now, step = time.monotonic(), self._logged()
        for at in [at for at in self._changes if at <= step]:
            fault = self._changes.pop(at)
            self._state.write_text(fault)
            if fault == "away":
                self._back_at = now + self._away
        if self._back_at is not None and now >= self._back_at:
            self._state.unlink(missing_ok=True)
            self._back_at = None
        return False


def _shards(folder: Path, rng: random.Random) -> str:
    """Writes two tar shards of random pictures and returns what to call them in a config."""
    from PIL import Image

    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(_IMAGES // 2):
                buffer = io.BytesIO()
                Image.frombytes("RGB", (32, 32), rng.randbytes(32 * 32 * 3)).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{i:03d}.png")
                member.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(member, buffer)
    return f"webdataset:{folder}/*.tar"
