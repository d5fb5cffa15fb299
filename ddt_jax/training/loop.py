"""The train loop. One for every system; it knows steps, not models.

The order inside a step is fixed, also across a restart: dispatch the step, then read the metrics of the one before (so
the device never waits for the host), then what is due after it: log, evaluation, checkpoint, stop.
"""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.training.checkpoint import Checkpoints
from ddt_jax.training.notices import Notices
from ddt_jax.training.profiling import Profiler
from ddt_jax.training.progress import Progress
from ddt_jax.training.recheck import Recheck
from ddt_jax.training.state import TrainState
from ddt_jax.training.tokenizer_step import STOP

EXIT_STOPPED = 75  # the run was asked to stop, has saved, and goes on with the same command (EX_TEMPFAIL)


@dataclass
class Hook:
    """Something done every so many steps with the state after the step: evaluation, with a picture for the log.

    Attributes:
      every: steps between calls.
      call: (step, state) → scalars for the log.
    """

    name: str
    every: int
    call: Callable[[int, TrainState], dict[str, float]]


@dataclass(frozen=True)
class Watch:
    """What looks at every step, beside the log; each part may be left out.

    Attributes:
      keep_bad: (step, host batch) of a skipped step → where its batch is found again, for the log.
      record: takes (step, metrics as floats) of every step, in order.
      flush: writes out what `record` has taken, before a checkpoint.
      measured: → figures of the machine for the log, whenever a mean is written.
      saved: takes the step of every checkpoint that has been begun.
      profiler: takes profiles of some steps.
      recheck: repeats every `train.recheck_every`th step.
      notices: of the cloud, that this machine will be taken away.
    """

    keep_bad: Callable[[int, dict], str] = lambda step, batch: ""
    record: Callable[[int, dict], None] = lambda step, values: None
    flush: Callable[[], None] = lambda: None
    measured: Callable[[], dict[str, float]] = dict
    saved: Callable[[int], None] = lambda step: None
    profiler: Profiler | None = None
    recheck: Recheck | None = None
    notices: Notices | None = None


@dataclass
class StopRequest:
    """Set by SIGINT and SIGTERM, or a notice of the cloud.

    All hosts learn of it through the step itself, so they stop after the same one.
    """

    event: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def listening(self, note: Callable[[str], None]):
        """Catches the signals; the second one ends the process at once."""
        caught = []  # a signal that follows a notice is the first one

        def handle(number, frame):
            if caught:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            caught.append(number)
            self.event.set()
            note(f"{signal.Signals(number).name}: saving after this step; once more to quit at once")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, h in before.items():
                signal.signal(s, h)


def train(
    state: TrainState,
    step_fn: Callable[[TrainState, dict], tuple[TrainState, dict]],
    batches: Iterator[dict],
    *,
    mesh: Any,
    train: settings.Train,
    checkpoints: Checkpoints,
    config: dict,
    progress: Progress,
    writer: Any,
    hooks: tuple[Hook, ...] = (),
    watch: Watch = Watch(),  # noqa: B008 - frozen
) -> tuple[TrainState, bool]:
    """Trains from `state.step` to `train.steps`.

    Args:
      batches: host-local batches, the first for `state.step`.
      config: the resolved config tree; goes into every checkpoint.

    Returns:
      (state, finished); not finished if a signal ended the run, which has then been saved.

    Raises:
      UserError: after `train.max_bad_steps` skipped steps in a row, when a checkpoint cannot be written, or when a
        repeated step gives other bits.
    """
    done = int(state.step)
    stop, log, pending, asked = StopRequest(), _Log(train, writer, progress, watch), deque(), False
    profiler = watch.profiler or Profiler()
    noticed = watch.notices.listening(stop.event, progress.note) if watch.notices else nullcontext()

    def keep():
        writer.flush()  # a run goes on behind its checkpoint: what the logs lack before it, they would lack for good
        watch.flush()
        checkpoints.save(state, config, log.figures)

    # Signals are heard until the last save, which may be the longest, is done; a profile's window ends before it.
    with stop.listening(progress.note), noticed, profiler.listening(progress), ExitStack() as window:
        window.enter_context(profiler.listening(progress))
        while done < train.steps and not asked:
            checkpoints.check()
            with progress.waiting(hidden=lambda: not state.step.is_ready()):  # noqa: B023 - called at once
                batch = next(batches)
            placed, again = meshes.put_batch(batch, mesh), None
            placed[STOP] = meshes.put_flag(stop.event.is_set(), mesh)
            if watch.recheck and train.recheck_every and (done + 1) % train.recheck_every == 0:
                with progress.phase("rechecking"):
                    again = watch.recheck.begin(state, placed)
            profiler.before(done + 1)
            with progress.phase("compiling") if not log.started else nullcontext():
                state, metrics = step_fn(state, placed)
                if not log.started:
                    jax.block_until_ready(metrics)  # so that the time to compile is not taken for that of a step
                    log.started = True
            done += 1
            profiler.after(done, metrics)
            if again:
                watch.recheck.end(done, again, (state, metrics))
            pending.append((done, metrics, batch))
            due = [h for h in hooks if h.every and done % h.every == 0 and done < train.steps]
            save = train.checkpoint_every and done % train.checkpoint_every == 0 and done < train.steps
            while len(pending) > (0 if due or save or done == train.steps else 1):
                asked |= log.absorb(*pending.popleft())
            for hook in due:
                with progress.phase(hook.name):
                    found = hook.call(done, state)
                log.figures |= found
                writer.write(done, found)
            if save:
                with progress.phase("saving"):
                    keep()
                watch.saved(done)
        window.close()
        for absorbed in pending:
            log.absorb(*absorbed)
        with progress.phase("saving"):
            keep()
            checkpoints.wait()
        watch.saved(done)
    return state, done >= train.steps


class _Log:
    """Reads metrics, watches for bad steps, and writes the mean of every `log_every` steps."""

    def __init__(self, train, writer, progress, watch):
        self._train, self._writer, self._progress, self._watch = train, writer, progress, watch
        self._sums, self._n = {}, 0
        self.figures = {}  # the last ones written, by name
        self.started = False

    def absorb(self, step: int, metrics: dict, batch: dict) -> bool:
        """Takes the metrics of a step that is done or about to be; True if a host was asked to stop."""
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        asked = values.pop(STOP) > 0
        self._watch.record(step, values)
        if values["bad_step"]:
            spike = values.get("spike")
            what = "is far above the last ones (optimizer.spike_skip)" if spike else "is not finite"
            where = self._watch.keep_bad(step, batch)
            self._progress.note(
                f"step {step}: loss or gradient {what}; skipped, nothing but the counter has changed; {where}"
            )
        if values["bad_in_a_row"] >= self._train.max_bad_steps:
            raise UserError(
                f"train: {self._train.max_bad_steps} steps in a row up to step {step} were not finite, or spikes "
                "(train.max_bad_steps); "
                "the last good state is the newest checkpoint; lower optimizer.lr or look at the data"
            )
        if not values["bad_step"]:
            self._n += 1
            for k, v in values.items():
                self._sums[k] = self._sums.get(k, 0.0) + v
        if step % self._train.log_every == 0 and self._n:
            mean = {k: v / self._n for k, v in self._sums.items()}
            self._sums, self._n = {}, 0
            self.figures |= mean
            self._writer.write(step, mean)
            self._progress.update(step, {"loss": mean["loss"]})
            self._writer.measure(step, self._watch.measured())
        else:
            self._progress.update(step)
        return asked
