"""Where a process stands among those of its run: from variables, a metadata server or the command line."""

import socket
import sys
import urllib.error
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from ddt_jax import hosts, peers
from ddt_jax.errors import UserError
from ddt_jax.hosts import Place

SLURM = {"SLURM_JOB_ID": "12", "SLURM_STEP_NODELIST": "node[7-8]", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
GKE = {"TPU_WORKER_HOSTNAMES": "p0,p1,p2,p3", "TPU_WORKER_ID": "2"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "q0.run:8080"}
PODS = {"JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "gpus", "JOB_COMPLETION_INDEX": "3"}
VM = {"agent-worker-number": "1", "worker-network-endpoints": "u:1:10.0.0.5,v:1:10.0.0.6"}
VM_SLICES = VM | {"tpu-env": "ZONE: 'z'\n" + "\n".join(f"{key}: '{value}'" for key, value in SLICES.items())}


def unasked(name):
    raise AssertionError(f"asked the metadata server for {name}")


def server(values):
    """A metadata server that knows these attributes."""

    def fetch(name):
        key = name.removeprefix("attributes/")
        if key not in values:
            raise urllib.error.HTTPError(name, 404, "Not Found", None, None)
        return values[key]

    return fetch


def find(coordinator="", env=None, count=0, index=-1, values=None):
    fetch = unasked if values is None else server(values)
    return hosts.find(coordinator, count, index, env={} if env is None else env, fetch=fetch)


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({"coordinator": "a:1", "count": 4, "index": 3}, Place("a:1", 4, 3)),
        ({"coordinator": "slurm", "env": SLURM}, Place("node7:20012", 2, 1)),
        ({"coordinator": "slurm", "env": SLURM | {"SLURM_JOB_ID": "24001"}}, Place("node7:20001", 2, 1)),
        ({"coordinator": "slurm", "env": SLURM, "count": 2, "index": 1}, Place("node7:20012", 2, 1)),
        ({"coordinator": "jobset", "env": GKE}, Place("p0:8482", 4, 2)),
        ({"coordinator": "jobset", "env": GKE | SLICES}, Place("q0.run:8482", 8, 6)),
        # A pod of TPUs is one of a JobSet as well: what GKE says comes first, and needs no number of processes.
        ({"coordinator": "jobset", "env": PODS | GKE}, Place("p0:8482", 4, 2)),
        ({"coordinator": "jobset", "env": PODS, "count": 4}, Place("run-gpus-0-0.run:8482", 4, 3)),
        ({"coordinator": "tpu", "values": VM}, Place("10.0.0.5:8482", 2, 1)),
        ({"coordinator": "tpu", "values": VM_SLICES}, Place("q0.run:8482", 4, 3)),
        (
            {"coordinator": "tpu", "values": VM | {"worker-network-endpoints": "t0,t1,t2"}},
            Place("t0:8482", 3, 1),
        ),
        ({"coordinator": "auto", "env": SLURM}, Place("node7:20012", 2, 1)),
        ({"coordinator": "auto", "env": GKE}, Place("p0:8482", 4, 2)),
    ],
)
def test_a_process_finds_its_place(asked, place):
    assert find(**asked) == place


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"coordinator": "auto"},
        {"env": SLURM | GKE | PODS},  # what nobody asked for is not looked at
        {"coordinator": "auto", "env": {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}},
        {"coordinator": "auto", "env": {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}},  # no srun
        {"coordinator": "slurm", "env": SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}},
        {"coordinator": "a:1", "count": 1, "index": 0},
    ],
)
def test_where_nothing_says_that_there_are_several_it_is_the_only_one_and_asks_no_server(asked):
    assert find(**asked) is None


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"count": 2}, "--num-processes needs --coordinator"),
        ({"coordinator": "auto", "count": 2}, "--num-processes needs --coordinator"),
        ({"coordinator": "a:1"}, "got 0 and -1"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "got 2 and 2"),
        ({"coordinator": "sluurm"}, "got 'sluurm'"),
        ({"coordinator": "slurm"}, "SLURM_JOB_ID is not set; start the processes with srun"),
        ({"coordinator": "slurm", "env": SLURM | {"SLURM_PROCID": "x"}}, "SLURM_PROCID must be a number, got 'x'"),
        ({"coordinator": "slurm", "env": SLURM | {"SLURM_PROCID": "2"}}, "SLURM_PROCID=2 is not below 2"),
        ({"coordinator": "slurm", "env": SLURM, "count": 3}, "slurm says process 1 of 2, the command line"),
        ({"coordinator": "slurm", "env": SLURM, "index": 0}, "slurm says process 1 of 2, the command line"),
        (
            {"coordinator": "slurm", "env": SLURM | {"SLURM_PROCID": "0", "SLURMD_NODENAME": "node8"}},
            "process 0 is on node8, not on the first of SLURM_STEP_NODELIST=node",
        ),
        ({"coordinator": "auto", "env": SLURM | GKE}, "name the one that is meant"),
        ({"coordinator": "jobset"}, "JOBSET_NAME is not set"),
        ({"coordinator": "jobset", "env": PODS}, "needs --num-processes"),
        ({"coordinator": "jobset", "env": PODS, "count": 3}, "JOB_COMPLETION_INDEX=3 is not below 3"),
        ({"coordinator": "jobset", "env": GKE | {"TPU_WORKER_ID": "4"}}, "TPU_WORKER_ID=4 is not below 4"),
        ({"coordinator": "jobset", "env": {"TPU_WORKER_HOSTNAMES": "p0,p1"}}, "TPU_WORKER_ID is not set"),
        ({"coordinator": "jobset", "env": GKE | {"MEGASCALE_NUM_SLICES": "2"}}, "MEGASCALE_COORDINATOR_ADDRESS is not"),
        ({"coordinator": "jobset", "env": GKE | SLICES | {"MEGASCALE_SLICE_ID": "2"}}, "MEGASCALE_SLICE_ID=2 is not"),
        ({"coordinator": "tpu", "values": {}}, "does not tell agent-worker-number"),
    ],
)
def test_what_is_missing_or_contradicts_is_one_line(asked, says):
    with pytest.raises(UserError) as error:
        find(**asked)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_every_process_of_several_slices_has_a_number_of_its_own():
    env = lambda piece, worker: GKE | SLICES | {"MEGASCALE_SLICE_ID": str(piece), "TPU_WORKER_ID": str(worker)}  # noqa: E731
    numbers = [find("jobset", env(piece, worker)).process_id for piece in range(2) for worker in range(4)]
    assert numbers == list(range(8))


def test_a_port_that_is_taken_and_a_peer_that_does_not_come_are_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)  # before anything of JAX
    hosts.join()
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        here = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(UserError, match="process 0 cannot listen at .* another program has it") as taken:
            hosts.join(here, 2, 0)
    assert not isinstance(taken.value, peers.Missing)
    with pytest.raises(peers.Missing, match="process 1 of 2 could not join"):
        hosts.join(here, 2, 1, join_timeout=0)


def test_jax_looks_for_nothing_by_itself(monkeypatch):
    """It would hide all GPUs but one from a task of SLURM, and take SIGTERM from the loop."""
    given, settings = {}, {}
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    jax = SimpleNamespace(
        config=SimpleNamespace(jax_platforms="", update=settings.__setitem__),
        distributed=SimpleNamespace(initialize=lambda *place, **how: given.update(how, place=place)),
    )
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setattr(peers, "losses_end_us", nullcontext)
    monkeypatch.setattr(hosts, "_await_coordinator", lambda *arguments: None)
    hosts.join("slurm", join_timeout=9, peer_timeout=7)
    assert given.pop("place") == ("node7:20012", 2, 1)
    assert given["cluster_detection_method"] == "deactivate" and given["heartbeat_timeout_seconds"] == 7
    assert given["initialization_timeout"] > 9 and settings == {"jax_enable_preemption_service": False}
