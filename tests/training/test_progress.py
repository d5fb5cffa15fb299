import io
import re

import pytest

from ddt_jax.training import progress
from ddt_jax.training.progress import Progress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Screen(io.StringIO):
    """A terminal of one row and what scrolled off it; understands carriage return, newline and clear-to-end."""

    def __init__(self, width=80):
        super().__init__()
        self.width, self.rows, self.row, self.column, self.shortest = width, [], "", 0, None

    def isatty(self):
        return True

    def write(self, text):
        for part in re.findall(r"\x1b\[K|\r|\n|[^\x1b\r\n]+", text):
            if part == "\x1b[K":
                self.row = self.row[: self.column]
            elif part == "\r":
                self.column = 0
            elif part == "\n":
                self.rows.append(self.row)
                self.row, self.column = "", 0
            else:
                self.row = self.row[: self.column] + part + self.row[self.column + len(part) :]
                self.column += len(part)
                assert self.column < self.width, f"wraps: {self.row!r}"
        return len(text)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return Screen()


def _run(p, clock, start, stop, seconds_per_step=0.5, **metrics):
    for step in range(start + 1, stop + 1):
        clock.now += seconds_per_step
        p.update(step, metrics)


def test_line_shows_step_loss_speed_and_time_left(clock, screen):
    p = Progress(300, batch_size=32, stream=screen, clock=clock)
    _run(p, clock, 0, 100, loss=0.123456)
    assert screen.row == "step 100/300  33%  loss 0.1235  64 examples/s  1:40 left"
    assert screen.rows == []


def test_time_left_after_resume_counts_only_the_steps_of_this_run(clock, screen):
    p = Progress(1000, start_step=900, batch_size=4, stream=screen, clock=clock)
    assert p.text().startswith("step 900/1,000  90%")
    _run(p, clock, 900, 950)
    assert p.examples_per_second == pytest.approx(8)
    assert p.seconds_left == pytest.approx(25)


def test_phases_count_neither_for_speed_nor_for_time_left(clock, screen):
    p = Progress(200, batch_size=10, stream=screen, clock=clock)
    with p.phase("compiling"):
        clock.now += 60
    _run(p, clock, 0, 50)
    with p.phase("evaluating"):
        clock.now += 40
        with p.phase("saving"):
            assert "[saving]" in p.text()
            clock.now += 5
        assert "[evaluating]" in p.text()
        assert p.seconds == pytest.approx(25)  # stands still inside a phase
    _run(p, clock, 50, 100)
    assert p.examples_per_second == pytest.approx(20)
    assert p.seconds_left == pytest.approx(50)
    assert p.seconds == pytest.approx(50)
    assert p.excluded == pytest.approx({"compiling": 60, "evaluating": 45})


def test_all_seconds_are_accounted_for(clock):
    p = Progress(10, stream=None, clock=clock)
    with p.waiting():
        clock.now += 3
    with p.waiting(hidden=lambda: True):  # the devices were busy all the while
        clock.now += 2
    with p.phase("compiling"):
        clock.now += 20
        assert p.spent() == {"training": 5, "waiting": 3, "compiling": 20} and p.doing == "compiling"
        with p.phase("saving"):
            clock.now += 1
            assert p.doing == "saving" and p.ended == set()
        assert p.ended == {"saving"}
    _run(p, clock, 0, 4, 0.25)
    assert p.spent() == {"training": 6, "waiting": 3, "compiling": 21} and p.doing == "" and p.age == 27


def test_mfu_is_shown_where_it_is_known(clock, screen):
    p = Progress(300, batch_size=32, stream=screen, clock=clock, speed=lambda rate: {"mfu": rate / 160, "other": 1.0})
    _run(p, clock, 0, 100, loss=0.5)
    assert screen.row == "step 100/300  33%  loss 0.5  64 examples/s  MFU 40%  1:40 left"


def test_an_unannounced_compilation_in_the_first_step_does_not_spoil_the_speed(clock, screen):
    p = Progress(100, stream=screen, clock=clock)
    clock.now += 120
    p.update(1)
    assert p.examples_per_second is None and p.seconds_left is None
    _run(p, clock, 1, 11)
    assert p.examples_per_second == pytest.approx(2)


def test_a_stopped_process_does_not_spoil_the_time_left(clock, screen):
    p = Progress(1000, stream=screen, clock=clock)
    _run(p, clock, 0, 100)
    clock.now += 3600
    _run(p, clock, 100, 110)
    assert p.seconds_left == pytest.approx(445, rel=0.02)


def test_speed_follows_a_real_slow_down(clock, screen):
    p = Progress(10_000, stream=screen, clock=clock)
    _run(p, clock, 0, 200, 0.5)
    _run(p, clock, 200, 240, 2.0)
    assert p.examples_per_second == pytest.approx(0.5, rel=0.05)


def test_a_step_longer_than_the_window_still_has_a_speed(clock, screen):
    p = Progress(100, batch_size=100, stream=screen, clock=clock)
    _run(p, clock, 0, 20, 300.0)
    assert p.examples_per_second == pytest.approx(1 / 3)
    assert p.seconds_left == pytest.approx(80 * 300)


def test_a_shorter_line_leaves_nothing_of_a_longer_one(clock, screen):
    p = Progress(100, stream=screen, clock=clock)
    p.update(1, {"loss": 0.123456})
    clock.now += 1
    p.update(2, {"loss": 1.0})
    assert screen.row == "step 2/100  2%  loss 1  1 examples/s  1:38 left"


def test_line_is_redrawn_at_most_ten_times_a_second_and_at_the_end(clock, screen, monkeypatch):
    p = Progress(1000, stream=screen, clock=clock)
    drawn = []
    monkeypatch.setattr(screen, "write", drawn.append)
    _run(p, clock, 0, 999, 0.001)
    assert 9 <= len(drawn) <= 11
    _run(p, clock, 999, 1000, 0.001)
    assert "1,000/1,000" in drawn[-1]


def test_note_stands_above_the_live_line(clock, screen):
    p = Progress(100, stream=screen, clock=clock)
    p.update(1, {"loss": 2.0})
    p.note("data: 3 images redrawn")
    assert screen.rows == ["data: 3 images redrawn"]
    assert screen.row == "step 1/100  1%  loss 2"
    p.close()
    p.close()
    assert screen.rows == ["data: 3 images redrawn", "step 1/100  1%  loss 2"] and screen.row == ""


def test_a_narrow_terminal_loses_metrics_before_the_time_left(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "62")
    screen = Screen(width=62)
    p = Progress(5000, batch_size=32, stream=screen, clock=clock)
    metrics = {"loss": 0.1, "grad_norm": 0.2, "perplexity": 0.3, "commitment": 0.4}
    _run(p, clock, 0, 1000, 0.2, **metrics)
    assert screen.row == "step 1,000/5,000  20%  loss 0.1  160 examples/s  13:20 left"
    with p.phase("evaluating") as detail:
        clock.now += 1
        detail("384 images, and more text than there is room for on any such line")  # Screen asserts that it fits
    assert "[evaluating" not in screen.row


def test_phase_detail_is_live(clock, screen):
    p = Progress(100, stream=screen, clock=clock)
    with p.phase("evaluating") as detail:
        clock.now += 1
        detail("384 images")
        assert screen.row == "step 0/100  0%  [evaluating 384 images]"


def test_phase_ends_when_its_body_raises(clock, screen):
    p = Progress(100, stream=screen, clock=clock)
    with pytest.raises(RuntimeError), p.phase("saving"):
        clock.now += 3
        raise RuntimeError
    assert p.excluded == {"saving": 3} and "saving" not in p.text()


def test_log_file_gets_whole_lines_now_and_then_and_no_control_characters(clock):
    stream = io.StringIO()
    with Progress(100, batch_size=8, stream=stream, clock=clock, every_seconds=20) as p:
        with p.phase("compiling"):
            clock.now += 75
        _run(p, clock, 0, 100, loss=0.5)
        p.note("saved")
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["step 0/100  0%  [compiling]", "step 0/100  compiling took 1:15"]
    assert [int(re.match(r"step (\d+)/100 ", line)[1]) for line in lines[2:-1]] == [1, 41, 81, 100]
    assert lines[-2] == "step 100/100  100%  loss 0.5  16 examples/s"
    assert lines[-1] == "saved"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_other_processes_print_nothing_and_keep_the_times(clock, capfd):
    p = Progress(10, stream=None, clock=clock)
    with p.phase("compiling"):
        clock.now += 5
    _run(p, clock, 0, 10)
    p.note("x")
    p.close()
    assert p.excluded == {"compiling": 5} and p.seconds == pytest.approx(5)
    assert capfd.readouterr() == ("", "")


def test_loss_comes_first_and_metrics_stay_until_there_are_new_ones(clock, screen):
    p = Progress(10, stream=screen, clock=clock)
    p.update(1, {"a": 1.5, "b": 2.5, "loss": 3.5, "c": 4.5, "d": 5.5})
    assert screen.row == "step 1/10  10%  loss 3.5  a 1.5  b 2.5  c 4.5"
    clock.now += 1
    p.update(2)
    assert screen.row.startswith("step 2/10  20%  loss 3.5  a 1.5")


def test_a_non_finite_loss_is_shown(clock, screen):
    p = Progress(10, stream=screen, clock=clock)
    p.update(1, {"loss": float("nan"), "skipped": 1234})
    assert screen.row == "step 1/10  10%  loss nan  skipped 1,234"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (7384, "2:03:04"), (266_584, "3d 2:03:04")],
)
def test_duration(seconds, text):
    assert progress.duration(seconds) == text
