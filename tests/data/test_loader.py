import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.images import prepare
from ddt_jax.data.loader import Loader
from ddt_jax.data.permutation import Permutation
from ddt_jax.errors import UserError
from ddt_jax.settings import Data
from ddt_jax.tokenizers.caption_ids import CaptionBytes

SMALL = Data(image_size=4, threads=2, prefetch=3)


class Numbers:
    """Record i is a picture full of i; some are bad, some have no caption. Importable, so that workers get it too."""

    name, label_names = "numbers", None

    def __init__(self, count, bad=(), silent=()):
        self.count, self.bad, self.silent = count, frozenset(bad), frozenset(silent)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord("truncated JPEG")
        record = {"image": np.full((4, 4, 3), index % 251, np.uint8), "label": index + 1000}
        return record if index in self.silent else record | {"caption": f"number {index}"}

    def describe(self, index):
        return f"numbers row {index}"


def loader(count=23, bad=(), batch_size=6, seed=1, data=SMALL, silent=(), **options):
    return Loader(Numbers(count, bad, silent), data, batch_size=batch_size, seed=seed, **options)


def tolerant(**options):
    return Data(image_size=4, threads=2, prefetch=3, max_bad_fraction=1.0, **options)


def same(batch, other):
    assert batch.keys() == other.keys()
    for key in batch:
        np.testing.assert_array_equal(batch[key], other[key], err_msg=key)
        if isinstance(batch[key], np.ndarray):
            assert batch[key].dtype == other[key].dtype


@pytest.mark.parametrize("step", [2, 3, 9])
def test_batch_is_what_it_says(step):
    batch = loader().batch_at(step)  # step 3 lies in two epochs, step 9 in the third
    order = [Permutation(23, 1, g // 23)(g % 23) for g in range(6 * step, 6 * step + 6)]
    assert batch["index"].tolist() == order and batch["index"].dtype == np.int32
    assert batch["slot"].tolist() == list(range(6)) and batch["slot"].dtype == np.int32
    assert batch["label"].tolist() == [i + 1000 for i in order] and batch["label"].dtype == np.int32
    assert batch["image"].shape == (6, 4, 4, 3) and batch["image"].dtype == np.uint8
    assert batch["image"][:, 0, 0, 0].tolist() == order
    assert set(batch) == {"image", "slot", "index", "label"}


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.booleans())
def test_every_epoch_is_a_permutation_across_batch_borders(count, batch_size, epoch, shuffle):
    subject = loader(count, batch_size=batch_size, shuffle=shuffle)
    first, last = epoch * count // batch_size, (epoch + 1) * count // batch_size
    rows = np.concatenate([subject.batch_at(step)["index"] for step in range(first, last + 1)])
    start = epoch * count - first * batch_size
    assert sorted(rows[start : start + count]) == list(range(count))
    if not shuffle:
        assert rows[start : start + count].tolist() == list(range(count))


@pytest.mark.parametrize("hosts", [2, 3, 4])
@pytest.mark.parametrize("start", [0, 7])
def test_hosts_together_make_the_rows_of_one(hosts, start):
    options = {"bad": [3, 8], "batch_size": 12, "data": tolerant(crop="random", flip=True)}
    alone = loader(**options)
    shards = [loader(**options, shard_index=i, shard_count=hosts) for i in range(hosts)]
    iterators = [shard.iterate(start, start + 4) for shard in shards]
    for step in range(start, start + 4):
        parts = [next(iterator) for iterator in iterators]
        same(alone.batch_at(step), {key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    for iterator in iterators:
        iterator.close()


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("prefetch", [1, 8])
def test_threads_change_nothing(threads, prefetch):
    data = Data(image_size=4, threads=threads, prefetch=prefetch, max_bad_fraction=1, flip=True)
    subject = loader(bad=[5], data=data, with_captions=True)
    with subject.iterate(3, 20) as iterator:
        batches = list(iterator)
    assert len(batches) == 17
    for step, batch in enumerate(batches, start=3):
        same(batch, subject.batch_at(step))
        assert batch["caption"] == [f"number {i}" for i in batch["index"]]


def test_without_a_stop_it_goes_on_and_close_ends_its_threads():
    subject = loader()
    iterator = subject.iterate(1_000_000)
    for step in range(1_000_000, 1_000_030):
        same(next(iterator), subject.batch_at(step))
    iterator.close()
    iterator.close()
    assert list(iterator) == []
    deadline = time.monotonic() + 5
    while any("grain-prefetch" in t.name for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [t.name for t in threading.enumerate() if "grain-prefetch" in t.name]


def test_seeds_differ():
    assert loader(seed=1).batch_at(0)["index"].tolist() != loader(seed=2).batch_at(0)["index"].tolist()


def test_a_bad_record_is_redrawn_and_nothing_else_moves():
    clean, dirty = loader(), loader(bad=[4, 11, 17], data=tolerant())
    redrawn = set()
    for step in range(40):
        want, got = clean.batch_at(step), dirty.batch_at(step)
        touched = np.isin(want["index"], [4, 11, 17])
        np.testing.assert_array_equal(got["index"][~touched], want["index"][~touched])
        np.testing.assert_array_equal(got["image"][~touched], want["image"][~touched])
        assert not np.isin(got["index"], [4, 11, 17]).any()
        np.testing.assert_array_equal(got["image"][:, 1, 1, 1], got["index"])
        np.testing.assert_array_equal(got["label"], got["index"] + 1000)
        redrawn |= set(got["index"][touched].tolist())
        same(got, loader(bad=[4, 11, 17], data=tolerant()).batch_at(step))
    assert len(redrawn) > 8  # drawn anew for each step and slot, not one stand-in
    assert dirty.stats.bad >= 40 * 6 * 3 // 23
    assert dirty.stats.seen == 240 + dirty.stats.bad


def test_two_slots_of_a_step_are_redrawn_apart():
    batch = loader(count=1000, bad=range(500), batch_size=40, data=tolerant()).batch_at(0)
    first = [Permutation(1000, 1, 0)(g) for g in range(40)]
    redrawn = [int(index) for index, was in zip(batch["index"], first, strict=True) if was < 500]
    assert len(redrawn) > 10 and len(set(redrawn)) > len(redrawn) - 3


def test_augmentation_is_keyed_by_step_and_slot():
    class Wide(Numbers):
        def __getitem__(self, index):
            return {"image": np.arange(4 * 32 * 3, dtype=np.uint8).reshape(4, 32, 3)}

    data = Data(image_size=4, crop="random", flip=True)
    subject = Loader(Wide(9), data, batch_size=9, seed=0)
    batch, again, later = subject.batch_at(0), subject.batch_at(0), subject.batch_at(1)
    same(batch, again)
    assert len({image.tobytes() for image in batch["image"]}) > 4
    assert (batch["image"] != later["image"]).any()
    centre = prepare(Wide(1)[0]["image"], data)
    (evaluated,) = subject.eval_batches(9, 9)
    assert (evaluated["image"] == centre).all()


def test_captions_are_demanded_only_when_asked_for():
    silent = loader(silent=range(5), data=tolerant())
    silent.batch_at(0)
    silent.batch_at(1)
    assert silent.stats.bad == 0
    asked = loader(silent=range(5), data=tolerant(), with_captions=True)
    for step in range(4):
        batch = asked.batch_at(step)
        assert batch["caption"] == [f"number {i}" for i in batch["index"]] and (batch["index"] >= 5).all()
    assert asked.stats.bad >= 5 and {why for _, why in asked.stats.examples} == {"no caption"}
    assert "could not be used (first: numbers row " in asked.report()


def test_report_and_log_name_the_record(caplog):
    subject = loader(count=2000, bad=[7], batch_size=500, shuffle=False)
    assert subject.report() is None
    with caplog.at_level(logging.WARNING, "ddt_jax.data"), subject.iterate(0, 4) as iterator:
        list(iterator)
    assert caplog.messages == ["data: numbers row 7: truncated JPEG; left out"]
    assert subject.report() == (
        "data: 1 of 2,001 images could not be decoded (first: numbers row 7: truncated JPEG); redrawn. "
        "Limit data.max_bad_fraction=0.001 not reached."
    )


def test_too_many_bad_records_end_the_run_in_the_consumer():
    subject = loader(count=2000, bad=range(0, 2000, 100), batch_size=100, shuffle=False)
    with pytest.raises(UserError) as error, subject.iterate(0, 100) as iterator:
        for _ in iterator:
            pass
    # 1,000 images are seen before the rate is judged: ten batches, each with one bad record and its redraw.
    assert 1000 <= subject.stats.seen < 1120
    assert str(error.value).startswith("data: 10 of 1,010 images could not be decoded (first: numbers row 0: truncated")
    assert "data.max_bad_fraction=0.001" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("limit", "seen"), [(0.0, 1), (0.2, 5)])
def test_a_small_limit_is_judged_early(limit, seen):
    data = Data(image_size=4, max_bad_fraction=limit)
    subject = loader(bad=range(0, 23, 2), batch_size=1, data=data, shuffle=False)
    with pytest.raises(UserError):
        for step in range(20):
            subject.batch_at(step)
    assert seen <= subject.stats.seen <= seen + 4


@pytest.mark.parametrize("limit", [0.001, 1.0])
def test_nothing_readable_ends_at_once(limit):
    subject = loader(bad=range(23), data=Data(image_size=4, max_bad_fraction=limit))
    with pytest.raises(UserError, match="none of 100 images tried from numbers could be used .first: numbers row"):
        subject.batch_at(0)
    with pytest.raises(UserError, match="none of 100"), subject.iterate(0) as iterator:
        next(iterator)
    with pytest.raises(UserError, match="could not be decoded"):
        list(loader(bad=range(23), data=Data(image_size=4)).eval_batches(23, 23))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_sees_each_record_once_and_says_what_is_padding(shuffle, hosts):
    parts = []
    for host in range(hosts):
        options = {"shard_index": host, "shard_count": hosts, "shuffle": shuffle, "data": tolerant(flip=True)}
        parts.append(list(loader(bad=[3], **options).eval_batches(20, 8)))
    assert [len(part) for part in parts] == [3] * hosts
    rows = [{key: np.concatenate([part[i][key] for part in parts]) for key in parts[0][i]} for i in range(3)]
    index = np.concatenate([batch["index"] for batch in rows])
    valid = np.concatenate([batch["valid"] for batch in rows])
    want = [Permutation(23, 1, 0)(i) if shuffle else i for i in range(20)]
    assert valid.tolist() == [i != 3 for i in want] + [False] * 4
    assert index.tolist() == [i if i != 3 else -1 for i in want] + [-1] * 4
    images = np.concatenate([batch["image"] for batch in rows])
    assert (images[valid][:, 0, 0, 0] == index[valid]).all() and not images[~valid].any()


def test_evaluation_of_more_than_there_is():
    subject = loader()
    batches = list(subject.eval_batches(10_000, 10))
    assert sum(batch["valid"].sum() for batch in batches) == 23 and len(batches) == 3
    assert subject.stats.seen == 23


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match="train.batch_size=6 does not divide among 4 hosts"):
        loader(shard_count=4)
    with pytest.raises(UserError, match="evaluate.batch_size=5"):
        list(loader(shard_count=2).eval_batches(5, 5))
    with pytest.raises(UserError, match="0 images"):
        loader(count=0)


def test_cifar10_from_the_files(data_dir):
    source = open_source(f"parquet:{data_dir}/cifar10/train-*.parquet")
    subject = Loader(source, Data(), batch_size=64, seed=0, with_captions=True)
    with subject.iterate(5, 9) as iterator:
        for step, batch in enumerate(iterator, start=5):
            same(batch, subject.batch_at(step))
            for row, index in enumerate(batch["index"]):
                name = source.label_names[batch["label"][row]]
                assert name in batch["caption"][row] and source[int(index)]["label"] == batch["label"][row]
    assert subject.stats.bad == 0


def run(code, **options):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **options.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, **options)


def test_loading_creates_no_jax_backend():
    code = """
import sys
import numpy as np
from ddt_jax.data.loader import Loader
from ddt_jax.settings import Data

class Blank:
    name = "blank"
    def __len__(self):
        return 9
    def __getitem__(self, index):
        return {"image": np.zeros((8, 8, 3), np.uint8)}

loader = Loader(Blank(), Data(image_size=8), batch_size=8, seed=0)
with loader.iterate(0, 3) as iterator:
    assert len(list(iterator)) == 3
bridge = sys.modules.get("jax._src.xla_bridge")
print(bool(bridge and bridge.backends_are_initialized()))
"""
    process = run(code)
    assert process.communicate(timeout=120)[0].strip() == "False" and process.returncode == 0


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(parent):
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.add(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_and_leave_with_close(workers):
    subject = loader(bad=[5], data=tolerant(flip=True, workers=workers), with_captions=True)
    before = children(os.getpid())
    with subject.iterate(3) as iterator:
        for step in range(3, 23):
            same(next(iterator), subject.batch_at(step))
        processes = children(os.getpid()) - before
    assert len(processes) >= workers
    # Python's own resource tracker stays as long as this process; it is not a worker.
    left = [pid for pid in processes if alive(pid)]
    assert not [pid for pid in left if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]
    assert subject.stats.bad > 0


@pytest.mark.slow
def test_an_error_of_the_user_comes_through_from_a_worker():
    subject = loader(bad=range(23), data=tolerant(workers=1))
    with pytest.raises(UserError, match="none of 100 images"), subject.iterate(0) as iterator:
        next(iterator)


WITH_WORKER = """
import time
from ddt_jax.data.base import open_source
from ddt_jax.data.loader import Loader
from ddt_jax.settings import Data
loader = Loader(open_source("digits:train", image_size=8), Data(image_size=8, workers=1), batch_size=8, seed=0)
iterator = loader.iterate(0)
next(iterator)
try:
    print("ready", flush=True)  # inside: from here on the test may interrupt
    while True:
        next(iterator)
        time.sleep(0.01)
except KeyboardInterrupt:
    iterator.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_run(how):
    process = run(WITH_WORKER, stderr=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.readline() == "ready\n"
        workers = children(process.pid)
        assert len(workers) >= 1
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # what Ctrl-C does: everyone gets it
        else:
            os.kill(process.pid, how)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (0 if how == signal.SIGINT else -9)
        assert "Traceback" not in errors
        deadline = time.monotonic() + 20
        while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in workers if alive(pid)]
    finally:
        with contextlib.suppress(ProcessLookupError):  # a failure here must not leave a loop behind
            os.killpg(process.pid, signal.SIGKILL)


def test_captions_as_bytes_are_part_of_a_batch_and_must_fit():
    source = open_source("scenes:train")
    found = [Loader(source, tolerant(), batch_size=8, seed=0, caption_ids=CaptionBytes(z)) for z in (192, 60)]
    batch = found[0].batch_at(0)
    texts = [bytes(row).rstrip(b"\0").decode() for row in batch["caption_ids"]]
    assert batch["caption_ids"].shape == (8, 192) and batch["caption_ids"].dtype == np.uint8
    assert texts == [source[int(i)]["caption"] for i in batch["index"]]
    assert (found[1].batch_at(0)["caption_ids"] != 0).any(axis=1).all()
    assert any("more than model.caption_bytes=60" in why for _, why in found[1].stats.examples)
    (held_out,) = found[0].eval_batches(3, 4)
    assert held_out["caption_ids"][:3].any(axis=1).all() and not held_out["caption_ids"][3].any()


class One:
    """A single record."""

    name, label_names = "one", None

    def __init__(self, **fields):
        self.record = {"image": np.zeros((4, 4, 3), np.uint8)} | fields

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.record

    def describe(self, index):
        return "the one"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"label": 2**31}, "class 2147483648 is not a number between 0 and 2^31 - 1"),
        ({"label": -2}, "class -2 is not"),
        ({"label": "dog"}, "class 'dog' is not a number"),
        ({"caption": b"x"}, "a caption that is no text"),
        ({"caption": "x" * (1 << 20)}, "a caption of 1048576 bytes, more than model.caption_bytes=64"),
    ],
)
def test_what_fits_no_batch_is_a_bad_record(fields, why):
    source = One(**{"caption": "x", **fields})
    loader = Loader(source, SMALL, batch_size=1, seed=0, caption_ids=CaptionBytes(64))
    with pytest.raises(UserError, match=re.escape(f"first: the one: {why}")):
        loader.batch_at(0)
