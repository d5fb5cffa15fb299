"""The loop: what is written when, and how it ends."""

import contextlib
import io
import itertools
import os
import signal
import time

import jax
import numpy as np
import pytest

from ddt_jax import experiment, settings
from ddt_jax.errors import UserError
from ddt_jax.training import loop
from ddt_jax.training.checkpoint import Checkpoints
from ddt_jax.training.notices import Notices
from ddt_jax.training.profiling import Profiler
from ddt_jax.training.progress import Progress

TRAIN = settings.Train(steps=10, batch_size=8, log_every=3, checkpoint_every=4)


@pytest.fixture(scope="module")
def built():
    s = settings.Experiment(
        model=settings.LinearTokenizer(quantizer=settings.Quantizer(normalize_input="none", codebook_size=32)),
        data=settings.Data(image_size=8),
        train=TRAIN,
    )
    return experiment.build(s)


class Writer:
    def __init__(self):
        self.lines, self.measured = [], []

    def write(self, step, scalars):
        self.lines.append((step, scalars))

    def measure(self, step, scalars):
        self.measured.append((step, scalars))

    def flush(self):
        pass


def batches(start=0, bad=(), before=lambda step: None):
    for step in range(start, 1000):
        before(step)
        image = np.random.default_rng(step).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
        yield {"image": image, "slot": np.arange(8, dtype=np.int32)}


def run(built, tmp_path, *, train=TRAIN, data=None, hooks=(), step_fn=None, watch=loop.Watch()):  # noqa: B008 - frozen
    writer, out = Writer(), io.StringIO()
    points = Checkpoints(tmp_path, train)
    with jax.set_mesh(built.mesh), contextlib.closing(points):
        state = points.restore(built.abstract)
        state = built.init() if state is None else state
        progress = Progress(train.steps, int(state.step), 8, out)
        state, finished = loop.train(
            state,
            step_fn or built.step,
            data or batches(int(state.step)),
            mesh=built.mesh,
            train=train,
            checkpoints=points,
            config={},
            progress=progress,
            writer=writer,
            hooks=hooks,
            watch=watch,
        )
        progress.close()
        return state, finished, writer.lines, points.steps(), out.getvalue()


def test_lines_are_means_of_whole_windows_and_checkpoints_come_when_due(built, tmp_path):
    state, finished, lines, steps, _ = run(built, tmp_path)
    assert finished and int(state.step) == 10
    assert [step for step, _ in lines] == [3, 6, 9]
    assert steps == [8, 10]
    single = run(built, tmp_path / "b", train=settings.Train(steps=10, batch_size=8, log_every=1, checkpoint_every=0))[
        2
    ]
    for step, line in lines:
        expected = np.mean([values["loss"] for s, values in single if step - 3 < s <= step])
        np.testing.assert_allclose(line["loss"], expected, rtol=1e-6)


def test_hooks_see_the_state_after_their_step(built, tmp_path):
    seen = []

    def call(step, state):
        seen.append((step, int(state.step)))
        return {"figure": 1.0}

    _, _, lines, _, _ = run(built, tmp_path, hooks=(loop.Hook("looking", 5, call),))
    assert seen == [(5, 5)]
    assert (5, {"figure": 1.0}) in lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_next_run_ends_like_an_undisturbed_one(built, tmp_path, number):
    handler = signal.getsignal(number)

    def before(step):
        if step == 5:
            os.kill(os.getpid(), number)

    state, finished, _, steps, out = run(built, tmp_path, data=batches(before=before))
    stopped_at = int(state.step)
    assert not finished and 5 < stopped_at < 10 and steps[-1] == stopped_at
    assert signal.Signals(number).name in out
    assert signal.getsignal(number) is handler
    state, finished, _, _, _ = run(built, tmp_path)
    undisturbed = run(built, tmp_path / "b")[0]
    assert finished
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed)


def test_a_notice_of_the_cloud_saves_like_a_signal(built, tmp_path):
    notices, seen = Notices(lambda name: "TRUE" if seen else "NONE", every=0.001), []

    def before(step):
        if step == 5:
            seen.append(step)
            time.sleep(0.2)  # for the thread that asks

    state, finished, _, steps, out = run(
        built, tmp_path, data=batches(before=before), watch=loop.Watch(notices=notices)
    )
    assert not finished and 5 < int(state.step) < 10 and steps[-1] == int(state.step)
    assert "preempted=TRUE" in out


@pytest.fixture
def unheard():
    """Signals that the loop has not caught, which would have ended the process."""
    found, numbers = [], (signal.SIGTERM, signal.SIGUSR1)
    before = {n: signal.signal(n, lambda number, frame: found.append(number)) for n in numbers}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", ["notice", "signal"])
def test_the_last_save_goes_on_under_a_first_signal_and_a_second_one_ends_it(
    built, tmp_path, monkeypatch, unheard, first
):
    save, seen, raised = Checkpoints.save, [], []
    notices = Notices(lambda name: "TRUE" if seen else "NONE", every=0.001)
    monkeypatch.setattr(signal, "raise_signal", raised.append)

    def before(step):
        if step == 5 and first == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif step == 5:
            seen.append(step)
            time.sleep(0.2)  # for the thread that asks

    def signalled(self, *what):
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # whichever thread receives it, the main one has handled it then
        save(self, *what)

    monkeypatch.setattr(Checkpoints, "save", signalled)
    watch = loop.Watch(notices=notices, profiler=Profiler(tmp_path))
    train = settings.Train(steps=10, batch_size=8, checkpoint_every=0)
    state, finished, _, steps, out = run(built, tmp_path, train=train, data=batches(before=before), watch=watch)
    assert not finished and steps == [int(state.step)] and "SIGTERM" in out
    assert unheard == [] and raised == ([signal.SIGTERM] if first == "signal" else [])


def test_logs_are_written_out_and_a_profile_has_ended_before_a_save(built, tmp_path, monkeypatch):
    seen, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *what: seen.append("save") or save(*what))
    monkeypatch.setattr(Writer, "flush", lambda self: seen.append("lines"))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    watch = loop.Watch(flush=lambda: seen.append("steps"), profiler=Profiler(tmp_path, first=9, steps=5))
    run(built, tmp_path, watch=watch)
    written = ["lines", "steps", "save"]
    assert seen == [*written, *written, "start", "stop", *written]  # after steps 4, 8 and 10


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    raised, stop = [], loop.StopRequest()
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    with stop.listening(lambda line: None):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.event.wait(5) and raised == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_bad_steps_are_told_and_too_many_in_a_row_end_the_run(built, tmp_path):
    def poisoned(state, batch):
        state, metrics = built.step(state, batch)
        in_a_row = float(state.step) - 3
        bad = in_a_row > 0
        return state, {
            **metrics,
            "bad_step": bad,
            "bad_in_a_row": max(in_a_row, 0.0),
            "loss": np.nan if bad else metrics["loss"],
        }

    train = settings.Train(steps=10, batch_size=8, log_every=1, checkpoint_every=2, max_bad_steps=4)
    with pytest.raises(UserError, match="4 steps in a row up to step 7 were not finite"):
        run(built, tmp_path, train=train, step_fn=poisoned)
    recorded, train = [], settings.Train(steps=6, batch_size=8, log_every=2)
    watch = loop.Watch(
        keep_bad=lambda step, batch: f"kept {step} {batch['image'].sum()}",
        record=lambda step, values: recorded.append((step, values["loss"])),
    )
    state, _, lines, _, out = run(built, tmp_path / "b", train=train, step_fn=poisoned, watch=watch)
    assert out.count("not finite") == 3
    for step, batch in zip((4, 5, 6), list(itertools.islice(batches(3), 3)), strict=True):
        assert f"kept {step} {batch['image'].sum()}" in out  # its own batch, not the one that came next
    assert [step for step, _ in recorded] == [1, 2, 3, 4, 5, 6] and np.isnan([v for _, v in recorded[3:]]).all()
    assert all(np.isfinite(values["loss"]) for _, values in lines)


class Redo:
    """Counts, and finds a difference at a step."""

    def __init__(self, wrong):
        self.wrong, self.began, self.ended = wrong, [], []

    def begin(self, state, batch):
        self.began.append(int(state.step))
        return {"x": "1"}

    def end(self, step, again, result):
        self.ended.append(step)
        if step == self.wrong:
            raise UserError(f"train: step {step} gives other bits")


def test_every_so_many_steps_are_repeated_from_the_state_before_them(built, tmp_path):
    redo, train = Redo(wrong=8), settings.Train(steps=10, batch_size=8, checkpoint_every=4, recheck_every=4)
    with pytest.raises(UserError, match="step 8 gives other bits"):
        run(built, tmp_path, train=train, watch=loop.Watch(recheck=redo))
    assert (redo.began, redo.ended) == ([3, 7], [4, 8])
    assert Checkpoints(tmp_path, train, read_only=True).steps() == [4]  # nothing of the doubtful state was saved


def test_a_save_that_failed_in_the_background_ends_the_run_before_the_next_step(built, tmp_path, monkeypatch):
    def check(self):
        if self.steps():
            raise UserError("checkpoint: cannot be written")

    monkeypatch.setattr(Checkpoints, "check", check)
    seen = []
    train = settings.Train(steps=10, batch_size=8, checkpoint_every=2)
    watch = loop.Watch(record=lambda step, values: seen.append(step))

    def slowly(step):
        while step == 2 and not (tmp_path / "checkpoints" / "2").exists():  # the batch of the third step
            time.sleep(0.01)

    with pytest.raises(UserError, match="cannot be written"):
        run(built, tmp_path, train=train, data=batches(before=slowly), watch=watch)
    assert seen == [1, 2]


def test_what_watches_is_told_of_means_saves_and_windows(built, tmp_path, monkeypatch):
    seen, saved, ended = [], [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(("stop",)))

    def before(step):  # the batch of the next step is asked for
        seen.append(step)
        time.sleep(0.2 if step == 5 else 0)
        if step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)

    handler, writer, out = signal.getsignal(signal.SIGUSR1), Writer(), io.StringIO()
    progress = Progress(TRAIN.steps, 0, 8, out)
    measured = lambda: ended.append(sorted(progress.ended)) or {"speed": len(ended)}  # noqa: E731
    watch = loop.Watch(measured=measured, saved=saved.append, profiler=Profiler(tmp_path, first=3, steps=2))
    with jax.set_mesh(built.mesh), contextlib.closing(Checkpoints(tmp_path, TRAIN)) as points:
        how = {"mesh": built.mesh, "train": TRAIN, "checkpoints": points, "config": {}, "progress": progress}
        loop.train(built.init(), built.step, batches(before=before), **how, writer=writer, watch=watch)

    assert writer.measured == [(3, {"speed": 1}), (6, {"speed": 2}), (9, {"speed": 3})]
    assert saved == [4, 8, 10]
    spent = progress.spent()
    assert 0.2 <= spent["waiting"] < spent["training"] and {"compiling", "profiling", "saving"} < set(spent)
    assert "compiling" in ended[0] and "saving" not in ended[0]

    three, seven = (str(tmp_path / "profiles" / step) for step in ("3", "7"))
    # Batch 2 is for step 3: the window has steps 3 and 4. The signal comes with the batch for step 7.
    assert seen == [0, 1, 2, ("start", three), 3, ("stop",), 4, 5, 6, ("start", seven), 7, ("stop",), 8, 9]
    assert f"profile: {three}\n" in out.getvalue() and f"profile: {seven}\n" in out.getvalue()
    assert signal.getsignal(signal.SIGUSR1) is handler
