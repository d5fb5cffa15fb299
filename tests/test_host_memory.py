"""What a step allocates comes in huge pages: few faults, in a process that is started as it was, but for one option."""

import json
import os
import subprocess
import sys

import pytest

from ddt_jax import host_memory

# What XLA does in its threads: blocks too large for a thread's own heap, allocated, written and freed.
PROGRAM = """
import ctypes, json, os, resource, sys, threading
from ddt_jax import host_memory
if sys.argv[1] == "huge":
    host_memory.use_huge_pages()
c = ctypes.CDLL(None)
c.malloc.argtypes, c.malloc.restype, c.free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
size = 128 << 20
def work():
    for _ in range(5):
        block = c.malloc(size)
        ctypes.memset(block, 1, size)
        c.free(block)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
tunables = os.environ.get("GLIBC_TUNABLES")
print(json.dumps({"faults": faults, "argv": sys.argv, "tunables": tunables, "pid": os.getpid()}))
"""
helps = pytest.mark.skipif(not host_memory._helps(), reason="this C library or kernel gives no huge pages on advice")


def child(*args, tunables=None):
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    command = [sys.executable, "-c", PROGRAM, *args]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 0
    return {**json.loads(out), "started": started.pid}


@helps
def test_blocks_cause_few_page_faults():
    found = child("huge", "two words")
    assert found["faults"] < 5000 < child("usual")["faults"]  # 5 blocks of 128 MB: 320 pages of 2 MB, 160,000 of 4 KB
    assert found["argv"] == ["-c", "huge", "two words"] and found["pid"] == found["started"]
    assert found["tunables"] == "glibc.malloc.hugetlb=1"


@helps
def test_other_choices_of_the_environment_stay():
    assert child("huge", tunables="glibc.malloc.arena_max=3")["tunables"] == (
        "glibc.malloc.arena_max=3:glibc.malloc.hugetlb=1"
    )
    assert child("huge", tunables="glibc.malloc.hugetlb=0")["tunables"] == "glibc.malloc.hugetlb=0"


@pytest.mark.parametrize("choice", ["[always] madvise never", "always madvise [never]", None])
def test_a_process_goes_on_where_the_kernel_has_decided(choice, tmp_path, monkeypatch):
    kernel = tmp_path / "enabled"
    if choice:
        kernel.write_text(choice)
    monkeypatch.setattr(host_memory, "_KERNEL", kernel)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started anew"))
    host_memory.use_huge_pages()
    assert "GLIBC_TUNABLES" not in os.environ
