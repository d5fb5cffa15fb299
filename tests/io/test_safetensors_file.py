"""Safetensors files against the safetensors package: the same bytes, and nothing that is damaged is read."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from ddt_jax.errors import UserError
from ddt_jax.io import safetensors_file

TYPES = (np.int64, np.float64, np.float32, np.int32, np.float16, np.int16, np.int8, np.uint8, np.bool_)


def arrays():
    """Every type, names whose order is not that of their arrays, an empty array, a scalar."""
    rng = np.random.default_rng(0)
    found = {f"{'zya'[i % 3]}.{i}": rng.normal(0, 9, (2, 3)).astype(dtype) for i, dtype in enumerate(TYPES)}
    return found | {"scalar": np.array(3, np.float32), "none": np.zeros((0, 4), np.float32), "é": np.ones(5, np.int8)}


def test_what_is_written_is_what_the_package_writes(tmp_path):
    path = safetensors_file.save(tmp_path / "sub" / "x.safetensors", arrays(), {"format": "pt"})
    assert path.read_bytes() == safetensors.numpy.save(arrays(), {"format": "pt"})


def test_what_the_package_writes_is_read_without_a_copy(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "x.safetensors")
    found = safetensors_file.load(tmp_path / "x.safetensors")
    assert found.keys() == arrays().keys()
    for name, value in arrays().items():
        np.testing.assert_array_equal(found[name], value, strict=True)
        assert not found[name].flags.owndata or not value.size


def test_bfloat16_and_arrays_that_are_not_contiguous_come_back(tmp_path):
    wanted = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16).T
    safetensors_file.save(tmp_path / "x.safetensors", {"a": wanted})
    np.testing.assert_array_equal(safetensors_file.load(tmp_path / "x.safetensors")["a"], wanted, strict=True)


def written(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not one", "is no safetensors file, or damaged"),
        (written(entry(), bytes(8), length=1 << 40), "header is longer than the file"),
        (written(b"{]", bytes(8)), "is no safetensors file, or damaged"),
        (written(b"[1]", bytes(8)), "is no safetensors file, or damaged"),
        (written(entry(), bytes(7)), "at 0:8 of 7 bytes"),
        (written(entry(shape=(3,)), bytes(8)), "is no safetensors file, or damaged"),
        (written(entry(offsets=(-8, 0)), bytes(8)), "is no safetensors file, or damaged"),
        (written({"a": {"dtype": "F32"}}, bytes(8)), "is no safetensors file, or damaged"),
        (written(entry(dtype="F8_E4M3"), bytes(8)), "holds arrays that are not read: a of type F8_E4M3"),
    ],
)
def test_files_that_are_damaged_or_strange_are_the_users_error(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        safetensors_file.load(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.safetensors: cannot be read: No such file"):
        safetensors_file.load(tmp_path / "none.safetensors")
