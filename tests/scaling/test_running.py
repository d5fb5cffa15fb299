"""What a program's exit code says of a step of a sweep or a comparison."""

import signal

import pytest

from ddt_jax.scaling import running


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [
        (0, "finished", ""),
        (75, "stopped", "asked to stop"),
        (-signal.SIGTERM, "stopped", "asked to stop"),
        (76, "stopped", "data: gone; start the run again when it is back"),
        (2, "failed", "data: gone; start the run again when it is back"),
        (-signal.SIGKILL, "failed", "train was killed by signal 9"),
    ],
)
def test_what_became_of_it(tmp_path, code, state, why):
    (tmp_path / "log").write_text("loss 1\nddt-jax: data: gone; start the run again when it is back\n\n")
    assert running.became(code, tmp_path / "log", "train") == (state, why)
