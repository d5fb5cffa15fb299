"""Pictures to make files of, and a bucket that lives in memory."""

import io

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    """No test touches the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))
    return tmp_path / "cache-home" / "ddt_jax"


@pytest.fixture(scope="session")
def encode():
    """(kind, size) -> bytes of a smooth picture; the seed makes it another one."""

    def encoded(kind="PNG", size=(32, 32), seed=0, mode="RGB", **options):
        small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
        image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    return encoded


class Bucket(MemoryFileSystem):
    """s3:// in memory: what epath does with a store, without one."""

    protocol = "s3"
    store = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("s3:/")).rstrip("/")


@pytest.fixture
def bucket(monkeypatch):
    """Writes `{name: bytes}` into s3://bucket and returns that prefix."""
    known = dict(fsspec.registry.items())
    fsspec.register_implementation("s3", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.store.clear()

    def fill(contents):
        files = fsspec.filesystem("s3")
        for name, data in contents.items():
            files.pipe(f"s3://bucket/{name}", data)
        return "s3://bucket"

    yield fill
    Bucket.store.clear()
    fsspec.register_implementation("s3", known.get("s3", "s3fs.S3FileSystem"), clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
