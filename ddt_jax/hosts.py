"""The processes of a run: where this one stands among them, and how they come together.

`--coordinator` names who knows the place of a process:

    (nothing)    nobody: it is the only one
    HOST:PORT    the command line, which also gives --num-processes and --process-id
    slurm        variables that srun sets for each task
    jobset       variables in a pod: those of GKE where it has TPUs (TPU_WORKER_*, and MEGASCALE_* for several slices),
                 else the names of the JobSet and of its job, JOB_COMPLETION_INDEX, and --num-processes
    tpu          the metadata server of a Cloud TPU VM
    auto         slurm or jobset, whichever has left variables here, or nobody; it asks no server

JAX could find some of this by itself. We do not let it: it would also take all GPUs but one from a task of SLURM, ask
metadata servers and Kubernetes unasked, and report what is missing as a traceback, or not at all.
"""

import errno
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ddt_jax import peers
from ddt_jax.errors import UserError
from ddt_jax.io import metadata

_PORT = 8482  # of process 0 in pods and on TPU VMs, where JAX would take it, too
_GRACE = 60  # seconds after which JAX would abort the process with a stack trace, later than we end it with a line


@dataclass(frozen=True)
class Place:
    """One of the processes of a run.

    Attributes:
      coordinator: "host:port" of process 0.
    """

    coordinator: str
    num_processes: int
    process_id: int


def add_arguments(parser) -> None:
    """What the command line of each process says about it."""
    parser.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT|slurm|jobset|tpu|auto",
        help="address of process 0, for a run of several processes, or who knows it and the two numbers below",
    )
    parser.add_argument("--num-processes", type=int, default=0, metavar="N", help="how many processes the run has")
    parser.add_argument("--process-id", type=int, default=-1, metavar="I", help="which of them this is, from 0")
    parser.add_argument(
        "--join-timeout", type=int, default=300, metavar="S", help="seconds to wait for the others (300)"
    )
    parser.add_argument(
        "--peer-timeout", type=int, default=100, metavar="S", help="seconds of silence after which one is lost (100)"
    )


def find(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    env: Mapping[str, str] = os.environ,
    fetch: Callable[[str], str] = metadata.fetch,
) -> Place | None:
    """The place of this process; None if it is the only one.

    Args:
      num_processes, process_id: of the command line; 0 and -1 if it does not say. Where something else knows, they must
        agree with that.
      fetch: as `io.metadata.fetch`; only asked for "tpu".

    Raises:
      UserError: if what is needed is missing or makes no sense, or two things say different.
    """
    if coordinator == "auto":
        coordinator = _only_one_of(env)
    if not coordinator:
        if num_processes > 1:
            raise UserError(
                "hosts: --num-processes needs --coordinator as well: host:port of process 0, slurm, jobset or tpu"
            )
        return None
    if coordinator == "slurm":
        place = _slurm(env)
    elif coordinator == "tpu":
        place = _tpu(env, fetch)
    elif coordinator == "jobset":
        place = _gke(env) if "TPU_WORKER_HOSTNAMES" in env else _jobset(env, num_processes)
    elif re.fullmatch(r".+:\d+", coordinator):
        place = Place(coordinator, num_processes, process_id)
        if not 0 <= process_id < num_processes:
            raise UserError(
                "hosts: --coordinator needs --num-processes N and --process-id in 0..N-1, "
                f"got {num_processes} and {process_id}"
            )
    else:
        raise UserError(f"hosts: --coordinator must be host:port, slurm, jobset, tpu or auto, got {coordinator!r}")
    if num_processes not in (0, place.num_processes) or process_id not in (-1, place.process_id):
        raise UserError(
            f"hosts: {coordinator} says process {place.process_id} of {place.num_processes}, the command line "
            f"--num-processes {num_processes} --process-id {process_id}; leave those out"
        )
    return place if place.num_processes > 1 else None


def _only_one_of(env) -> str:
    there = {
        "slurm": "SLURM_STEP_NODELIST" in env,
        "jobset": "TPU_WORKER_HOSTNAMES" in env or "JOBSET_NAME" in env,
    }
    found = [name for name, here in there.items() if here]
    if len(found) > 1:
        raise UserError(
            "hosts: --coordinator auto finds variables of slurm and of a jobset; name the one that is meant"
        )
    return found[0] if found else ""


def _slurm(env) -> Place:
    read = _reader(env, "slurm", "start the processes with srun")
    job, count, index = (read(name, int) for name in ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
    nodes = read("SLURM_STEP_NODELIST")
    first = first_node(nodes)
    node = env.get("SLURMD_NODENAME", first)
    if index == 0 and node != first:
        raise UserError(
            f"hosts: process 0 is on {node}, not on the first of SLURM_STEP_NODELIST={nodes}; "
            "leave --distribution to srun"
        )
    # Jobs that share a node must not share a port; below 32768, where Linux begins to hand them out by itself.
    return _checked(Place(f"{first}:{20000 + job % 12000}", count, index), "SLURM_PROCID")


def first_node(nodes: str) -> str:
    """The first of a list of SLURM: "rack[07-09,12]n[1-2],other" → "rack07n1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _gke(env) -> Place:
    read = _reader(env, "jobset", "GKE sets it in pods that ask for google.com/tpu")
    hosts = read("TPU_WORKER_HOSTNAMES").split(",")
    return _slices(read, hosts, read("TPU_WORKER_ID", int), "TPU_WORKER_ID")


def _jobset(env, num_processes: int) -> Place:
    read = _reader(env, "jobset", "launch/gke_jobset.yaml shows how a pod gets it")
    name, job, index = read("JOBSET_NAME"), read("REPLICATED_JOB_NAME"), read("JOB_COMPLETION_INDEX", int)
    if num_processes < 1:
        raise UserError("hosts: --coordinator jobset needs --num-processes N in pods without TPUs: those of the job")
    # <JobSet>-<job>-<index of the job>-<index of the pod>.<subdomain>, which is the JobSet's name unless it says other.
    return _checked(Place(f"{name}-{job}-0-0.{name}:{_PORT}", num_processes, index), "JOB_COMPLETION_INDEX")


def _tpu(env, fetch) -> Place:
    import http.client  # as slow to import as all the rest of the command line

    def ask(name):
        try:
            return fetch(f"attributes/{name}")
        except (OSError, http.client.HTTPException) as error:
            if name == "tpu-env" and getattr(error, "code", 0) == 404:
                return ""  # not a slice of several
            raise UserError(
                f"hosts: --coordinator tpu: the metadata server does not tell {name} ({error}); "
                "it does on a Cloud TPU VM, elsewhere give --coordinator HOST:PORT"
            ) from error

    lines = (line.partition(":") for line in ask("tpu-env").splitlines())
    known = {key.strip(): value.strip().strip("'") for key, _, value in lines}
    known |= {"agent-worker-number": ask("agent-worker-number"), **env}
    # An entry is a host, or "name:number:address".
    hosts = [entry.rpartition(":")[2] for entry in ask("worker-network-endpoints").split(",")]
    read = _reader(known, "tpu", "Cloud TPU VMs have it")
    return _slices(read, hosts, read("agent-worker-number", int), "agent-worker-number")


def _slices(read, hosts: list[str], worker: int, what: str) -> Place:
    """Processes count through the hosts of slice 0, then of slice 1; all slices are of one size."""
    slices = read("MEGASCALE_NUM_SLICES", int, 1)
    first, number = hosts[0], 0
    if slices > 1:
        first, number = read("MEGASCALE_COORDINATOR_ADDRESS"), read("MEGASCALE_SLICE_ID", int)
    _checked(Place("", slices, number), "MEGASCALE_SLICE_ID")
    _checked(Place("", len(hosts), worker), what)
    return Place(f"{first.partition(':')[0]}:{_PORT}", slices * len(hosts), number * len(hosts) + worker)


def _reader(env, who: str, where: str):
    """(name, type, default) → what a variable says. Raises UserError if it says nothing or no number."""

    def read(name, kind=str, default=None):
        text = env.get(name, "").strip()
        if not text and default is not None:
            return default
        if not text:
            raise UserError(f"hosts: --coordinator {who}: {name} is not set; {where}")
        if kind is int and not text.isdecimal():
            raise UserError(f"hosts: --coordinator {who}: {name} must be a number, got {text!r}")
        return kind(text)

    return read


def _checked(place: Place, what: str) -> Place:
    if not place.process_id < place.num_processes:
        raise UserError(f"hosts: {what}={place.process_id} is not below {place.num_processes}, how many there are")
    return place


def join(
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    join_timeout: int = 300,
    peer_timeout: int = 100,
) -> None:
    """Brings the processes of a run together; a single process needs nothing and does nothing.

    Args:
      coordinator, num_processes, process_id: as `find` takes them.
      join_timeout: seconds to wait for the others.
      peer_timeout: seconds without a sign of life after which another process is lost (`peers`).

    Ends process 0, with a line and the code of a Missing, when others have not come in time.

    Raises:
      UserError: as `find`, or if the port is taken.
      peers.Missing: if the coordinator does not answer in time.
    """
    place = find(coordinator, num_processes, process_id)
    if place is None:
        return
    who = f"process {place.process_id} of {place.num_processes}"
    if place.process_id > 0:
        _await_coordinator(place.coordinator, who, join_timeout)
    else:
        _check_free(place.coordinator)
    import jax

    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would catch SIGTERM, which has the loop save and leave, and before that must end the process at once.
    jax.config.update("jax_enable_preemption_service", False)
    what = f"hosts: {who} waited {join_timeout} s at {place.coordinator} for the others"
    giving_up = threading.Timer(join_timeout, _give_up, (what,))
    giving_up.daemon = True
    giving_up.start()
    with peers.losses_end_us():
        jax.distributed.initialize(
            place.coordinator,
            place.num_processes,
            place.process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=join_timeout + _GRACE,
            heartbeat_timeout_seconds=peer_timeout,
        )
    giving_up.cancel()


def _give_up(what: str) -> None:
    print(f"ddt-jax: {what}; start all of them within --join-timeout S", file=sys.stderr, flush=True)
    os._exit(peers.EXIT_ALONE)  # this thread has nobody to raise a Missing to


def _await_coordinator(address: str, who: str, timeout: int) -> None:
    """Returns once something listens there. (JAX itself aborts the process, with a stack trace, when nothing does.)"""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=max(end - time.monotonic(), 0.1)).close()
            return
        except OSError as error:  # a name that is not known yet among them: that of a pod which is being made
            if time.monotonic() >= end:
                reason = error.strerror or error
                raise peers.Missing(f"hosts: {who} could not join {address} in {timeout} s: {reason}") from error
            time.sleep(0.2)


def _check_free(address: str) -> None:
    """Raises UserError if another program has the port. (gRPC would share it, and mix up two runs.)"""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(address.rpartition(":")[2])))
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "another program has it" if taken else error
            raise UserError(f"hosts: process 0 cannot listen at {address}: {reason}; choose another port") from error
