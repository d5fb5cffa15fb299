"""tools/chaos.py hurts a run, lets it go on, and notices when that does not end well; a small program stands in."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Counts to 120, keeps every tenth count with a list of its files, and goes on from the newest that is what it was; with
# BLIND it believes whatever is there, with FORGETS it begins anew, and after a fault it ends otherwise with WRONG.
STAND_IN = """
import json, os, pathlib, sys, time
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
kept, log = workdir / "checkpoints", workdir / "metrics.jsonl"
if sys.argv[1] == "checkpoint":
    print((workdir / "digest").read_text())
    sys.exit()
kept.mkdir(parents=True, exist_ok=True)
say = lambda text: print(text, file=sys.stderr, flush=True)
step = 0
for path in sorted(kept.iterdir(), key=lambda p: -int(p.name) if p.name.isdigit() else 0):
    if path.name.isdigit() and "FORGETS" not in os.environ:
        if "BLIND" in os.environ or ((path / "data").exists() and (path / "data").read_text() == "x" * 50 + path.name):
            step = int(path.name)
            break
        say(f"checkpoint: step {path.name} passed over: it is not what it was")
        path.rename(kept / f"{path.name}.bad")
again = step > 0
if again:
    say(f"goes on from step {step:,} of 120 in {workdir}")
log.write_text("".join(json.dumps({"step": i + 1}) + "\\n" for i in range(step)))
while step < 120:
    step += 1
    time.sleep(0.005)
    with log.open("a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
    if step % 10 == 0:
        folder = kept / f"{step}.orbax-checkpoint-tmp"
        folder.mkdir(exist_ok=True)
        (folder / "data").write_text("x" * 50 + str(step))
        time.sleep(0.02)
        if not (kept / str(step)).exists():
            folder.rename(kept / str(step))
        (kept / str(step) / "files.json").write_text("{}")
(workdir / "steps.f32").write_bytes(b"same")
(workdir / "digest").write_text("other" if "WRONG" in os.environ and again else "same")
"""


@pytest.fixture
def chaos(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("chaos")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(
        module.programs, "command", lambda *args: [sys.executable, str(tmp_path / "stand_in.py"), *args]
    )
    monkeypatch.setattr(module.programs, "dump_config", lambda config, options: {})
    return module


def missed(folder):
    record = json.loads((folder / "chaos.json").read_text())
    return record, [gate["gate"] for gate in record["gates"] if not gate["passed"]]


def test_every_fault_is_told_and_a_run_that_survives_passes(chaos, tmp_path, capsys):
    faults = "kill,kill_in_save,kill_in_read_back,flip,truncate,delete,empty_checkpoint,torn_log"
    assert chaos.main(["--injections", "8", "--faults", faults, "--out", str(tmp_path)]) == 0
    record, _ = missed(tmp_path)
    rows = record["results"]["injections"]
    assert [row["fault"] for row in rows] == faults.split(",")
    assert all(row["lost"] == 0 and row["named"] and row["same_end"] for row in rows)
    assert sum(row["damaged"] is not None for row in rows) >= 2
    assert record["command"] == f"python tools/chaos.py --injections 8 --faults {faults}"
    assert "| kill_in_save | 1 | 1 of 1 | 0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "gate"),
    [
        ("BLIND", "damaged checkpoints that were not named"),
        ("FORGETS", "of these, with steps lost beyond the last sound checkpoint"),
        ("WRONG", "of these, in runs with another end (digest, log, steps)"),
    ],
)
def test_a_run_that_does_not_survive_misses_its_gate(chaos, tmp_path, monkeypatch, how, gate):
    monkeypatch.setenv(how, "1")
    arguments = ["--injections", "1", "--faults", "truncate", "--out", str(tmp_path)]
    if how == "WRONG":
        arguments[3] = "kill_in_read_back"
    assert chaos.main(arguments) == 1
    assert gate in missed(tmp_path)[1]


def test_kills_that_cut_off_no_save_miss_their_gate(chaos, tmp_path):
    arguments = [
        "--injections",
        "1",
        "--faults",
        "torn_log",
        "--in-save",
        "1",
        "--name",
        "other",
        "--out",
        str(tmp_path),
    ]
    assert chaos.main(arguments) == 1
    gates = json.loads((tmp_path / "other.json").read_text())["gates"]
    assert [gate["passed"] for gate in gates] == [True, True, True, True, False]
