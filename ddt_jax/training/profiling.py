"""Profiles of some steps, for XProf, TensorBoard or Perfetto: WORKDIR/profiles/STEP, of every process that takes one.

A window begins at a step that the settings name, or after SIGUSR1, whenever somebody wants to know.
"""

import pathlib
import shutil
import signal
import tempfile
import threading
from contextlib import ExitStack, contextmanager

import jax
from etils import epath

from ddt_jax.io import atomic
from ddt_jax.training.progress import Progress

FOLDER = "profiles"


class Profiler:
    """Windows of `steps` steps. What it costs (starting, waiting for the last step, writing) is a phase of its own.

    Args:
      workdir: "": takes none, and leaves signals alone.
      first: step at which a window begins; 0: at none. A run that goes on behind it does not take it again.
      steps: length of a window, those after SIGUSR1 included.
    """

    def __init__(self, workdir="", first: int = 0, steps: int = 5):
        self._workdir, self._first, self._steps = workdir, first, steps
        self._asked = threading.Event()
        self._last = 0  # step that ends the window; 0: there is none
        self._folder = self._target = ""

    @contextmanager
    def listening(self, progress: Progress):
        """For the time of the loop: catches SIGUSR1, and ends a window that is open when the loop ends."""
        self._progress = progress
        with ExitStack() as stack:
            if self._workdir and threading.current_thread() is threading.main_thread():
                before = signal.signal(signal.SIGUSR1, lambda number, frame: self._asked.set())
                stack.callback(signal.signal, signal.SIGUSR1, before)
            try:
                yield
            finally:
                if self._last:
                    self._end()

    def before(self, step: int) -> None:
        """`step` is about to be done: begins a window that is due."""
        if not self._workdir or self._last or not (step == self._first or self._asked.is_set()):
            return
        self._asked.clear()
        self._last = step + self._steps - 1
        self._target = epath.Path(self._workdir) / FOLDER / str(step)
        # The profiler writes to file systems only.
        self._folder = str(self._target) if atomic.is_local(self._target) else tempfile.mkdtemp()
        with self._progress.phase("profiling"):
            jax.profiler.start_trace(self._folder)

    def after(self, step: int, metrics) -> None:
        """`step` has been dispatched: ends the window whose last one it is, when it is done."""
        if step == self._last:
            with self._progress.phase("profiling"):
                jax.block_until_ready(metrics)
            self._end()

    def _end(self):
        self._last = 0
        with self._progress.phase("profiling"):
            jax.profiler.stop_trace()
            if self._folder != str(self._target):
                root = pathlib.Path(self._folder)
                for path in (p for p in root.rglob("*") if p.is_file()):
                    atomic.write_bytes(self._target / path.relative_to(root), path.read_bytes())
                shutil.rmtree(self._folder)
        self._progress.note(f"profile: {self._target}")
