"""What was written is read back before it counts, and no damage reaches a restored value. A state of a few arrays."""

import contextlib
import logging
import random
import resource
import shutil
import sys

import jax
import jax.numpy as jnp
import pytest

from ddt_jax import peers, settings
from ddt_jax.errors import UserError
from ddt_jax.training import checkpoint
from ddt_jax.training.checkpoint import Checkpoints
from ddt_jax.training.state import TrainState
from ddt_jax.training.stored import LIST, Damaged, Stored


def at(step):
    w, zeros = jax.random.normal(jax.random.key(step), (60, 50)), jnp.zeros(2, jnp.int32)
    extra = {"codes": w[:5].astype(jnp.bfloat16), "started": jnp.array(True)}
    return TrainState(jnp.int32(step), {"w": w}, {"mu": w * w}, None, extra, jnp.zeros(2, jnp.uint32), zeros)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    points = Checkpoints(workdir, settings.Train(keep_checkpoints=3))
    for step in (1, 2, 3):
        points.save(at(step), {"config": "tree"})
    points.close()
    return workdir


@pytest.fixture
def saved(tmp_path, saved_once):
    """A run of its own for each test, to be damaged."""
    shutil.copytree(saved_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def restore(workdir):
    notes, abstract = [], jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), at(0))
    points = Checkpoints(workdir, settings.Train(), notes.append)
    try:
        return points.restore(abstract), notes
    finally:
        points.close()


def largest(workdir, step):
    files = [p for p in (workdir / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_a_checkpoint_counts_once_its_files_are_listed(saved):
    folder = saved / "checkpoints" / "3"
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {LIST}
    assert set(Stored(folder).listed()) == files and Stored(folder).array_problems() == []
    (folder / LIST).unlink()  # as if killed before it was read back: the next run makes up for it
    restore(saved)
    assert Stored(folder).file_problem() is None


def test_what_does_not_read_back_ends_the_run_and_pushes_nothing_out(saved, monkeypatch):
    def damaged_first(folder):
        if folder.exists():
            file = largest(saved, folder.name)
            file.write_bytes(bytes([file.read_bytes()[0] ^ 4]) + file.read_bytes()[1:])
        return folder.exists()

    monkeypatch.setattr(checkpoint, "is_committed", damaged_first)
    points = Checkpoints(saved, settings.Train(keep_checkpoints=1))
    points.save(at(4), {})
    with pytest.raises(UserError, match=r"checkpoint: is damaged: .*; earlier checkpoints are unharmed"):
        points.wait()
    points.close()
    monkeypatch.undo()
    assert points.steps() == [1, 2, 3, 4] and not Stored(saved / "checkpoints" / "4").is_read_back


def test_a_full_disk_is_one_line_and_leaves_the_earlier_ones(saved, monkeypatch, caplog):
    unraisable, was_quiet = [], logging.getLogger("absl").level
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    points = Checkpoints(saved, settings.Train(keep_checkpoints=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # no file may grow further: as on a full disk
    try:
        with pytest.raises(UserError, match="checkpoint: cannot be written to .*; earlier checkpoints are unharmed"):
            points.save(at(4), {})
            points.wait()
        with contextlib.suppress(UserError):
            points.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not unraisable and not [r for r in caplog.records if r.name == "absl"]  # nothing beside that line
    assert logging.getLogger("absl").level == was_quiet and sys.unraisablehook == unraisable.append
    back, notes = restore(saved)
    assert int(back.step) == 3 and notes == []


def test_a_failed_save_surfaces_at_the_next_check(saved, monkeypatch):
    points = Checkpoints(saved)
    points.check()
    error = OSError(28, "No space left on device")
    monkeypatch.setattr(points._manager, "check_for_errors", lambda: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match="No space left on device; earlier"):
        points.check()
    monkeypatch.undo()
    points.close()


def test_a_peer_that_died_is_not_taken_for_a_full_disk(saved, monkeypatch):
    points = Checkpoints(saved)
    error = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:13549")
    monkeypatch.setattr(points._manager, "check_for_errors", lambda: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match="cannot be written"):  # one process has no peers
        points.check()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(peers, "has_joined", lambda: True)
    with pytest.raises(ValueError, match="Gloo"):
        points.check()
    points.abandon()
    points.close()


@pytest.mark.parametrize("read_back", [True, False])
def test_no_flipped_bit_reaches_a_restored_value(saved, read_back):
    """Over all files of a checkpoint, as its files or, killed before it was read back, its arrays show.

    `tools/chaos.py --flips 200` looks at more of them.
    """
    folder, rng = saved / "checkpoints" / "3", random.Random(0)
    if not read_back:
        (folder / LIST).unlink()
    original = {name: Stored(folder).read(name).tobytes() for name in Stored(folder).names()}
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    chosen = files * 2 if read_back else files + rng.choices(files, [f.stat().st_size for f in files], k=10)
    detected = 0
    for file in chosen:
        bit = rng.randrange(file.stat().st_size * 8)
        content = file.read_bytes()
        file.write_bytes(content[: bit // 8] + bytes([content[bit // 8] ^ (1 << bit % 8)]) + content[bit // 8 + 1 :])
        stored = Stored(folder)
        try:
            found = (stored.file_problem() if read_back and file.name != LIST else None) or stored.array_problems()
            if found:
                detected += 1
            else:
                assert {name: stored.read(name).tobytes() for name in stored.names()} == original, (file, bit)
        except Damaged:
            detected += 1
        file.write_bytes(content)
    if read_back:
        assert detected == len(chosen) - 2  # of the list itself: the arrays decide then, and they are whole
    else:
        assert detected >= 5


def test_old_checkpoints_go(tmp_path):
    points = Checkpoints(tmp_path, settings.Train(keep_checkpoints=2, keep_every=4))
    for step in range(1, 8):
        points.save(at(step), {})
        points.wait()
    assert points.steps() == [4, 6, 7]
    points.close()
