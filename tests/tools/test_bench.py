"""tools/bench.py runs, and compares what it says it compares."""

import importlib
import json
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bench")


@pytest.mark.slow
def test_decoding_is_held_against_one_pass_of_the_same_batch(bench, capsys):
    arguments = ["decode", "--images", "8", "--steps", "3", "--repeats", "2", "--config"]
    assert bench.main([*arguments, str(ROOT / "configs" / "smoke.py"), "--config.model.width=16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["config"], found["images"], found["steps"]) == ("smoke", 8, 3)
    seconds = found["seconds"]
    assert found["decode_in_forwards"] == pytest.approx(seconds["decode"] / seconds["forward"], rel=0.05)
    assert found["with_encoder_in_forwards"] > found["decode_in_forwards"]


def test_the_first_call_is_not_timed_and_the_least_of_the_others_counts(bench):
    waits = iter([0.2, 0.03, 0.001, 0.05])
    assert 0.001 <= bench.least_seconds({"part": lambda: time.sleep(next(waits))}, 3)["part"] < 0.03


def test_what_is_not_an_option_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["decode", "--image=3"])
    assert "unknown" in capsys.readouterr().err
