"""The watchdog barks at a run that stands still, and at nothing else."""

import threading

import pytest

from ddt_jax.training import watchdog
from ddt_jax.training.progress import Progress
from ddt_jax.training.watchdog import EXIT_SILENT, Silence, Watchdog


class Left(list):
    """Codes with which it would have left; an event for the first."""

    def __init__(self):
        super().__init__()
        self.event = threading.Event()

    def __call__(self, code):
        self.append(code)
        self.event.set()


@pytest.fixture
def left():
    return Left()


def stand_still_in_here(event):
    event.wait(20)


def test_it_leaves_the_stacks_of_all_threads_and_a_code(tmp_path, left, capfd):
    progress, release = Progress(10, 4, stream=None), threading.Event()
    stuck = threading.Thread(target=stand_still_in_here, args=(release,))
    stuck.start()
    with Watchdog(tmp_path, progress, 0.2, process=3, leave=left):
        assert left.event.wait(20)
    release.set()
    stuck.join()
    assert left == [EXIT_SILENT] and EXIT_SILENT not in (0, 1, 2, 3, 75, 76)
    said, kept = capfd.readouterr().err, (tmp_path / watchdog.FOLDER / "3.txt").read_text()
    for text in (said, kept):
        assert "stand_still_in_here" in text and "test_it_leaves_the_stacks" in text
        assert "process 3 gave no sign of life for 0 s after step 4 (train.silence_limit=0.2)" in text


class Clock:
    """Of a run and of who looks at it."""

    def __init__(self):
        self.now = 100.0
        self.progress = Progress(1000, stream=None, clock=lambda: self.now)
        self.silence = Silence(self.progress, 10.0, self.now)

    def passes(self, seconds, looks=1):
        for _ in range(looks):
            self.now += seconds
            found = self.silence.look(self.now)
        return found


def test_signs_of_life_end_a_silence():
    clock = Clock()
    assert clock.passes(5, looks=3) == 15
    clock.progress.update(1)
    assert clock.passes(5) == 0 and clock.passes(5) == 5
    with clock.progress.waiting():
        assert clock.passes(5) == 10
    assert clock.passes(5) == 0 and clock.passes(5) == 5
    clock.progress.ended.add("evaluating")
    with clock.progress.phase("evaluating") as detail:
        assert clock.passes(5) == 0 and clock.passes(5, looks=2) == 10
        detail("384 images")
        assert clock.passes(5) == 0 and clock.passes(5) == 5
    assert clock.passes(5) == 0 and clock.passes(5) == 5


def test_what_is_done_for_the_first_time_may_take_long_and_later_not():
    clock = Clock()
    with clock.progress.phase("compiling"):
        assert clock.passes(5, looks=1000) == 0
    with clock.progress.phase("saving"), clock.progress.phase("compiling"):
        assert clock.passes(5) == 0 and clock.passes(5, looks=4) == 20


def test_a_process_that_was_stopped_has_not_been_silent():
    clock = Clock()
    assert clock.passes(5) == 5
    assert clock.passes(3600) == 15  # one look in an hour: it did not run
    assert clock.passes(5) == 20


def test_without_a_limit_nobody_watches(tmp_path, left):
    with Watchdog(tmp_path, Progress(10, stream=None), 0, leave=left):
        assert not [t for t in threading.enumerate() if t.name == "watchdog"]
