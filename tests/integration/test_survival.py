"""Runs that are killed, and runs of several processes, end as an undisturbed run of one process does."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ddt_jax import cli, experiment, hosts
from ddt_jax.training import heartbeat
from ddt_jax.training.loop import EXIT_STOPPED
from ddt_jax.training.stored import Stored
from tests import xla
from tests.integration import slurm_here

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def command(config, workdir, *more):
    return [
        sys.executable,
        "-m",
        "ddt_jax.cli",
        "train",
        "--config",
        config,
        "--workdir",
        str(workdir),
        *map(str, more),
    ]


def environment(devices, *, keep_compiled=False):
    """Variables of a process with so many devices; as in conftest.py, it compiles more than it computes.

    Args:
      keep_compiled: later processes read what this one compiles. JAX writes that file in place: not for a process that
        is killed, nor for one with another beside it, which could read a part.
    """
    found = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(devices)}
    return found if keep_compiled else {**found, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "inf"}


def finish(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "Warning" not in err and "WARNING" not in err, err
    return out


def spawn(arguments, devices=1, **how):
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment(devices, **how), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(spawn(command("configs/smoke.py", workdir), keep_compiled=True))
    return workdir


def test_killed_at_any_step_it_ends_bit_identical(undisturbed, tmp_path):
    rng = random.Random(0)
    for _ in range(4):
        process = spawn(command("configs/smoke.py", tmp_path))
        # At a random point from before the first checkpoint to the end, saves included.
        seen = rng.choice([0, 0, 10, 20])
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            if (tmp_path / "checkpoints" / str(seen)).exists() or (seen == 0 and (tmp_path / "metrics.jsonl").exists()):
                break
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(spawn(command("configs/smoke.py", tmp_path)))
    assert experiment.digest(tmp_path) == experiment.digest(undisturbed)
    assert (tmp_path / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def losses(workdir):
    return np.array([json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()])


LONG = ("--config.train.steps=20", "--config.train.log_every=1", "--config.train.batch_size=8")
LONG += ("--config.train.checkpoint_every=5", "--config.train.keep_checkpoints=4")


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """One process of eight devices, undisturbed."""
    workdir = tmp_path_factory.mktemp("eight")
    assert train_as_one(workdir, "--config.mesh.data=2") == 0
    return workdir


def train_as_one(workdir, *more):
    """Here, on the devices of this process."""
    return cli.main(["train", "--config", "configs/smoke.py:linear", "--workdir", str(workdir), *LONG, *more])


def start_as(processes, devices, workdir, *more):
    """So many processes of so many devices each."""
    join = ("--coordinator", f"localhost:{free_port()}", "--num-processes", processes, *more, "--process-id")
    return [
        spawn(command("configs/smoke.py:linear", workdir, *LONG, *join, i), devices=devices) for i in range(processes)
    ]


def train_as(processes, devices, workdir, *more):
    """As `start_as`, up to the end. Returns what process 0 said."""
    started = start_as(processes, devices, workdir, *more)
    said = [p.communicate(timeout=300)[1] for p in started]
    for process, err in zip(started, said, strict=True):
        assert process.returncode == 0 and "Traceback" not in err and "Warning" not in err, err
    return said[0]


def await_checkpoint_of(workdir, started, seconds=300):
    """Returns once a run has saved its first checkpoint."""
    end = time.monotonic() + seconds
    while not (workdir / "checkpoints" / "5").exists():
        assert time.monotonic() < end and all(process.poll() is None for process in started)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory):
    """Two processes of two devices each, undisturbed."""
    workdir = tmp_path_factory.mktemp("two_by_two")
    train_as(2, 2, workdir)
    return workdir


def copied_up_to(step, workdir, target):
    """A run as it was at a checkpoint."""
    shutil.copytree(workdir, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return target


def test_on_other_meshes_and_processes_the_same_losses_follow(eight, tmp_path, monkeypatch, capsys):
    """8 devices, 4, two processes of 4 with moments in the hosts' memory, and 8 again, five steps each; every mesh lays
    parameters out otherwise.
    """
    four = copied_up_to(5, eight, tmp_path / "four")
    with monkeypatch.context() as only:
        devices = jax.devices()[:4]
        only.setattr(jax, "devices", lambda: devices)
        assert train_as_one(four, "--config.mesh.tensor=2") == 0
    assert "goes on from step 5 " in capsys.readouterr().err
    two = copied_up_to(10, four, tmp_path / "two")
    assert "goes on from step 10 " in train_as(2, 4, two, "--config.optimizer.offload=True")
    again = copied_up_to(15, two, tmp_path / "again")
    assert train_as_one(again, "--config.mesh.data=2") == 0
    assert "goes on from step 15 " in capsys.readouterr().err
    np.testing.assert_allclose(losses(again), losses(eight), rtol=1e-5)


def assert_same_end(workdir, undisturbed):
    assert experiment.digest(workdir) == experiment.digest(undisturbed)
    for name in ("metrics.jsonl", "steps.f32"):
        assert (workdir / name).read_bytes() == (undisturbed / name).read_bytes()


def test_without_process_0_the_others_end_and_all_of_them_go_on_as_if_nothing_had_happened(eight, two_by_two, tmp_path):
    """Four processes of one device each, against two of two: how devices are shared out changes no bit either."""
    started = start_as(4, 1, tmp_path, "--peer-timeout", 60)
    try:
        await_checkpoint_of(tmp_path, started)
        started[0].kill()  # the one that coordinates the others, who hear of it in two ways at once
        said = [process.communicate(timeout=60)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [-signal.SIGKILL, 76, 76, 76], said
    for err in said[1:]:
        assert err.count("ddt-jax: another process of the run has ended") == 1 and "Traceback" not in err, err
        assert "    @ " not in err and "Fatal Python" not in err, err  # no stack of C++
    train_as(4, 1, tmp_path)
    assert_same_end(tmp_path, two_by_two)
    np.testing.assert_allclose(losses(tmp_path), losses(eight), rtol=1e-5)  # gloo adds up in another order
    beats = [(beat["process"], beat["step"], beat["phase"]) for beat in heartbeat.read(tmp_path)]
    assert beats == [(i, 20, "ended") for i in range(4)]


def test_two_processes_train_like_one_and_agree_on_where_to_go_on(eight, two_by_two, tmp_path):
    two, damaged = two_by_two, tmp_path / "damaged"
    np.testing.assert_allclose(losses(two), losses(eight), rtol=1e-5)
    newest, earlier = (Stored(two / "checkpoints" / step) for step in ("20", "15"))
    # Each host has read back what it wrote, and its share of the files is in the list.
    assert newest.file_problem() is None and earlier.file_problem() is None
    assert any("process_1" in name for name in newest.listed())

    shutil.copytree(two, damaged)
    # A file of which only one of the hosts looks at the hash: the other must follow it to the checkpoint before.
    file = damaged / "checkpoints" / "20" / sorted(newest.listed())[1]
    file.write_bytes(file.read_bytes()[:-1])
    said = train_as(2, 2, damaged)
    assert "checkpoint: step 20 passed over: process 1 found it damaged" in said and "goes on from step 15" in said
    np.testing.assert_array_equal(losses(damaged), losses(two))  # the same mesh, so to the last bit
    assert experiment.digest(damaged) == experiment.digest(two)


def test_hosts_that_share_their_rows_train_like_one_and_each_of_them_is_heard(eight, tmp_path):
    shared = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")  # two processes hold the same rows
    started = start_as(4, 1, tmp_path, *shared)
    await_checkpoint_of(tmp_path, started)
    started[3].send_signal(signal.SIGTERM)  # the second of those that read the second part
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [EXIT_STOPPED] * 4, said
    assert "goes on from step" in train_as(4, 1, tmp_path, *shared)
    np.testing.assert_allclose(losses(tmp_path), losses(eight), rtol=1e-5)


@pytest.fixture
def slurm():
    """Variables of a SLURM with room for two tasks."""
    if absent := slurm_here.missing():
        pytest.skip(f"no {', '.join(absent)}: apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, slurm_here.cluster(Path(folder), cpus=2) as env:
        yield env


def test_slurm_queues_a_preempted_job_again_and_it_goes_on_as_if_nothing_had_happened(slurm, two_by_two, tmp_path):
    program = tmp_path / "bin" / "ddt-jax"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ddt_jax.cli "$@"\n')
    program.chmod(0o755)
    env = environment(2) | slurm | {"PYTHONPATH": str(ROOT), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    workdir, log = tmp_path / "run", tmp_path / "log"
    metrics = workdir / "metrics.jsonl"

    def ask(*arguments):
        return subprocess.run(arguments, env=env, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    def job():
        return dict(re.findall(r"(\w+)=(\S+)", ask("scontrol", "show", "job", number)))

    for nodes in ("node[7-8]", "a[07-09,12]n[1-2],b", "c,d[1-2]", "gpu-a-3", "r1-[2,5]"):
        assert hosts.first_node(nodes) == ask("scontrol", "show", "hostnames", nodes).split()[0]
    number = ask(
        *("sbatch", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={log}"),
        *("launch/slurm.sh", "configs/smoke.py:linear", str(workdir), *LONG),
    )
    end, signalled = time.monotonic() + 600, False
    while (state := job())["JobState"] not in ("COMPLETED", "FAILED", "CANCELLED"):
        assert time.monotonic() < end, (state, log.read_text())
        if not signalled and metrics.exists() and metrics.stat().st_size:  # steps are being done
            ask("scancel", "--signal=TERM", number)  # to the tasks, as --signal does before the time is up
            signalled = True
        time.sleep(0.05)
    said = log.read_text()
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("COMPLETED", "1", "0:0"), said
    assert said.count("stopped and saved at step") == 2 and "exit code 75" in said and "goes on from step" in said, said
    assert_same_end(workdir, two_by_two)


# One of several processes, whose verb raises what the command line names once all have joined; without a name it waits.
_RAISES = """
import builtins, sys, time
from ddt_jax import cli, hosts

def work(args, overrides):
    hosts.join(args.coordinator, args.num_processes, args.process_id)
    print("joined", flush=True)
    if sys.argv[1]:
        raise getattr(builtins, sys.argv[1])("on purpose")
    time.sleep(300)

cli._VERBS["train"] = work
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_process_that_crashes_does_not_wait_for_the_others():
    join = ("--coordinator", f"localhost:{free_port()}", "--num-processes", "3", "--process-id")
    started = [
        spawn([sys.executable, "-c", _RAISES, raised, *command("c.py", "w", *join, i)[3:]])
        for i, raised in enumerate(("", "RuntimeError", "KeyboardInterrupt"))
    ]
    try:
        assert started[0].stdout.readline() == "joined\n"
        (_, crashed), (_, interrupted) = (process.communicate(timeout=30) for process in started[1:])
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert [process.returncode for process in started[1:]] == [1, 130], (crashed, interrupted)
    assert crashed.count("Traceback") == 1 and crashed.rstrip().endswith("RuntimeError: on purpose"), crashed
    assert interrupted == "ddt-jax: interrupted before there was anything to save\n"


@pytest.mark.parametrize(
    ("process", "says"), [(0, "process 0 of 2 waited 3 s at"), (1, "process 1 of 2 could not join")]
)
def test_a_missing_peer_is_one_line_within_the_timeout(process, says, tmp_path):
    join = ("--coordinator", f"localhost:{free_port()}", "--num-processes", 2, "--process-id", process)
    started = spawn(command("configs/smoke.py:linear", tmp_path, *join, "--join-timeout", 3))
    _, err = started.communicate(timeout=120)
    assert started.returncode == 76, err
    assert says in err and len(err.strip().splitlines()) == 1
