"""What programs share that run other programs: children that are asked to stop when they are, and a live table.

`ddt-jax sweep` runs one child at a time, `tools/compare.py run` several, each on cores of its own.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ddt_jax.peers import EXIT_ALONE
from ddt_jax.training.loop import EXIT_STOPPED

LOOK_SECONDS = 2.0  # between two looks at what is going on
_SAY_SECONDS = 60.0  # between two tables in a log file where nothing has changed
_NOT_FINITE = "were not finite"  # what `train` says of a run that it gives up
# Ends of a run that was asked to stop, before it could save or after.
_ASKED = (EXIT_STOPPED, -signal.SIGTERM, -signal.SIGINT)


def became(code: int, log: Path, verb: str) -> tuple[str, str]:
    """(state, why) of a program that has ended: "finished", "stopped", "diverged" or "failed".

    Args:
      code: its exit code, negative for a signal.
      log: what it printed; the last line says why.
      verb: of `ddt-jax`, for what it did not say itself.
    """
    if code == 0:
        return "finished", ""
    if code in _ASKED:
        return "stopped", "asked to stop"
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    why = said[-1].removeprefix("ddt-jax: ") if said else ""
    if code == EXIT_ALONE:  # what it needs was away
        return "stopped", why
    state = "diverged" if _NOT_FINITE in why else "failed"
    killed = f"{verb} was killed by signal {-code}" if code < 0 else ""
    return state, killed or why or f"{verb} ended with code {code}"


def program(arguments: Sequence[str]) -> list[str]:
    """The command of `ddt-jax` with arguments."""
    return [sys.executable, "-m", "ddt_jax.cli", *arguments]


class Children:
    """Programs that are running. SIGINT and SIGTERM reach each of them, once, as SIGTERM: they save.

    Attributes:
      asked: set when this process was asked to stop.
    """

    def __init__(self):
        self.asked = threading.Event()
        self._running: set[subprocess.Popen] = set()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        else:
            self._before = {}
        return self

    def __exit__(self, kind, *_):
        if kind:
            self._stop()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if not self.asked.is_set():
            self._stop()
        self.asked.set()

    def _stop(self):
        for child in self._running:
            child.terminate()

    def start(self, command: Sequence[str], log: Path, cores: Sequence[int] = ()) -> subprocess.Popen:
        """Starts a program of this package.

        Args:
          log: what it prints is added to it.
          cores: of this machine, that it may use; none: all that this process has.
        """
        # A package that is not installed is found where this one was; Ctrl-C reaches the program through us alone.
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))))
        how = {"stderr": subprocess.STDOUT, "start_new_session": True, "env": os.environ | {"PYTHONPATH": path}}
        with open(log, "ab") as file, _on(cores):
            child = subprocess.Popen(list(command), stdout=file, **how)
        self._running.add(child)
        if self.asked.is_set():  # in between
            child.terminate()
        return child

    def ended(self, child: subprocess.Popen) -> int | None:
        """Its exit code, None while it runs."""
        code = child.poll()
        if code is not None:
            self._running.discard(child)
        return code

    def launch(self, arguments: list[str], log: Path, began: Callable[[int], None]) -> int:
        """Runs `ddt-jax` with arguments, tells the number of its process, and returns its exit code."""
        child = self.start(program(arguments), log)
        began(child.pid)
        child.wait()
        return self.ended(child)


@contextmanager
def _on(cores):
    """Children that are started here have these cores from their first instruction on: they inherit our thread's."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Board(Protocol):
    """What a screen shows. states: of everything that runs or waits; table: how things stand, in lines."""

    def states(self) -> list[str]: ...

    def table(self) -> str: ...


class Screen:
    """The live table: on a terminal always in the same place; in a log file anew when a run begins or ends, and now and
    then.
    """

    def __init__(self, stream, board: Board):
        self._stream, self._board = stream, board
        self._live = bool(getattr(stream, "isatty", lambda: False)())
        self._lines, self._states, self._at = 0, None, 0.0

    @contextmanager
    def living(self):
        """Shows it by itself, until the end."""
        over = threading.Event()

        def keep_showing():
            self.show()
            while not over.wait(LOOK_SECONDS):
                self.show()

        thread = threading.Thread(target=keep_showing, name="table", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.show(last=True)

    def say(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._lines = 0

    def show(self, last: bool = False) -> None:
        now = time.time()
        states = self._board.states()
        if not (self._live or last or states != self._states or now - self._at > _SAY_SECONDS):
            return
        self._states, self._at = states, now
        text = self._board.table()
        up = f"\x1b[{self._lines}F\x1b[J" if self._live and self._lines else ""
        self._stream.write(f"{up}{text}\n")
        self._stream.flush()
        self._lines = text.count("\n") + 1
