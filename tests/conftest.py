"""Set before JAX is imported: tests run on 8 fake CPU devices."""

import os
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# A shell's background jobs ignore Ctrl-C and hand that down; the programs that tests interrupt must not.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with real data; where it is missing, what needs it is skipped, in `.ci/run` it fails."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("DDT_JAX_DATA", root.parent / "shared" / "data"))
    if not path.is_dir():
        give_up = pytest.fail if os.environ.get("DDT_JAX_REQUIRE_DATA") == "1" else pytest.skip
        give_up(f"no data in {path}; set DDT_JAX_DATA")
    return path
