"""The live progress line: step, loss, examples/s, time left.

On a terminal one line is rewritten, in a log file a line is added now and then.
No JAX here: values come as host floats, and the caller says which process prints.
"""

import collections
import contextlib
import math
import shutil
import sys
import threading
import time

_WINDOW_SECONDS = 30.0  # the rate is that of the last half minute: it follows a change, yet does not flicker
_REFRESH_SECONDS = 0.1
_PAUSE_SECONDS = 10.0  # an interval this long, and 20 times the usual one, is a pause (a stopped process, a closed lid)
_PAUSE_FACTOR = 20.0
_MAX_METRICS = 4  # shown; all of them are in the metrics file
_CLEAR_TO_END = "\x1b[K"


def duration(seconds: float) -> str:
    """0:07, 3:25, 2:03:04, 3d 2:03:04."""
    seconds = round(seconds)
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h}:{m:02d}:{s:02d}"
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


def _rate_text(rate):
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class Progress:
    """Progress of a run of `total_steps`, of which `start_step` were done before (a resumed run).

    Time spent in a `phase` (compiling, evaluating, saving) is not training: it counts neither for the speed nor for the
    time left. Neither does the time before the first update, so that a compilation nobody announced spoils nothing.

    Args:
      total_steps: optimizer steps of the whole run.
      start_step: steps already done.
      batch_size: examples per step.
      stream: where to print; None prints nothing (all processes but the first), times are kept all the same.
      live: rewrite one line; None: if the stream is a terminal.
      every_seconds: in a log file, seconds between two lines.
      clock: source of time in seconds.
      unit: what is counted.
      speed: (examples per second) → figures, of which "mfu" is shown.

    Attributes:
      sign: when the run last did something, by the clock; a watchdog looks at it.
      ended: names of the phases that have ended at least once. The first time of each compiles, and may take long.
    """

    def __init__(self, total_steps, start_step=0, batch_size=1, stream=sys.stderr, live=None, *,
                 every_seconds=10.0, clock=time.monotonic, unit="step", speed=None):  # fmt: skip
        self.total_steps = total_steps
        self.step = start_step
        self.batch_size = batch_size
        self._unit = unit
        self._speed = speed
        self.sign = clock()
        self.ended: set[str] = set()
        self._waited = 0.0
        self.excluded: dict[str, float] = {}  # seconds by phase
        self._stream = stream
        self._live = bool(getattr(self._stream, "isatty", lambda: False)()) if live is None else live
        self._every = every_seconds
        self._clock = clock
        self._lock = threading.RLock()  # notes may come from a checkpoint thread
        self._start = clock()
        self._phases: list[str] = []
        self._phase_start = 0.0
        self._phase_detail = ""
        self._metrics: dict = {}
        self._samples: collections.deque = collections.deque()  # (training seconds, step)
        self._paused = 0.0
        self._printed_at = -math.inf
        self._printed = None  # the text of the live line on the screen
        self._closed = False

    @property
    def seconds(self) -> float:
        """Seconds of training so far: all but the phases."""
        now = self._phase_start if self._phases else self._clock()
        return now - self._start - sum(self.excluded.values())

    @property
    def examples_per_second(self) -> float | None:
        """Recent speed; None before the second update."""
        if len(self._samples) < 2:
            return None
        (t0, s0), (t1, s1) = self._samples[0], self._samples[-1]
        return (s1 - s0) * self.batch_size / (t1 - t0) if t1 > t0 and s1 > s0 else None

    @property
    def seconds_left(self) -> float | None:
        """Training seconds to go at the recent speed; None while that is unknown."""
        rate = self.examples_per_second
        return (self.total_steps - self.step) * self.batch_size / rate if rate else None

    @property
    def age(self) -> float:
        """Seconds since it was made."""
        return self._clock() - self._start

    @property
    def doing(self) -> str:
        """The phase, the innermost of several; "" while it trains."""
        with self._lock:
            return self._phases[-1] if self._phases else ""

    def spent(self) -> dict[str, float]:
        """Seconds so far: "training", of these "waiting", and every phase by its name, one that goes on included."""
        with self._lock:
            found = {"training": self.seconds, "waiting": self._waited, **self.excluded}
            if self._phases:
                name = self._phases[0]
                found[name] = found.get(name, 0.0) + self._clock() - self._phase_start
            return found

    @contextlib.contextmanager
    def waiting(self, hidden=lambda: False):
        """Time in which the loop gets its batch. It counts as training; where `hidden()` is true afterwards, as the
        devices were still busy, nobody has waited.
        """
        begun = self._clock()
        yield
        self.sign = self._clock()
        if not hidden():
            self._waited += self.sign - begun

    def update(self, step: int, metrics: dict | None = None) -> None:
        """`step` steps are done. Without metrics (host floats) the line keeps those of before."""
        with self._lock:
            self.step = step
            self.sign = self._clock()
            self._metrics = dict(metrics or self._metrics)
            self._sample(step)
            last = step >= self.total_steps
            interval = _REFRESH_SECONDS if self._live else self._every
            if last or self._clock() - self._printed_at >= interval:
                self._show()

    @contextlib.contextmanager
    def phase(self, name: str):
        """Time that is not training. Gives a function that shows a detail ("384 images") on a terminal.

        Phases may be nested; the time belongs to the outermost.
        """
        with self._lock:
            if not self._phases:
                self._phase_start = self._clock()
            self.sign = self._clock()
            self._phases.append(name)
            self._phase_detail = ""
            self._show()
        try:
            yield self._set_detail
        finally:
            with self._lock:
                self._phases.pop()
                self.ended.add(name)
                self._phase_detail = ""
                self.sign = self._clock()
                if not self._phases:
                    took = self.sign - self._phase_start
                    self.excluded[name] = self.excluded.get(name, 0.0) + took
                    if not self._live and took >= 1:
                        self._print(f"{self._unit} {self.step:,}/{self.total_steps:,}  {name} took {duration(took)}\n")
                if self._live:
                    self._show()

    def note(self, message: str) -> None:
        """A line of its own, above the live one."""
        with self._lock:
            self._print(f"\r{_CLEAR_TO_END}{message}\n" if self._printed is not None else f"{message}\n")
            if self._printed is not None:
                self._printed = None
                self._show()

    def close(self) -> None:
        """Leaves the last state on the screen and ends the line."""
        with self._lock:
            if not self._closed and self._printed is not None:
                self._show()
                self._print("\n")
                self._printed = None
            self._closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def text(self) -> str:
        """The line as it stands."""
        share = self.step / self.total_steps if self.total_steps else 1.0
        parts = [f"{self._unit} {self.step:,}/{self.total_steps:,}", f"{math.floor(100 * share)}%"]
        shown = sorted(self._metrics, key=lambda name: name != "loss")[
            :_MAX_METRICS
        ]  # the loss first, else as they come
        parts += [f"{name} {_value(self._metrics[name])}" for name in shown]
        rate, left = self.examples_per_second, self.seconds_left
        if rate is not None:
            parts.append(f"{_rate_text(rate)} examples/s")
            if self._speed and (mfu := self._speed(rate).get("mfu")):
                parts.append(f"MFU {mfu:.0%}")
        if left is not None and self.step < self.total_steps:
            parts.append(f"{duration(left)} left")
        if self._phases:
            parts.append(f"[{self._phases[-1]}{' ' if self._phase_detail else ''}{self._phase_detail}]")
        return "  ".join(parts)

    def _sample(self, step):
        samples, now = self._samples, self.seconds - self._paused
        if len(samples) >= 5:
            # The newest interval counts as a pause if nothing in the window comes near it.
            usual = (samples[-1][0] - samples[0][0]) / max(1, samples[-1][1] - samples[0][1])
            expected = usual * max(1, step - samples[-1][1])
            gap = now - samples[-1][0]
            if gap > max(_PAUSE_SECONDS, _PAUSE_FACTOR * expected):
                self._paused += gap - expected
                now -= gap - expected
        samples.append((now, step))
        while len(samples) > 5 and now - samples[1][0] >= _WINDOW_SECONDS:
            samples.popleft()

    def _set_detail(self, detail) -> None:
        with self._lock:
            self.sign = self._clock()
            self._phase_detail = str(detail)
            if self._live and self._clock() - self._printed_at >= _REFRESH_SECONDS:
                self._show()

    def _show(self):
        if self._closed:
            return
        self._printed_at = self._clock()
        text = self.text()
        if not self._live:
            self._print(text + "\n")
            return
        text = _fit(text, shutil.get_terminal_size().columns - 1)
        if text != self._printed:
            # Written over the old text, then cleared behind: clearing first would flicker.
            self._print(f"\r{text}{_CLEAR_TO_END}")
            self._printed = text

    def _print(self, text):
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


def _value(value):
    return f"{value:,}" if isinstance(value, int) else f"{float(value):.4g}"


def _fit(text, width):
    """A line that does not wrap: metrics in the middle give way first, for step, speed and time left matter most."""
    parts = text.split("  ")
    while len("  ".join(parts)) > width and len(parts) > 4:
        metrics = [i for i, p in enumerate(parts) if i > 2 and not p.endswith(("examples/s", "left", "]"))]
        if not metrics:
            break
        del parts[metrics[-1]]
    return "  ".join(parts)[:width]
