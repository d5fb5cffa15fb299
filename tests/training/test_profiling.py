"""Profiles are files that stand in the run's folder, also of a window that the end of the run cuts."""

import io

import jax
import jax.numpy as jnp
import pytest

from ddt_jax.io import atomic
from ddt_jax.training.profiling import Profiler
from ddt_jax.training.progress import Progress


@pytest.mark.parametrize("local", [True, False])
def test_a_window_is_written_where_the_run_is(local, tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "is_local", lambda path: local)  # an object store, which the profiler cannot write to
    profiler, out = Profiler(tmp_path, first=10, steps=5), io.StringIO()
    with profiler.listening(Progress(20, 9, stream=out)):
        profiler.before(9)
        assert "profiling" not in out.getvalue()
        profiler.before(10)
        metrics = jnp.ones(3) + 1
        profiler.after(10, metrics)
        jax.block_until_ready(metrics)
    (found,) = (tmp_path / "profiles" / "10").rglob("*.xplane.pb")
    assert found.stat().st_size > 100
    assert "profile: " in out.getvalue()


def test_one_without_a_workdir_leaves_everything_alone():
    with Profiler().listening(Progress(20, 9, stream=None)):
        Profiler(first=10).before(10)
