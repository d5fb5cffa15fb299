"""Ends a process that has stood still for too long, and says where: a collective that waits for a dead host, a storage
that never answers, a deadlock. Without it such a run holds its chips until somebody looks.
"""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from etils import epath

from ddt_jax.io import atomic
from ddt_jax.training.progress import Progress

EXIT_SILENT = 77
FOLDER = "stacks"
_UPLOAD_SECONDS = 10.0  # the storage may be what hangs


class Silence:
    """Seconds without a sign of life: none of a step whose metrics have arrived, of a batch, of a phase that begins or
    ends, or of a detail of one.

    The first time of each phase is not counted, for it compiles: the first step, evaluation and save may take as long
    as they like. Nor is time in which this process did not run, as it was stopped or the machine slept.

    Args:
      gap: seconds between two looks, at most, while this process runs.
    """

    def __init__(self, progress: Progress, gap: float, now: float):
        self._progress, self._gap, self._before = progress, gap, now
        self._seen, self._silent = progress.sign, 0.0

    def look(self, now: float) -> float:
        """To be called every so often. Returns the seconds so far."""
        sign, doing = self._progress.sign, self._progress.doing
        first = doing and doing not in self._progress.ended
        self._silent = 0.0 if first or sign != self._seen else self._silent + min(now - self._before, self._gap)
        self._seen, self._before = sign, now
        return self._silent


class Watchdog:
    """Watches from `__enter__` to `__exit__`, if `limit` is not 0.

    Args:
      limit: seconds of `Silence`, `train.silence_limit`; longer than evaluations and saves take without a detail.
      leave: ends the process.
    """

    def __init__(self, workdir, progress: Progress, limit: float, *, process: int = 0,
                 leave: Callable[[int], None] = os._exit):  # fmt: skip
        self._workdir, self._progress, self._limit, self._process = workdir, progress, limit, process
        self._leave = leave
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="watchdog", daemon=True)

    def __enter__(self):
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()

    def _serve(self):
        every = min(self._limit / 20, 5.0)
        silence = Silence(self._progress, 2 * every, time.monotonic())
        while not self._end.wait(every):
            if (silent := silence.look(time.monotonic())) >= self._limit:
                self._bark(silent, self._progress.doing)
                return

    def _bark(self, silent, doing):
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        path = epath.Path(self._workdir) / FOLDER / f"{self._process}.txt"
        step, what = self._progress.step, f" [{doing}]" if doing else ""
        line = f"train: process {self._process} gave no sign of life for {silent:.0f} s after step {step:,}{what} "
        line += f"(train.silence_limit={self._limit:g}); stacks of its threads: {path}"
        print(f"\n{stacks}\nddt-jax: {line}", file=sys.stderr, flush=True)

        def keep():
            with contextlib.suppress(OSError):
                atomic.write_text(path, f"{line}\n\n{stacks}")

        keeping = threading.Thread(target=keep, daemon=True)
        keeping.start()
        keeping.join(_UPLOAD_SECONDS)
        self._leave(EXIT_SILENT)
