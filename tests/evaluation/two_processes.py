"""A script in two real processes over gloo, with two fake devices each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests import xla


def results(script: str, *arguments: str, timeout: float) -> list:
    """What each process prints last, as JSON. Its arguments are the coordinator's address, `arguments`, its number."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(2)}
    env["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "inf"  # each could read what the other has written in part
    command, root = [sys.executable, "-c", script, address, *arguments], Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, cwd=root, env=env) for i in range(2)
    ]
    try:
        return [json.loads(p.communicate(timeout=timeout)[0].splitlines()[-1]) for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.communicate()
