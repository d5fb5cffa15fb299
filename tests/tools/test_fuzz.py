"""A few damaged inputs of each parser that tools/fuzz.py tries at length."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("fuzz")


def targets():
    import sys

    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module("fuzz_targets").TARGETS
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.mark.filterwarnings("ignore")  # libraries remark on damaged files
@pytest.mark.parametrize("name", targets())
def test_a_damaged_input_is_refused_in_one_line(fuzz, tmp_path, name):
    counts = fuzz.explore(name, tmp_path, inputs=60)
    assert counts["inputs"] >= 60
    assert counts["refused"] > 0 or name == "log"  # of which torn lines are left out
