import os

import pytest

from ddt_jax.io import atomic


def test_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.json"
    atomic.write_text(path, "one")
    atomic.write_text(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü"
    assert os.listdir(path.parent) == ["b.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_scratch(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    atomic.write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["b.json"]


def test_a_block_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "a" / "x.bin"
    with atomic.replacing(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError, match="stop"), atomic.replacing(path) as file:
        file.write(b"new")
        raise RuntimeError("stop")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["x.bin"]


def test_knows_object_stores():
    assert atomic.is_local("/tmp/x") and atomic.is_local("runs/x")
    assert not atomic.is_local("gs://bucket/x")
