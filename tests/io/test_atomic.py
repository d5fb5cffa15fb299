import os
import resource

import pytest

from ddt_jax.errors import UserError
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


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    path, limits = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # no file may grow further: as on a full disk
    try:
        with open(path, "ab", buffering=0) as file:
            atomic.write_through(file, b"seven..")
            with pytest.raises(UserError, match=f"workdir: cannot write to {path}: File too large"):
                atomic.write_through(file, b"seven..")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"seven..sev"


def test_knows_object_stores():
    assert atomic.is_local("/tmp/x") and atomic.is_local("runs/x")
    assert not atomic.is_local("gs://bucket/x")
