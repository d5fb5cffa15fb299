"""Where the time of a run went: over restarts nothing is counted twice, and what is done again is lost once."""

import json

import pytest

from ddt_jax.training import goodput
from ddt_jax.training.goodput import Goodput


class Try:
    """A try whose clock the test turns."""

    def __init__(self, workdir, start, init=2.0):
        self.spent = {"training": 0.0, "waiting": 0.0}
        self.accounts = Goodput(workdir, start, init, lambda: dict(self.spent))

    def does(self, **seconds):
        for name, value in seconds.items():
            self.spent[name] = self.spent.get(name, 0.0) + value
        return self.accounts


def test_every_second_has_its_kind(tmp_path):
    one = Try(tmp_path, 0)
    accounts = one.does(compiling=30, training=50, waiting=8, saving=4, evaluating=5, rechecking=1, profiling=2)
    expected = {"init": 2, "compile": 30, "step": 42, "data": 8, "checkpoint": 4, "evaluation": 5, "other": 3}
    assert accounts.seconds() == expected and sum(expected.values()) == 2 + 30 + 50 + 4 + 5 + 1 + 2
    assert accounts.share() == pytest.approx(42 / 94)
    accounts.figures = {"mfu": 0.5}
    accounts.write()
    assert goodput.read(tmp_path) == {"goodput": round(42 / 94, 4), "seconds": expected, "tries": 1, "mfu": 0.5}


def test_what_a_killed_try_did_after_the_checkpoint_that_counts_is_lost(tmp_path):
    one = Try(tmp_path, 0)
    one.does(compiling=10, training=100).saved(100)
    one.does(training=100, saving=1).saved(200)
    one.does(training=30, evaluating=3).write()  # and then it is killed
    two = Try(tmp_path, 200)
    assert two.accounts.seconds() == {"init": 2 + 2, "compile": 10, "step": 200, "checkpoint": 1, "lost": 33}
    # The checkpoint of step 200 is found damaged: one goes on from the one before it.
    three = Try(tmp_path, 100)
    assert three.accounts.seconds() == {"init": 2 + 2, "compile": 10, "step": 100, "lost": 134}
    three.does(training=20).write()  # killed before it has saved anything: all of it was in vain
    four = Try(tmp_path, 100, init=1.0)
    assert four.accounts.seconds() == {"init": 2 + 1, "compile": 10, "step": 100, "lost": 134 + 2 + 20}
    assert four.accounts.report()["tries"] == 3


def test_a_try_that_ended_in_good_order_loses_nothing(tmp_path):
    one = Try(tmp_path, 0)
    one.does(training=10, saving=1).saved(10)
    one.does(training=0.5).saved(10)  # closing; its end
    one.accounts.write()
    assert Try(tmp_path, 10).accounts.seconds() == {"init": 4, "step": 10.5, "checkpoint": 1}


def test_many_checkpoints_do_not_make_a_large_file(tmp_path):
    one = Try(tmp_path, 0)
    for step in range(1, 1000):
        one.does(training=1).saved(step)
    one.accounts.write()
    assert (tmp_path / goodput.FILE).stat().st_size < 10_000
    assert Try(tmp_path, 999).accounts.seconds() == {"init": 4, "step": 999}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "{}", '{"seconds": 1, "tries": 1, "before": 1, "try": [], "saved": {"x": 1}}', "\0" * 50],
)
def test_a_damaged_file_begins_the_accounts_anew(tmp_path, content):
    (tmp_path / goodput.FILE).write_text(content)
    assert Try(tmp_path, 5).accounts.report() == {"goodput": 0.0, "seconds": {"init": 2.0}, "tries": 1}


def test_the_log_gets_shares_and_figures():
    seconds = {"step": 90.0, "compile": 8.0, "lost": 2.0}
    report = {"goodput": 0.9, "seconds": seconds, "tries": 2, "mfu": 0.4321, "tokens_per_second_per_chip": 12345.6}
    report |= {"peak_device_bytes": 3 << 29}
    assert goodput.lines(report) == [
        "goodput 90.0% of 1:40 in 2 tries: step 90.0%, compile 8.0%, lost 2.0%",
        "speed and memory: 12,345.6 tokens/s/chip, MFU 43.2%, 1.50 GiB of a device at most",
    ]
    assert goodput.lines({"goodput": 0.9, "seconds": seconds, "tries": 1})[1:] == []
    assert json.dumps(report)
