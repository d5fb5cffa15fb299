"""tools/chaos.py hurts a run, lets it go on, and notices when that does not end well; a small program stands in."""

import importlib
import json
import random
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


# Each of its steps adds one record to a sum, read as training reads it.
READER = """
import hashlib, json, pathlib, re, sys, time
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.errors import UserError
value = lambda name: sys.argv[sys.argv.index(name) + 1]
workdir = pathlib.Path(value("--workdir"))
kept, log = workdir / "checkpoints", workdir / "metrics.jsonl"
kept.mkdir(parents=True, exist_ok=True)
config = pathlib.Path(value("--config")).read_text()
spec, cache = (re.search(f"c.data.{name} = '(.*)'", config)[1] for name in ("source", "cache_dir"))
seconds = [float(a.partition("=")[2]) for a in sys.argv if a.startswith("--config.data.retry_seconds=")]
source = open_source(spec, cache_dir=cache, retry_seconds=[*seconds, 60.0][0])
step, found = 0, "nothing"
if there := [int(p.name) for p in kept.iterdir()]:
    step = max(there)
    found = (kept / str(step) / "data").read_text()
    print(f"goes on from step {step:,} of 120 in {workdir}", file=sys.stderr, flush=True)
log.write_text("".join(json.dumps({"step": i + 1}) + "\\n" for i in range(step)))
while step < 120:
    try:
        image = source[step * 7 % len(source)]["image"]
    except BadRecord:
        continue
    except UserError as error:
        print(f"ddt-jax: {error}", file=sys.stderr)
        sys.exit(2)
    step, found = step + 1, hashlib.sha256(found.encode() + image).hexdigest()
    time.sleep(0.005)
    with log.open("a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
    if step % 10 == 0:
        (kept / str(step)).mkdir()
        (kept / str(step) / "data").write_text(found)
(workdir / "steps.f32").write_bytes(b"same")
(workdir / "digest").write_text(found)
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


@pytest.mark.slow
def test_sources_that_are_slow_or_away_change_nothing_and_dead_ones_end_in_a_line(chaos, tmp_path, monkeypatch):
    sources = importlib.import_module("chaos_sources")
    monkeypatch.setattr(sources, "_AWAY_SECONDS", 1.0)
    monkeypatch.setattr(sources, "_PATIENCE", "--config.data.retry_seconds=0.5")
    (tmp_path / "reader.py").write_text(READER)

    def command(config, workdir, more):
        where = ["train", "--config", str(config), "--workdir", str(workdir)]
        return [sys.executable, str(tmp_path / "reader.py"), *where, *more]

    monkeypatch.setattr(sources.programs, "digest", lambda workdir: (workdir / "digest").read_text())
    found = sources.source_faults(tmp_path / "sources", command, {}, random.Random(0))
    assert [gate["gate"] for gate in sources.gates(found) if not gate["passed"]] == []
    assert found["slow"] > 10 and found["failed"] >= 3 and found["told"] >= 1 and found["code"] == 2
    assert "ddt-jax: data: webdataset:" in found["line"] and "gives errors only, for 0.5 s" in found["line"]


def test_gates_of_sources_see_what_did_not_end_well(chaos):
    sources = importlib.import_module("chaos_sources")
    good = {"slow": 1, "failed": 1, "told": 1, "same_end": True, "same_end_later": True, "code": 2, "complaints": 0}
    good |= {"line": "ddt-jax: data: x gives errors only", "lost": 0}
    assert all(gate["passed"] for gate in sources.gates(good))
    bad = {"slow": 0, "failed": 0, "told": 0, "same_end": False, "same_end_later": False, "code": 1, "complaints": 1}
    for name, value in (bad | {"line": "", "lost": 10}).items():
        assert sum(not gate["passed"] for gate in sources.gates(good | {name: value})) == 1, name
