"""A source that returns errors for a while gives what it would have given; one that stays away ends in one line."""

import errno
import itertools
import json
import logging
import os
import pickle
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddt_jax.data import array_record, files, folder, patience
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.loader import Loader
from ddt_jax.data.patience import Patience, is_passing
from ddt_jax.errors import Away, UserError
from ddt_jax.settings import Data
from tests.data.test_webdataset import tar_of

PASSES = OSError(errno.EIO, os.strerror(errno.EIO))


class Clock:
    """Time that passes only in sleep."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(patience, "time", found)
    return found


class Store(Exception):  # noqa: N818
    __module__ = "gcsfs.retry"


class NoCredentialsError(Exception):
    __module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (PASSES, True),
        (OSError(errno.ESTALE, "x"), True),
        (TimeoutError("slow"), True),
        (ConnectionResetError(), True),
        (Store("503"), True),
        (RuntimeError("pread() failed: Input/output error; reading a; at byte 7"), True),  # as ArrayRecord says it
        (FileNotFoundError(errno.ENOENT, "x"), False),
        (PermissionError(errno.EACCES, "x"), False),
        (OSError(errno.ENOSPC, "x"), False),
        (OSError("Corrupt page"), False),  # as pyarrow says that it cannot decode
        (NoCredentialsError(), False),
        (RuntimeError("Invalid hash"), False),
        (ValueError("Input/output error"), False),
        (BadRecord("truncated JPEG"), False),
        (UserError("x"), False),
    ],
)
def test_what_passes_and_what_does_not(error, passes):
    assert is_passing(error) is passes


def failing(times, error=PASSES, then="data"):
    """A read that fails so many times first."""
    left = itertools.count(times, -1)

    def read():
        if next(left) > 0:
            raise error
        return then

    return read


def test_waits_grow_to_a_limit_and_are_never_the_same_for_all_hosts(clock):
    assert Patience("s", 1e6).record(failing(12), "row 3") == "data"
    longest = [min(10.0, 0.1 * 2**i) for i in range(12)]
    assert len(clock.slept) == 12
    assert all(w / 2 <= slept <= w for slept, w in zip(clock.slept, longest, strict=True))
    assert len({patience.wait(20) for _ in range(50)}) > 40


@pytest.mark.parametrize("seconds", [0.0, 7.0])
def test_no_read_is_tried_for_longer_than_said(clock, seconds):
    with pytest.raises(BadRecord, match=f"Input/output error, again and again for {seconds:g} s"):
        Patience("s", seconds).record(failing(10**6), "row 3")
    assert sum(clock.slept) == pytest.approx(seconds)


def test_one_record_that_stays_away_is_bad_and_a_source_that_does_ends_the_run():
    subject = Patience("folder:x", 9)
    for _ in range(3):  # other reads succeed in between
        with pytest.raises(BadRecord):
            subject.record(failing(10**6), "a.png")
        assert subject.record(failing(0), "b.png") == "data"
    with pytest.raises(BadRecord):
        subject.record(failing(10**6), "a.png")
    line = (
        r"^data: folder:x gives errors only, for 9 s now \(data.retry_seconds\), the last at c.png: Input/output error"
    )
    with pytest.raises(Away, match=line):
        subject.record(failing(10**6), "c.png")
    with pytest.raises(Away, match="the last at folder:x: Input/output error"):
        Patience("folder:x", 9).opening(failing(10**6))


def test_what_does_not_pass_is_raised_at_once(clock):
    subject = Patience("s", 100)
    for error in (FileNotFoundError(errno.ENOENT, "gone"), BadRecord("no"), UserError("no")):
        for call in (subject.opening, lambda read: subject.record(read, "row 3")):
            with pytest.raises(type(error)):
                call(failing(1, error))
    assert clock.slept == []


def test_the_log_counts_and_stays_short(caplog):
    caplog.set_level(logging.WARNING, "ddt_jax.data")
    subject = Patience("s", 100)
    for row in range(120):
        subject.record(failing(1), f"row {row}")
    assert subject.retries == 120
    said = [record.message for record in caplog.records]
    counted = [
        re.search(r"row (\d+): Input/output error; read again .so far (\d+) times", line).groups() for line in said
    ]
    assert counted == [("0", "1"), ("9", "10"), ("99", "100")]
    caplog.clear()
    subject.record(failing(8), "row 7")
    assert [record.message.split(";")[-1].split(" for ")[0].strip() for record in caplog.records] == [
        "tried again",
        "data: row 7 is read again after " + caplog.records[-1].message.split("after ")[1],
    ]


def test_a_copy_for_another_process_counts_for_itself():
    subject = Patience("s", 100)
    subject.record(failing(3), "row 3")
    copy = pickle.loads(pickle.dumps(subject))
    assert (copy.name, copy.seconds, copy.retries) == ("s", 100, 0)


@pytest.fixture
def source_of(tmp_path, encode, monkeypatch):
    """kind → (a source of 6 pictures with captions, what makes its next so many reads of the file system fail)."""
    pictures = [encode(seed=i) for i in range(6)]
    failures = []

    def fail(times):
        failures[:] = [PASSES] * times
        return failures

    def flaky(real):
        def call(*args, **options):
            if failures:
                raise failures.pop()
            return real(*args, **options)

        return call

    def make(kind, **options):
        root = tmp_path / kind
        root.mkdir()
        if kind == "webdataset":
            members = [(f"{i}.png", data) for i, data in enumerate(pictures)]
            (root / "a").write_bytes(tar_of(members + [(f"{i}.txt", b"text") for i in range(6)]))
            monkeypatch.setattr(files.os, "pread", flaky(os.pread))
        elif kind == "folder":
            for i, data in enumerate(pictures):
                (root / f"{i}.png").write_bytes(data)
                (root / f"{i}.txt").write_bytes(b"text")
            monkeypatch.setattr(folder, "open", flaky(open), raising=False)
        elif kind == "karpathy":
            for i, data in enumerate(pictures):
                (root / f"{i}.png").write_bytes(data)
            said = {"split": "test", "sentences": [{"raw": "text"}]}
            (root / "a").write_text(json.dumps({"images": [said | {"filename": f"{i}.png"} for i in range(6)]}))
            monkeypatch.setattr(folder, "open", flaky(open), raising=False)
        elif kind == "arrayrecord":
            records = [{"image": data, "caption": "text"} for data in pictures]
            array_record.write_array_record(root / "a", records)
            # What the library makes of such an error: see the list above.
            words = RuntimeError("pread() failed: Input/output error; reading a; at byte 7")
            real = array_record.ArrayRecordSource._reader

            def reader(self, file):
                if failures:
                    failures.pop()
                    raise words
                return real(self, file)

            monkeypatch.setattr(array_record.ArrayRecordSource, "_reader", reader)
        else:
            images = pa.array([{"bytes": data, "path": "x"} for data in pictures])
            pq.write_table(pa.table({"image": images, "text": ["text"] * 6}), root / "a", row_group_size=2)
            monkeypatch.setattr(pq.ParquetFile, "read_row_group", flaky(pq.ParquetFile.read_row_group))
        where = root if kind == "folder" else root / "a"
        spec = f"parquet:{where}?cache_mb=0" if kind == "parquet" else f"{kind}:{where}"
        return open_source(spec, **options), fail

    return make


KINDS = ("webdataset", "folder", "karpathy", "arrayrecord", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_what_they_would_have_been(source_of, kind):
    source, fail = source_of(kind)
    loader = lambda: Loader(source, Data(image_size=8, flip=True), batch_size=4, seed=3)  # noqa: E731
    wanted = [loader().batch_at(step) for step in range(3)]
    hurt, found = loader(), []
    for step in range(3):
        failures = fail(7)
        found.append(hurt.batch_at(step))
        assert not failures  # all were met
    for there, here in zip(found, wanted, strict=True):
        for name in here:
            np.testing.assert_array_equal(there[name], here[name])
    assert hurt.stats.bad == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_source_is_one_line_and_one_dead_record_a_bad_one(source_of, kind):
    source, fail = source_of(kind, retry_seconds=30)
    fail(10**4)
    with pytest.raises(BadRecord, match="Input/output error.*again and again for 30 s"):
        source[0]
    fail(0)
    assert source[1]["caption"] == "text"
    fail(10**4)
    with pytest.raises(BadRecord):
        source[2]
    with pytest.raises(Away, match=rf"^data: {kind}:.* gives errors only, for 30 s now \(data.retry_seconds\)"):
        source[4]


def test_a_folder_that_cannot_be_listed_for_a_while_loses_no_file(tmp_path, encode, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encode())
    real, left = os.scandir, [PASSES] * 2

    def scandir(path):
        if str(path).endswith("/b") and left:
            raise left.pop()
        return real(path)

    monkeypatch.setattr(folder.os, "scandir", scandir)
    assert len(open_source(f"folder:{tmp_path}")) == 2 and not left


def test_a_bucket_that_is_slow_to_answer_is_asked_again(bucket, encode, monkeypatch):
    from tests.data import conftest

    root = bucket({"f/1.png": encode(), "f/2.png": encode(seed=1)})
    source = open_source(f"folder:{root}/f")
    left = [TimeoutError("no answer")] * 3
    real = conftest.Bucket._open

    def slow(self, *args, **options):
        if left:
            raise left.pop()
        return real(self, *args, **options)

    monkeypatch.setattr(conftest.Bucket, "_open", slow)
    assert source[1]["image"] == encode(seed=1) and not left


def test_what_is_too_large_or_no_file_is_a_bad_record(tmp_path, encode, monkeypatch):
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", 5000)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"x" * (files.MAX_TEXT_BYTES + 1))
    os.mkfifo(tmp_path / "b.png")
    os.symlink("c.png", tmp_path / "c.png")
    source = open_source(f"folder:{tmp_path}")
    for index, why in enumerate(["more than 1,048,576 bytes", "it is no file", "it cannot be read .Too many"]):
        with pytest.raises(BadRecord, match=why):
            source[index]
    (tmp_path / "t.tar").write_bytes(tar_of([("a.png", bytes(5001)), ("b.png", encode())]))
    source = open_source(f"webdataset:{tmp_path}/t.tar")
    with pytest.raises(BadRecord, match="image of 5001 bytes"):
        source[0]
    assert source[1]["image"] == encode()


def test_a_parquet_file_that_is_cut_off_meanwhile_gives_bad_records(tmp_path):
    images = [np.random.default_rng(i).bytes(100_000) for i in range(4)]
    pq.write_table(pa.table({"image": images}), tmp_path / "a", row_group_size=1)
    source = open_source(f"parquet:{tmp_path}/a")
    assert source[0]["image"] == images[0]
    os.truncate(tmp_path / "a", 1000)
    with pytest.raises(BadRecord, match="corrupt row group"):
        source[3]
