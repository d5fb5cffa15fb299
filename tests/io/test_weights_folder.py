"""Folders of weights: read as the safetensors package reads them, one array at a time."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from fsspec.implementations.memory import MemoryFile

from ddt_jax.errors import UserError
from ddt_jax.io import weights_folder
from tests.data.conftest import bucket  # noqa: F401, a fixture

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.ones((5,), ml_dtypes.bfloat16),
    "c": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
}


def test_files_are_filled_in_order_and_the_index_places_every_array(tmp_path):
    weights_folder.save(tmp_path, ARRAYS, file_bytes=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 48 + 10 + 24
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(tmp_path / "model-00002-of-00002.safetensors")["c"], ARRAYS["c"]
    )
    found = weights_folder.load(tmp_path)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {n: (x.shape, x.dtype) for n, x in ARRAYS.items()}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(np.asarray(found[name]), array)


def test_a_smaller_model_leaves_nothing_of_a_larger_one(tmp_path):
    weights_folder.save(tmp_path, ARRAYS, file_bytes=20)
    weights_folder.save(tmp_path, {"a": ARRAYS["a"]})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert weights_folder.load(tmp_path).keys() == {"a"}


def test_an_array_is_made_anew_each_time_and_must_be_what_it_says():
    made = []
    lazy = weights_folder.Lazy((2,), np.dtype(np.float32), lambda: made.append(1) or np.zeros(2, np.float32))
    assert np.asarray(lazy).shape == np.asarray(lazy).shape and len(made) == 2 and lazy.nbytes == 8
    with pytest.raises(ValueError, match="instead of"):
        np.asarray(weights_folder.Lazy((3,), np.dtype(np.float32), lambda: np.zeros(2, np.float32)))


def test_of_a_store_every_array_is_read_by_itself(tmp_path, bucket, monkeypatch):  # noqa: F811
    arrays = {f"{i}": np.full((64, 64), i, np.float32) for i in range(8)} | {"none": np.zeros((0, 3), np.float32)}
    weights_folder.save(tmp_path, arrays | ARRAYS, file_bytes=70_000)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    root, whole, got = bucket(files), sum(map(len, files.values())), []
    read = MemoryFile.read
    monkeypatch.setattr(MemoryFile, "read", lambda *args: got.append(read(*args)) or got[-1], raising=False)
    found = weights_folder.load(root)
    assert sum(map(len, got)) < 0.1 * whole and found.keys() == (arrays | ARRAYS).keys()
    for name, array in (arrays | ARRAYS).items():
        np.testing.assert_array_equal(np.asarray(found[name]), array, strict=True)
    assert sum(map(len, got)) <= whole
    first = "model-00001-of-00002.safetensors"
    bucket({first: files[first][:-1]})
    with pytest.raises(UserError, match="ends before byte"):
        for lazy in found.values():
            np.asarray(lazy)
    with pytest.raises(UserError, match="is no safetensors file, or damaged"):
        weights_folder.load(root)


def test_missing_and_disagreeing_files_are_the_users_errors(tmp_path):
    with pytest.raises(UserError, match="holds neither"):
        weights_folder.load(tmp_path)
    weights_folder.save(tmp_path, ARRAYS, file_bytes=20)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["d"] = index["weight_map"].pop("a")
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="disagree on a, d"):
        weights_folder.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(UserError, match="no index of safetensors"):
        weights_folder.load(tmp_path)
    for strange in ("../model.safetensors", "/model.safetensors", "..", "", None):
        path.write_text(json.dumps({"weight_map": {"a": strange}}))
        with pytest.raises(UserError, match="is no file beside it"):
            weights_folder.load(tmp_path)
