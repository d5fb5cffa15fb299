"""Runs that are killed, and runs of several processes, end as an undisturbed run of one process does."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ddt_jax import experiment

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


def environment(devices):
    # As in conftest.py: they compile more than they compute.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def finish(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "Warning" not in err and "WARNING" not in err, err
    return out


def spawn(arguments, devices=1):
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment(devices), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(spawn(command("configs/smoke.py", workdir)))
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


def test_two_processes_of_four_devices_train_like_one(tmp_path):
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    finish(spawn(command("configs/smoke.py:linear", one, *LONG)))
    for workdir in (two, again):
        port = free_port()
        join = ("--coordinator", f"localhost:{port}", "--num-processes", 2, "--process-id")
        processes = [spawn(command("configs/smoke.py:linear", workdir, *LONG, *join, i), devices=4) for i in range(2)]
        for process in processes:
            finish(process)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    np.testing.assert_array_equal(losses(two), losses(again))
    assert experiment.digest(two) == experiment.digest(again)


def test_a_missing_peer_is_one_line_within_the_timeout(tmp_path):
    join = ("--coordinator", f"localhost:{free_port()}", "--num-processes", 2, "--process-id", 1, "--join-timeout", 3)
    process = spawn(command("configs/smoke.py:linear", tmp_path, *join))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "process 1 of 2 could not join" in err and "Traceback" not in err
