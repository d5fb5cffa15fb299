"""A sign of life of each process: WORKDIR/heartbeats/N.json, written every few seconds by a thread of its own.

    {"process": 3, "host": "node7", "pid": 4711, "time": "2026-01-31T12:00:05Z", "step": 1200, "phase": "training", ...}

Whoever looks after a run sees here which host stands still, and at what. A storage that hangs or is full costs beats,
never steps.
"""

import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable

import jax
from etils import epath

from ddt_jax.io import atomic, json_object
from ddt_jax.training.progress import Progress

FOLDER = "heartbeats"
_SECONDS = 5.0
_REMOTE_SECONDS = 30.0  # every beat is a request to an object store


class Heartbeat:
    """Beats from `__enter__` to `__exit__`, and once more at the end, with the phase "ended".

    Args:
      process, processes: number of this one, and how many there are.
      also: called with every beat, in the same thread; what it raises as OSError is let pass.
      seconds: between beats; None: 5, and 30 where the workdir is an object store.
    """

    def __init__(self, workdir, progress: Progress, *, process: int = 0, processes: int = 1,
                 also: Callable[[], None] = lambda: None, seconds: float | None = None):  # fmt: skip
        self._folder = epath.Path(workdir) / FOLDER
        self._progress, self._process, self._also = progress, process, also
        self._seconds = seconds or (_SECONDS if atomic.is_local(self._folder) else _REMOTE_SECONDS)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="heartbeat", daemon=True)
        if process == 0:
            self._forget(processes)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join(self._seconds)  # a storage that hangs holds up nobody
        if not self._thread.is_alive():
            self._beat("ended")

    def _serve(self):
        self._beat(self._progress.doing or "training")
        while not self._end.wait(self._seconds):
            self._beat(self._progress.doing or "training")

    def _beat(self, phase):
        tree = {
            "process": self._process,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "step": self._progress.step,
            "phase": phase,
            **peak_memory(),
        }
        with contextlib.suppress(OSError):
            atomic.write_text(self._folder / f"{self._process}.json", json.dumps(tree) + "\n")
        with contextlib.suppress(OSError):
            self._also()

    def _forget(self, processes):
        """The last try may have had more processes."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob("*.json"):
                if path.stem.isdigit() and int(path.stem) >= processes:
                    path.unlink()


def peak_memory() -> dict[str, int]:
    """High-water marks of this process: `peak_host_bytes`, and `peak_device_bytes` of the fullest of its devices where
    they say it (CPUs do not).
    """
    found = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if known := [peak for peak in peaks if peak is not None]:
        found["peak_device_bytes"] = max(known)
    return found


def read(workdir) -> list[dict]:
    """The last beat of each process, by number; a damaged one is left out."""
    folder, found = epath.Path(workdir) / FOLDER, []
    paths = [path for path in folder.glob("*.json") if path.stem.isdigit()] if folder.exists() else []
    for path in sorted(paths, key=lambda path: int(path.stem)):
        with contextlib.suppress(ValueError):
            found.append(json_object.loads(path.read_bytes()))
    return found
