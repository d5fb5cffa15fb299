"""A SLURM of one node, this machine, with its daemons as children: munged, slurmctld, slurmd (slurm-wlm of Debian)."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

_DAEMONS = ("munged", "slurmctld", "slurmd")

# Without cgroups and accounting, which need more of a machine than a container has. A job that is queued again waits
# until the credential of its last start has run out (cred_expire), which is two minutes by default.
_CONF = """
ClusterName=here
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Daemons that are not installed."""
    # Not every user has /usr/sbin on PATH.
    return [name for name in _DAEMONS if not _program(name)]


def _program(name):
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextmanager
def cluster(folder: Path, cpus: int):
    """Starts it with all its files in an empty folder (a short name: a socket is in it), and ends it.

    Args:
      cpus: tasks that it has room for.
    Yields:
      Variables under which its commands find it.
    """
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        ports = a.getsockname()[1], b.getsockname()[1]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(folder=folder, ports=ports, user=getpass.getuser(), cpus=cpus))
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o400)
    env = os.environ | {"SLURM_CONF": str(conf)}

    def asked(*command):
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout.strip()

    def start(name, *arguments):
        with (folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen([_program(name), *arguments], env=env, stdout=log, stderr=log)
        stack.callback(_end, process)
        return process

    def until(process, ready):
        end = time.monotonic() + 30
        while not ready():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{process.args[0]} has not started: {_last_words(folder)}")
            time.sleep(0.05)

    with ExitStack() as stack:
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "seed")]
        address = folder / "munge.socket"
        munged = start("munged", "--foreground", "--force", "--num-threads=1", f"--socket={address}", *files)
        until(munged, address.exists)
        controller = start("slurmctld", "-D", "-f", conf)
        until(controller, lambda: " is UP" in asked("scontrol", "ping"))
        node = start("slurmd", "-D", "-f", conf, "-N", "localhost")
        until(node, lambda: asked("sinfo", "-h", "-o", "%t") == "idle")
        stack.callback(_end_jobs, asked)
        yield {"SLURM_CONF": str(conf)}


def _last_words(folder):
    return [path.read_text()[-500:] for path in sorted(folder.glob("*.log"))]


def _end_jobs(asked):
    """A daemon that ends leaves the processes of its jobs alone."""
    asked("scancel", "--user", getpass.getuser())
    end = time.monotonic() + 20
    while asked("squeue", "-h") and time.monotonic() < end:
        time.sleep(0.1)


def _end(process):
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
