"""Set before JAX is imported: tests run on 8 fake CPU devices, in code that is compiled fast rather than well."""

import importlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests import xla

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla.flags(8, os.environ.get("XLA_FLAGS", ""))

# What a test or a process that it starts has compiled, later ones read, where the tier asks for it (`make test-slow`).
# The folder is a fresh one of this process, removed at its end: nothing comes from another session or worker.
COMPILED = None
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # nowhere: what `ddt-jax train` sets would be a test's workdir
if os.environ.get("DDT_JAX_KEEP_COMPILED") == "1":
    COMPILED = tempfile.mkdtemp(prefix="ddt_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# A shell's background jobs ignore Ctrl-C and hand that down; the programs that tests interrupt must not.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402


def pytest_unconfigure(config):
    if COMPILED:
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data; where it is missing, what needs it is skipped, in `.ci/run` it fails."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("DDT_JAX_DATA", root.parent / "shared" / "data"))
    if not path.is_dir():
        give_up = pytest.fail if os.environ.get("DDT_JAX_REQUIRE_DATA") == "1" else pytest.skip
        give_up(f"no data in {path}; set DDT_JAX_DATA")
    return path


@pytest.fixture(scope="session")
def oracle() -> Callable:
    """`oracle("torch")` imports a package that numbers are compared with; like `data_dir` where it is missing.

    Tests that use it are marked slow: `make test` does without these packages.
    """

    def load(name: str):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            give_up = pytest.fail if os.environ.get("DDT_JAX_REQUIRE_DATA") == "1" else pytest.skip
            give_up(f"{error.name} is not installed: pip install -e .[oracle] (transfusion_pytorch: .[transfusion])")

    return load
