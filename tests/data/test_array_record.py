import contextlib
import os
import pickle
import resource

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from ddt_jax.data import files
from ddt_jax.data.array_record import pack, unpack, write_array_record
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.errors import UserError


def test_what_is_written_comes_back(tmp_path, encode):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    records = [
        {"image": encode(), "caption": "hé", "label": np.int64(3)},
        {"image": pixels[:, ::-1]},
        {"image": encode(seed=2), "caption": " ", "meta": {"codes": [1, 2, 3]}},
    ]
    assert write_array_record(tmp_path / "b.array_record", records) == 3
    write_array_record(tmp_path / "a.array_record", [{"image": b"first"}])
    source = open_source(f"arrayrecord:{tmp_path}/*.array_record")
    source[0]
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 4 and source[0] == {"image": b"first"}
    assert source[1] == {"image": encode(), "caption": "hé", "label": 3}
    np.testing.assert_array_equal(source[2]["image"], pixels[:, ::-1])
    assert source[3] == {"image": encode(seed=2), "meta": {"codes": [1, 2, 3]}}
    assert source.describe(2) == "b.array_record record 1"


@given(st.binary(), st.text(), st.integers(-1, 2**40))
def test_packing_is_undone_by_unpacking(image, caption, label):
    record = unpack(pack({"image": image, "caption": caption, "label": label}))
    assert record["image"] == image and record["label"] == label
    assert record.get("caption", "") == caption.strip()


@given(st.binary(max_size=60))
def test_other_bytes_are_a_bad_record(data):
    with contextlib.suppress(BadRecord):
        assert "image" in unpack(data)


def test_wrong_shapes_and_floats():
    with pytest.raises(BadRecord):
        unpack(msgpack.packb({"image": b"123", "shape": [2, 2, 3]}))
    with pytest.raises(ValueError, match="float64"):
        pack({"image": np.zeros((2, 2, 3))})


def test_a_foreign_record_is_bad_and_its_neighbours_are_not(tmp_path, encode):
    writer = ArrayRecordWriter(str(tmp_path / "a"), "group_size:1")
    for data in (pack({"image": encode()}), b"\xc1 nonsense", pack({"image": encode(seed=1)})):
        writer.write(data)
    writer.close()
    source = open_source(f"arrayrecord:{tmp_path}/a")
    assert source[0]["image"] == encode() and source[2]["image"] == encode(seed=1)
    with pytest.raises(BadRecord, match="not a record"):
        source[1]


def test_a_damaged_chunk_is_a_bad_record(tmp_path):
    images = [np.random.default_rng(i).bytes(3000) for i in range(4)]
    path = tmp_path / "a"
    write_array_record(path, [{"image": image} for image in images])
    data = bytearray(path.read_bytes())
    at = data.index(images[1][100:120]) if images[1][100:120] in data else len(data) // 4
    data[at : at + 50] = bytes(50)
    path.write_bytes(data)
    source = open_source(f"arrayrecord:{path}")
    with pytest.raises(BadRecord, match="corrupt record|not a record"):
        assert source[1]["image"] == images[1]
    assert source[3]["image"] == images[3]


@pytest.mark.parametrize("keep", [0, 10, 40_000, -1, None])
def test_a_cut_off_file_and_another_format_are_refused(tmp_path, encode, keep):
    write_array_record(tmp_path / "a", [{"image": encode()}] * 50)
    data = (tmp_path / "a").read_bytes()[:keep] if keep is not None else b"hello" * 50_000
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UserError, match="a is cut off, damaged or not an ArrayRecord file"):
        open_source(f"arrayrecord:{tmp_path}/a")


@pytest.fixture
def many(tmp_path):
    def write(count):
        for i in range(count):
            write_array_record(tmp_path / f"{i:03d}", [{"image": bytes([i])}])
        return f"arrayrecord:{tmp_path}/*"

    return write


def test_few_files_are_open_at_once(many, monkeypatch):
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 3)
    spec, before = many(12), len(os.listdir("/proc/self/fd"))
    source = open_source(spec)
    for i in [*range(12), 0, 11, 5]:
        assert source[i] == {"image": bytes([i])}
        assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.fixture
def few_descriptors():
    """Call it: this process may open only so many files more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(more):
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + more, limits[1]))
        taken = []  # numbers that are free below
        with contextlib.suppress(OSError):
            while len(taken) < 10_000:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for number in taken[len(taken) - more :]:
            os.close(number)
        held.extend(taken[: len(taken) - more])

    held = []
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    for number in held:
        os.close(number)


def test_too_many_open_files_is_no_damage(many, few_descriptors):
    spec = many(12)
    open_source(spec)  # so that modules are there
    few_descriptors(6)
    with pytest.raises(UserError, match=r"cannot be opened: too many open files, .*; raise the limit, e.g. ulimit -n"):
        open_source(spec)


def test_too_many_open_files_while_reading_is_no_damage(many, few_descriptors, monkeypatch):
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 3)
    source = open_source(many(12))
    source[0]
    few_descriptors(0)
    with pytest.raises(BadRecord, match=r"^its file cannot be opened .Too many open files.$"):
        source[6]
