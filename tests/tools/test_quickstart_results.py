"""`make quickstart` leaves one file of results for both of its halves."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("quickstart_results")


def test_results_of_both_halves_are_in_one_file(program, tmp_path, capsys):
    halves = {
        "tokenizer": {"psnr": 28.4, "scenes_all_correct": 0.97, "train_seconds": 130.0},
        "transformer": {"t2i_all_correct": 0.5, "caption_all_correct": 0.61, "train_seconds": 600.0},
    }
    for name, results in halves.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    assert program.main(tmp_path) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == {
        **halves["tokenizer"],
        "t2i_all_correct": 0.5,
        "caption_all_correct": 0.61,
        "transformer_train_seconds": 600.0,
    }
    shown = capsys.readouterr().out
    assert "t2i_all_correct 0.5" in shown and str(tmp_path / "transformer" / "text_to_image.png") in shown


def test_a_half_that_is_missing_is_one_line(program, tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "results.json").write_text("{}")
    assert program.main(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "transformer/results.json missing" in error and "tokenizer/results" not in error


def test_make_quickstart_goes_the_whole_way_in_order(tmp_path):
    shown = subprocess.run(
        ["make", "-n", "quickstart", f"WORKDIR={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    steps = [line.split()[1] for line in shown.splitlines() if "bin/ddt-jax" in line]
    assert steps == ["train", "evaluate", "tokenize", "tokenize", "train", "evaluate"]
    # The measurement of the whole way makes as many codes.
    counts = [line.split("--records ")[1] for line in shown.replace("\\\n", " ").splitlines() if "--records" in line]
    measured = (ROOT / "tools" / "soak_codes.py").read_text()
    assert all(f"{int(count):_}" in measured or count in measured for count in counts) and len(counts) == 2
