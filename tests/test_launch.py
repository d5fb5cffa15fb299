"""A launch script ends in one `ddt-jax train` line per host. The schedulers are stand-ins here."""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddt_jax.peers import EXIT_ALONE
from ddt_jax.scaling import sweep_jobs
from ddt_jax.training.loop import EXIT_STOPPED
from ddt_jax.training.watchdog import EXIT_SILENT
from tests import jobset_rules

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
JOB = ["train", "--config", "c.py", "--workdir", "a b"]
MANIFEST = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())

STAND_INS = {
    "ddt-jax": 'if [ "$1" = flags ]; then [ "$3" != v0 ] && echo "export LIBTPU_INIT_ARGS=for-$3"; exit; fi; '
    'echo "CALL $(printf "%s|" "$@")"; echo "$XLA_FLAGS ${LIBTPU_INIT_ARGS:-}" >&2; exit "${CODE:-0}"',
    "srun": 'shift; for i in 0 1; do "$@" || status=$?; done; exit "${status:-0}"',
    "scontrol": 'echo "requeued $2"',
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


# Asked to stop, it takes its time, as a save does, and keeps what it was sent meanwhile.
ASKED = """#!{python}
import os, pathlib, signal, sys, time
got = pathlib.Path(__file__).with_name("got-" + sys.argv[-1])
def note(number, frame):
    with got.open("a") as file:
        file.write(signal.Signals(number).name + " ")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
got.touch()
until = time.monotonic() + 30
while not got.stat().st_size and time.monotonic() < until:
    time.sleep(0.02)
time.sleep(1)
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_terminal_asks_every_local_process_once(run, tmp_path, number):
    """A second signal would end it before it has saved."""
    (tmp_path / "ddt-jax").write_text(ASKED.format(python=sys.executable))
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PROCESSES": "2"}
    heard = f"import os, signal, sys; signal.signal({number:d}, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", heard, str(LAUNCH / "local.sh"), "c.py", "w"]  # even where the tests ignore it
    with subprocess.Popen(command, env=env, start_new_session=True) as script:
        files, until = [tmp_path / "got-0", tmp_path / "got-1"], time.monotonic() + 30
        while not all(file.exists() for file in files) and time.monotonic() < until:
            time.sleep(0.02)
        os.killpg(script.pid, number)  # what Ctrl-C is to all that the terminal has in front
        assert script.wait(60) == 75
    assert [file.read_text().split() for file in files] == [["SIGTERM"]] * 2


SLURM = {"SLURM_JOB_ID": "12"}


def test_slurm_starts_one_process_per_node(run):
    code, calls, out, _ = run(LAUNCH / "slurm.sh", "c.py", "a b", "--config.seed=1", **SLURM)
    assert code == 0
    assert calls == [[*JOB, "--coordinator", "slurm", "--config.seed=1"]] * 2
    assert "requeued" not in out


def test_slurm_queues_again_only_after_a_saved_stop(run):
    assert "requeued 12" in run(LAUNCH / "slurm.sh", "c.py", "w", CODE="75", **SLURM)[2]
    assert "requeued" not in run(LAUNCH / "slurm.sh", "c.py", "w", CODE="1", **SLURM)[2]


@pytest.mark.parametrize("code", ["76", "77", "137", "143"])
def test_slurm_queues_again_after_a_lost_process_but_not_for_ever(run, code):
    assert "requeued 12" in run(LAUNCH / "slurm.sh", "c.py", "w", CODE=code, SLURM_RESTART_COUNT="9", **SLURM)[2]
    assert "requeued" not in run(LAUNCH / "slurm.sh", "c.py", "w", CODE=code, SLURM_RESTART_COUNT="10", **SLURM)[2]


def test_tpu_vm_takes_its_place_from_the_cloud(run):
    assert run(LAUNCH / "tpu_vm.sh", "c.py", "a b", "--config.seed=1")[1] == [
        [*JOB, "--coordinator", "tpu", "--config.seed=1"]
    ]


def test_gke_pod_starts_with_its_place(run):
    job = MANIFEST["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    pod = {"CONFIG": "c.py", "WORKDIR": "a b", "CHIP": ""}
    code, calls, _, err = run(*container["command"], **pod)
    assert (code, calls) == (0, [[*JOB, "--coordinator", "jobset"]]) and "for-" not in err
    code, calls, _, err = run(*container["command"], **pod | {"CHIP": "v5e"})
    assert (code, len(calls)) == (0, 1) and "for-v5e" in err
    assert run(*container["command"], **pod | {"CHIP": "v0"})[:2] == (1, [])


def test_xpk_is_told_the_codes_after_which_our_manifest_starts_again():
    """It fails a JobSet after all others up to 126, our manifest only after a mistake of the user's."""
    (command,) = re.findall(r"xpk workload create (?:.*\\\n)*.*", (LAUNCH.parent / "docs" / "launching.md").read_text())
    (codes,) = re.findall(r"--restart-on-exit-codes=(\S+)", command)
    assert [int(code) for code in codes.split(",")] == [1, EXIT_STOPPED, EXIT_ALONE, EXIT_SILENT]
    pod = MANIFEST["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert f"--termination-grace-period-seconds={pod['terminationGracePeriodSeconds']} " in command
    assert f"--max-restarts={MANIFEST['spec']['failurePolicy']['maxRestarts']} " in command


def test_the_manifest_keeps_the_rules_of_jobsets():
    assert jobset_rules.problems(MANIFEST) == []


JOB_AT = ("spec", "replicatedJobs", 0, "template", "spec")
POD_AT = (*JOB_AT, "template", "spec")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("apiVersion",), "jobset.x-k8s.io/v1", "is not allowed"),
        (("metadata", "name"), "8b", "is not allowed"),
        (("metadata", "name"), "x" * 50, "longer than 63"),
        (("spec", "replicas"), 1, "no such field"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart", "is not allowed"),
        (("spec", "failurePolicy", "rules", 0, "onJobFailureReasons"), ["ExitCode"], "is not allowed"),
        ((*JOB_AT, "parallelism"), "4", "is not allowed"),
        ((*JOB_AT, "completions"), 3, "differ"),
        ((*JOB_AT, "podFailurePolicy", "rules", 0, "onExitCodes", "containerName"), "other", "no container other"),
        ((*JOB_AT, "podFailurePolicy", "rules", 0, "onExitCodes", "values"), [2, 1], "must rise"),
        ((*POD_AT, "restartPolicy"), "Always", "is not allowed"),
        ((*POD_AT, "restartPolicy"), "OnFailure", "needs restartPolicy: Never"),
        ((*POD_AT, "nodeSelector", "cloud.google.com/gke-tpu-topology"), "8x8", "are no 8x8"),
        ((*POD_AT, "nodeSelector", "cloud.google.com/gke-tpu-accelerator"), "tpu-v5p-slice", "must have 3 sides"),
        ((*POD_AT, "nodeSelector", "cloud.google.com/gke-tpu-accelerator"), "v5e", "no TPU v5e"),
        ((*POD_AT, "containers", 0, "env", 0, "value"), 1, "is not allowed"),
        ((*POD_AT, "containers", 0, "resources", "limits", "google.com/tpu"), 8, "are no 4x4"),
        ((*POD_AT, "containers", 0, "image"), None, "is missing"),
    ],
)
def test_these_rules_find_what_is_wrong(path, value, says):
    job = copy.deepcopy(MANIFEST)
    at = job
    for step in path[:-1]:
        at = at[step]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    (line,) = jobset_rules.problems(job)
    assert says in line


PRINTED = st.characters(exclude_categories=("C", "Zl", "Zp"))
RUNS = [SimpleNamespace(name="a b"), SimpleNamespace(name="c")]


@settings(max_examples=20, deadline=None)  # reading YAML takes milliseconds
@given(st.text(PRINTED, min_size=1, max_size=70))
@example("null")
@example("yes")
def test_a_sweep_of_any_name_keeps_them_too(name):
    text = sweep_jobs.jobset(name, RUNS, ["ddt-jax", "sweep"], "jobs.yaml")
    assert jobset_rules.problems(yaml.safe_load(text)) == []


def test_shellcheck_finds_nothing(tmp_path):
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    (tmp_path / "sweep.sh").write_text(sweep_jobs.slurm("s", RUNS, ["ddt-jax", "sweep"], "logs", "jobs.sh"))
    (container,) = MANIFEST["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "pod.sh").write_text("#!/bin/bash\n" + container["command"][2])
    files = [*sorted(LAUNCH.glob("*.sh")), tmp_path / "sweep.sh", tmp_path / "pod.sh"]
    done = subprocess.run(["shellcheck", *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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
