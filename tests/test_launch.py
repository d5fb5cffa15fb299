"""A launch script ends in one `ddt-jax train` line per host, with its place in the run. Schedulers are stand-ins."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
JOB = ["train", "--config", "c.py", "--workdir", "a b"]

STAND_INS = {
    "ddt-jax": 'if [ "$1" = flags ]; then [ "$3" != v0 ] && echo "export LIBTPU_INIT_ARGS=for-$3"; exit; fi; '
    'echo "CALL $(printf "%s|" "$@")"; echo "$XLA_FLAGS ${LIBTPU_INIT_ARGS:-}" >&2; exit "${CODE:-0}"',
    "srun": 'shift; for i in 0 1; do SLURM_PROCID=$i "$@" || status=$?; done; exit "${status:-0}"',
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "requeued $2"; fi',
    "curl": 'case "${@: -1}" in *agent-worker-number) echo 1;; *) echo "x:1:10.0.0.5,y:1:10.0.0.6";; esac',
}


@pytest.fixture
def run(tmp_path):
    """Runs a command with the stand-ins first on PATH; returns (exit code, calls of ddt-jax, stdout, stderr)."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def call(*command, **env):
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **env}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        calls = [ln[5:].rstrip("|").split("|") for ln in done.stdout.splitlines() if ln.startswith("CALL ")]
        return done.returncode, calls, done.stdout, done.stderr

    return call


def place(coordinator, count, index):
    return ["--coordinator", coordinator, "--num-processes", str(count), "--process-id", str(index)]


def test_local_makes_fake_devices(run):
    code, calls, _, err = run(LAUNCH / "local.sh", "c.py", "a b", "--config.seed=1", DEVICES="4")
    assert (code, calls) == (0, [[*JOB, "--config.seed=1"]])
    assert "--xla_force_host_platform_device_count=4" in err


def test_local_starts_processes_and_passes_on_how_they_ended(run):
    code, calls, _, _ = run(LAUNCH / "local.sh", "c.py", "a b", PROCESSES="2", PORT="9000", CODE="75")
    assert code == 75
    assert sorted(calls) == [JOB + place("127.0.0.1:9000", 2, i) for i in (0, 1)]


SLURM = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "12", "SLURM_NTASKS": "2"}


def test_slurm_starts_one_process_per_node(run):
    code, calls, out, _ = run(LAUNCH / "slurm.sh", "c.py", "a b", "--config.seed=1", **SLURM)
    assert code == 0
    assert calls == [[*JOB, *place("node7:20012", 2, i), "--config.seed=1"] for i in (0, 1)]
    assert "requeued" not in out


def test_slurm_queues_again_only_after_a_saved_stop(run):
    assert "requeued 12" in run(LAUNCH / "slurm.sh", "c.py", "w", CODE="75", **SLURM)[2]
    assert "requeued" not in run(LAUNCH / "slurm.sh", "c.py", "w", CODE="1", **SLURM)[2]


@pytest.mark.parametrize("code", ["76", "77", "137"])
def test_slurm_queues_again_after_a_lost_process_but_not_for_ever(run, code):
    assert "requeued 12" in run(LAUNCH / "slurm.sh", "c.py", "w", CODE=code, SLURM_RESTART_COUNT="9", **SLURM)[2]
    assert "requeued" not in run(LAUNCH / "slurm.sh", "c.py", "w", CODE=code, SLURM_RESTART_COUNT="10", **SLURM)[2]


def test_tpu_vm_asks_the_cloud_for_its_place(run):
    assert run(LAUNCH / "tpu_vm.sh", "c.py", "a b")[1] == [JOB + place("10.0.0.5:8476", 2, 1)]


def test_gke_pod_starts_with_its_place(run):
    job = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    pod = {"TPU_WORKER_HOSTNAMES": "p0,p1", "TPU_WORKER_ID": "1", "CONFIG": "c.py", "WORKDIR": "a b", "CHIP": ""}
    code, calls, _, err = run(*container["command"], **pod)
    assert (code, calls) == (0, [JOB + place("p0:8476", 2, 1)]) and "for-" not in err
    code, calls, _, err = run(*container["command"], **pod | {"CHIP": "v5e"})
    assert (code, len(calls)) == (0, 1) and "for-v5e" in err
    assert run(*container["command"], **pod | {"CHIP": "v0"})[:2] == (1, [])
    assert job["parallelism"] == job["completions"]


@pytest.mark.parametrize(("script", "env"), [("slurm.sh", SLURM), ("tpu_vm.sh", {})])
def test_flags_of_a_chip_are_set_where_it_is_named(run, script, env):
    assert "for-" not in run(LAUNCH / script, "c.py", "w", **env)[3]
    assert "for-v5p" in run(LAUNCH / script, "c.py", "w", CHIP="v5p", **env)[3]
    assert run(LAUNCH / script, "c.py", "w", CHIP="v0", **env)[:2] == (1, [])  # not without them


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh", "tpu_vm.sh"])
def test_without_arguments_says_how_to_call_it(run, script):
    code, calls, out, _ = run(LAUNCH / script)
    assert (code, calls) == (2, [])
    assert "CONFIG" in out
