"""A sweep runs each run once, whatever kills it, and keeps what fails; a stand-in for the program says how runs end."""

import json
import os
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ddt_jax import cli, config, fitting, sweeping
from ddt_jax.errors import UserError
from ddt_jax.scaling import points, sweep, sweep_state
from ddt_jax.scaling.sweep import Cost, Run

ROOT = Path(__file__).resolve().parents[1]
SMOKE = str(ROOT / "configs" / "sweeps" / "smoke.py")


class Program:
    """Stands for `ddt-jax train`: writes a log, and ends as told. calls: the runs it was started for."""

    def __init__(self, **ends):
        self.calls, self._ends = [], ends

    def __call__(self, arguments, log, began):
        folder = Path(arguments[arguments.index("--workdir") + 1])
        self.calls.append(folder.name)
        began(os.getpid())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n')
        code, said = self._ends.get(folder.name, (0, "finished"))
        with open(log, "a") as file:
            file.write(f"{said}\n")
        return code


class Killed(BaseException):
    """The sweep's own process dies."""


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Three runs that cost 10, 20 and 40 FLOPs."""

    def point(family, folder):
        return points.Point(family, folder, 1.0, 2.0, 3.0, {"loss": 2.0})

    monkeypatch.setattr("ddt_jax.ledger.point", point)
    described = sweep.Sweep("three", {"a": "x.py"}, "steps", (10,), 100.0, evaluate=False)
    runs = [
        Run(n, "a", "x.py", (("lr", n),), 10, 10, Cost(5.0, f, 8.0, 8.0)) for n, f in zip("xyz", (1, 2, 4), strict=True)
    ]
    return sweeping.Planned(described, str(tmp_path), runs)


def states(planned):
    return [record.state for record in planned.records()]


def test_every_run_is_run_once_and_the_second_time_none(planned, capsys):
    program = Program()
    assert sweeping.run(planned, launch=program) and program.calls == ["x", "y", "z"]
    assert states(planned) == ["finished"] * 3
    assert sweeping.run(planned, launch=program) and program.calls == ["x", "y", "z"]
    assert "3 runs: 3 finished; 70 of 70 FLOPs" in capsys.readouterr().err
    found = fitting.gather([planned.root])
    assert [(p.run, p.metrics, p.status) for p in found] == [(n, {"loss": 2.0}, "finished") for n in "xyz"]


def test_a_run_that_fails_or_diverges_is_kept_shown_and_not_tried_again(planned):
    lost = "ddt-jax: train: 50 steps in a row up to step 70 were not finite (train.max_bad_steps)"
    program = Program(x=(2, "ddt-jax: config: no such thing\n"), y=(2, lost), z=(-9, "step 3 of 10"))
    assert sweeping.run(planned, launch=program) and program.calls == ["x", "y", "z"]
    assert states(planned) == ["failed", "diverged", "failed"]
    assert "failed    x" in planned.table() and "config: no such thing" in planned.table()
    assert "train was killed by signal 9" in planned.table()
    failed, diverged, _ = fitting.gather([planned.root])
    assert (failed.status, failed.why, failed.flops, failed.tokens) == ("failed", "config: no such thing", 10, 80)
    assert diverged.status == "diverged" and "50 steps in a row" in diverged.why
    assert sweeping.run(planned, launch=program) and len(program.calls) == 3
    assert sweeping.run(planned, launch=Program(), retry=True) and states(planned) == ["finished"] * 3


@pytest.mark.parametrize("code", [75, -15])  # it has saved; it was asked before there was anything to save
def test_a_stopped_run_ends_the_sweep_which_goes_on_with_it(planned, code):
    program = Program(y=(code, "saved"))
    assert not sweeping.run(planned, launch=program)
    assert program.calls == ["x", "y"] and states(planned) == ["finished", "stopped", "waiting"]
    again = Program()
    assert sweeping.run(planned, launch=again) and again.calls == ["y", "z"]


def test_a_killed_sweep_goes_on_without_repeating_a_finished_run(planned):
    class Fatal(Program):
        def __call__(self, arguments, log, began):
            code = super().__call__(arguments, log, lambda pid: began(2**22 + 1))  # of a process that is not there
            if self.calls[-1] == "y":
                raise Killed
            return code

    with pytest.raises(Killed):
        sweeping.run(planned, launch=Fatal())
    assert states(planned) == ["finished", "stopped", "waiting"]
    assert "its process is gone" in planned.table()
    program = Program()
    assert sweeping.run(planned, launch=program) and program.calls == ["y", "z"]


def test_a_run_of_another_machine_is_left_to_it_unless_a_scheduler_knows_better(planned, capsys):
    there = sweep_state.Record().started(planned.runs[0], 7)
    sweep_state.write(planned.root, planned.runs[0], replace(there, host="elsewhere"))
    program = Program()
    assert sweeping.run(planned, launch=program) and program.calls == ["y", "z"]
    assert "x is run on elsewhere; left to it" in capsys.readouterr().err and states(planned)[0] == "running"
    only = replace(planned, runs=planned.runs[:1])
    assert sweeping.run(only, launch=program, alone=True) and program.calls[-1] == "x"


def test_a_number_of_a_process_that_came_again_is_no_sign_of_life(tmp_path):
    record = sweep_state.Record(state="running", host=socket.gethostname(), pid=os.getpid())
    assert not record.alive(str(tmp_path / "runs" / "nothing of ours"))
    child = subprocess.Popen(["cat", "-", str(tmp_path)], stdin=subprocess.PIPE)
    try:
        arguments, end = Path(f"/proc/{child.pid}/cmdline"), time.monotonic() + 10
        while arguments.exists() and not arguments.read_bytes() and time.monotonic() < end:
            time.sleep(0.01)  # a process that has just begun has none for a moment
        assert replace(record, pid=child.pid).alive(str(tmp_path))
    finally:
        child.kill()
        child.communicate()
    assert not replace(record, pid=child.pid).alive(str(tmp_path))


def test_a_sweep_with_other_settings_takes_another_folder(planned):
    sweeping.run(planned, launch=Program())
    other = replace(planned, runs=[replace(run, overrides=(("lr", "9"),)) for run in planned.runs])
    with pytest.raises(UserError, match=r"began with other settings \(lr\); use another --to"):
        other.records()


def test_the_table_says_what_is_left_and_when_it_ends(planned):
    records = [
        sweep_state.Record("finished", seconds=30.0),
        sweep_state.Record("running", seconds=10.0, since=1000.0),
        sweep_state.Record(),
    ]
    folder = Path(sweep_state.workdir(planned.root, planned.runs[1]))
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 1.25}\n{"step": 6, "lo')
    # 10 + 20/2 FLOPs in 30 + 10 + 20 s; 20/2 + 40 are left.
    assert sweep_state.seconds_left(planned.root, planned.runs, records, 1020.0) == pytest.approx(50 * 60 / 20)
    text = sweep_state.table(planned.root, planned.runs, records, 1020.0)
    assert "3 runs: 1 finished, 1 running, 1 waiting; 10 of 70 FLOPs; ends in 2:30" in text
    assert "running   y  step 5/10  loss 1.25  0:30" in text and "waiting   z" in text and "  x" not in text
    assert sweep_state.seconds_left(planned.root, planned.runs, [sweep_state.Record()] * 3, 0.0) is None


def described(**changes):
    fields = {"name": "s", "arms": {"ddt": "../smoke.py"}, "amount": "steps", "amounts": (10,), "budget": 1e4}
    return sweep.Sweep(**fields | changes)


def test_a_grid_is_every_combination_under_names_that_tell_them_apart():
    found = described(sizes=(8, 16), dial=lambda arm, size: {"model.width": size}, lrs=(1e-3, 2e-3), seeds=(0, 1))
    runs = sweep.grid(found, SMOKE, (("train.ema", "0.5"),))
    assert len(runs) == 8 and runs[0].name == "ddt-8-10s-lr0.001-s0" and len({run.name for run in runs}) == 8
    assert dict(runs[-1].overrides) == {"model.width": "16", "seed": "1", "optimizer.lr": "0.002", "train.ema": "0.5"}
    assert runs[0].config == str(ROOT / "configs" / "smoke.py")
    with pytest.raises(UserError, match="two runs would be called ddt-8-10s-s0"):
        sweep.grid(described(sizes=(8, 8)), SMOKE)


@pytest.mark.parametrize(
    ("amount", "value", "steps"), [("flops", 700, 7), ("examples", 48, 6), ("tokens", 100, 2), ("steps", 5, 5)]
)
def test_steps_are_what_the_amount_pays_for(amount, value, steps):
    (run,) = sweep.grid(described(amount=amount, amounts=(value,)), SMOKE)
    run = sweep.planned(run, amount, lambda s: Cost(1.0, 100.0, float(s.train.batch_size), 50.0))
    assert run.steps == steps and run.flops == 100 * steps and run.overrides[-1] == ("train.steps", str(steps))
    assert config.load(run.config, run.overrides).train.steps == steps
    line = run.arguments("train", "w")
    assert line[:5] == ["train", "--config", run.config, "--workdir", "w"] and f"--config.train.steps={steps}" in line


def test_too_much_and_too_little_are_refused():
    (run,) = sweep.grid(described(amount="flops", amounts=(10,)), SMOKE)
    with pytest.raises(UserError, match="10 flops are less than a step of 100"):
        sweep.planned(run, "flops", lambda s: Cost(1.0, 100.0, 8.0, 8.0))
    costly = replace(run, steps=7, cost=Cost(1.0, 1e4, 8.0, 8.0))
    with pytest.raises(UserError, match=r"1 runs of s take 7e\+04 FLOPs, its budget is 1e\+04"):
        sweep.check_budget(described(), [costly])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "failed with AttributeError"),
        ("def get_sweep(): return 3", "must return a Sweep, got int"),
        (
            "from ddt_jax.scaling import sweep\ndef get_sweep(): return sweep.Sweep('n', {'a': 'b'}, 'days', (1,), 1)",
            "amount",
        ),
        (
            "from ddt_jax.scaling import sweep\ndef get_sweep(): return sweep.Sweep('n', {}, 'steps', (1,), 1)",
            "arms of",
        ),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(tmp_path, text, said):
    path = tmp_path / "s.py"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        sweep.load(str(path))


def test_jobs_are_written_for_what_is_not_done(planned, tmp_path):
    sweeping.run(planned, launch=Program(y=(75, "")))
    command = ["ddt-jax", "sweep", "--config", "a b.py", "--to", planned.root]
    script = Path(sweeping.write_jobs("slurm", planned, command))
    text = script.read_text()
    assert "#SBATCH --array=0-1\n" in text and "names=(y z)" in text and "'a b.py'" in text
    # Under stand-ins for SLURM the second job of the array runs the second of these, and is queued again when stopped.
    for name, body in {"srun": 'shift; echo "$@"; exit 75', "scontrol": 'echo "$@"'}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_ARRAY_JOB_ID": "9",
    }
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert done.returncode == 75
    assert done.stdout.splitlines() == [f"ddt-jax sweep --config a b.py --to {planned.root} --only z", "requeue 9_1"]
    job = yaml.safe_load(Path(sweeping.write_jobs("jobset", planned, command)).read_text())
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["completions"] == 2 and spec["completionMode"] == "Indexed"
    shell = spec["template"]["spec"]["containers"][0]["command"][-1]
    assert "names=(y z)" in shell and '--only "${names[$JOB_COMPLETION_INDEX]}"' in shell
    sweeping.run(planned, launch=Program())
    with pytest.raises(UserError, match="all 3 runs .* have ended"):
        sweeping.write_jobs("slurm", planned, command)


def test_the_sweeps_that_come_along_are_whole(monkeypatch):
    """Settings that they change exist."""
    monkeypatch.setenv("CODES", "/somewhere")
    paths = {path for path in (ROOT / "configs" / "sweeps").glob("*.py") if "def get_sweep" in path.read_text()}
    assert len(paths) == 4  # the other is a trial, of tools/compare.py
    for path in sorted(paths):
        found = sweep.load(str(path))
        for run in sweep.grid(found, str(path)):
            config.load(run.config, run.overrides)


@pytest.mark.slow
def test_two_real_runs_from_the_sweep_to_the_fit(tmp_path, capsys):
    to = str(tmp_path / "sweep")
    assert cli.main(["sweep", "--config", SMOKE, "--to", to, "--plan"]) == 0
    assert "linear-8-6s-lr0.003-s0" in capsys.readouterr().out and not Path(to).exists()
    assert cli.main(["sweep", "--config", SMOKE, "--to", to]) == 0
    tree = json.loads((Path(to) / "sweep.json").read_text())
    small, large = tree["points"]
    assert small["status"] == large["status"] == "finished" and small["metrics"]["psnr"] > 0
    assert small["params"] < large["params"] and small["tokens"] == large["tokens"] == 6 * 8
    times = {path: path.stat().st_mtime_ns for path in (Path(to) / "runs").rglob("*.json*")}
    assert cli.main(["sweep", "--config", SMOKE, "--to", to]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in (Path(to) / "runs").rglob("*.json*")}
    assert cli.main(["fit", to, "--metric", "psnr", "--to", str(tmp_path / "fit")]) == 0
    assert "Runs used: 2." in capsys.readouterr().out
    workdir = f"{to}/runs/linear-8-6s-lr0.003-s0"
    assert cli.main(["sweep", "--config", SMOKE, "--to", to, "--only", Path(workdir).name]) == 0
    (alone,) = fitting.gather([f"mine={workdir}"])
    assert (alone.family, alone.params, alone.flops) == ("mine", small["params"], small["flops"])
