import gzip
import io
import json
import os
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ddt_jax.data import webdataset
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.images import decode
from ddt_jax.data.pictures import PictureRecords
from ddt_jax.errors import UserError
from ddt_jax.settings import Data


def tar_of(members, **options):
    """[(name or TarInfo, bytes)] -> bytes of an archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def member(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.fixture
def shard(tmp_path):
    def write(members, name="a.tar", **options):
        (tmp_path / name).write_bytes(tar_of(members, **options))
        return f"webdataset:{tmp_path}/{name}"

    return write


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_grouped_by_name(shard, encode, layout):
    long = "d/" * 60 + "é" if layout != tarfile.USTAR_FORMAT else "d/c"
    spec = shard(
        [
            ("b.txt", b" hello \n"),
            ("b.cls", b"3\n"),
            ("b.png", encode()),
            ("a.JPG", encode("JPEG")),
            ("a.seg.png", b"another part"),
            ("sub/a.webp", encode("WEBP")),
            ("sub/a.json", json.dumps({"caption": "from json", "label": 5}).encode()),
            (f"{long}.ppm", encode("PPM")),
            ("z.txt", b"no image"),
        ],
        format=layout,
    )
    source = open_source(spec)
    assert len(source) == 4
    assert source[0] == {"image": encode(), "caption": "hello", "label": 3}
    assert source[1] == {"image": encode("JPEG")}
    assert source[2] == {"image": encode("WEBP"), "caption": "from json", "label": 5}
    assert source[3] == {"image": encode("PPM")}
    assert source.describe(2) == "a.tar sample sub/a" and source.describe(3) == f"a.tar sample {long}"
    assert source.ignored == {"samples without an image": 1, ".seg.png members": 1}


def test_members_that_point_elsewhere_are_ignored_and_counted(shard, encode, capsys):
    spec = shard(
        [
            ("/abs.png", encode(seed=1)),
            ("../up.png", encode(seed=2)),
            ("x/../../up.png", encode(seed=3)),
            (member("soft.png", tarfile.SYMTYPE), b""),
            (member("hard.png", tarfile.LNKTYPE), b""),
            (member("pipe.png", tarfile.FIFOTYPE), b""),
            (member("folder.png", tarfile.DIRTYPE), b""),
            ("._good.png", b"finder dirt"),
            ("good.png", encode()),
            ("good.png", encode(seed=9)),
            ("a..b.png", encode()),
        ]
    )
    source = open_source(spec)
    assert len(source) == 1 and source[0]["image"] == encode()
    assert source.ignored == {
        "absolute paths": 1,
        "paths with ..": 2,
        "links": 2,
        "special members": 1,
        "hidden files": 1,
        "second members of one kind": 1,
        "..b.png members": 1,
    }
    assert "ignored" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "misnamed.tar"])
def test_compressed_shards_are_refused_with_the_command(tmp_path, encode, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(tar_of([("a.png", encode())])))
    with pytest.raises(UserError) as error:
        open_source(f"webdataset:{path}")
    assert f"gunzip -k {path}" in str(error.value)


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.9])
def test_a_cut_off_shard_is_refused(tmp_path, encode, keep):
    data = tar_of([(f"{i}.png", encode(size=(64, 64), seed=i)) for i in range(6)])
    end = data.rstrip(b"\0")
    (tmp_path / "a.tar").write_bytes(data[: int(len(end) * keep)])
    with pytest.raises(UserError, match="a.tar is damaged"):
        open_source(f"webdataset:{tmp_path}/a.tar")


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path, encode):
    data = bytearray(tar_of([(f"{i}.png", encode(seed=i)) for i in range(6)]))
    at = data.index(b"3.png")
    data[at : at + 400] = b"\xff" * 400
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=f"a.tar is damaged at byte {at}"):
        open_source(f"webdataset:{tmp_path}/a.tar")


def test_no_images_is_said_with_what_there_is(shard):
    with pytest.raises(UserError, match="holds no images.*1 .npy members"):
        open_source(shard([("a.npy", b"x")]))
    with pytest.raises(UserError, match="holds no images"):
        open_source(shard([], name="empty.tar"))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.cls", b"dog", "class b'dog' is not a number"),
        ("a.txt", b"\xff\xfe\xfa", "caption is not UTF-8"),
        ("a.json", b"[1", ".json is not an object"),
        ("a.json", b"[1]", ".json is not an object"),
        ("a.json", b"[" * 100_000, ".json is not an object"),
        ("a.json", b'{"caption": "\\ud800"}', "caption is not UTF-8"),
        ("a.txt", b"x" * (1 << 20) + b"y", ".txt of 1048577 bytes"),
    ],
)
def test_bad_companions_make_a_bad_record(shard, encode, name, data, reason):
    source = open_source(shard([("a.png", encode()), (name, data), ("b.png", encode())]))
    with pytest.raises(BadRecord) as error:
        source[0]
    assert str(error.value) == reason
    assert source[1] == {"image": encode()}


def test_an_empty_caption_is_no_caption(shard, encode):
    assert "caption" not in open_source(shard([("a.png", encode()), ("a.txt", b" \n")]))[0]


def test_index_is_built_once_outside_the_data(shard, encode, cache_home, capsys, monkeypatch, tmp_path):
    spec = shard([("a.png", encode()), ("a.txt", b"x")])
    open_source(spec)
    assert "indexing shard 1 of 1 a.tar: 1 images" in capsys.readouterr().err
    assert len(list((cache_home / "webdataset").iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "cache-home"]
    monkeypatch.setattr(webdataset, "build_index", None)
    assert open_source(spec)[0] == {"image": encode(), "caption": "x"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-30], lambda data: data.replace(b"a", b"b")])
def test_a_damaged_index_is_built_again(shard, encode, cache_home, damage, capsys):
    spec = shard([("a.png", encode())])
    open_source(spec)
    (index,) = (cache_home / "webdataset").iterdir()
    good = index.read_bytes()
    index.write_bytes(damage(good))
    assert open_source(spec)[0]["image"] == encode()
    assert "is damaged and is built again" in capsys.readouterr().err
    assert index.read_bytes() == good


def test_a_changed_shard_is_indexed_anew(shard, encode, tmp_path):
    open_source(shard([("a.png", encode())]))
    stat = os.stat(tmp_path / "a.tar")
    spec = shard([("c.png", encode(seed=5))])
    os.utime(tmp_path / "a.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_source(spec)[0]["image"] == encode(seed=5)


def test_a_cache_that_cannot_be_written_is_no_obstacle(shard, encode, tmp_path, capsys):
    (tmp_path / "taken").touch()
    source = open_source(shard([("a.png", encode())]), cache_dir=str(tmp_path / "taken"))
    assert source[0]["image"] == encode() and "could not be kept" in capsys.readouterr().err


def test_shards_follow_each_other_and_copies_travel(shard, encode, tmp_path):
    for i, name in enumerate(["b.tar", "a.tar"]):
        shard([(f"{i}.png", encode(seed=i)), (f"{i}x.png", encode(seed=i + 2))], name=name)
    source = open_source(f"webdataset:{tmp_path}/*.tar", cache_dir=str(tmp_path / "cache"))
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i]["image"] for i in range(4)] == [encode(seed=i) for i in (1, 3, 0, 2)]


def test_a_shard_that_shrinks_later_gives_bad_records(shard, encode, tmp_path):
    source = open_source(shard([("a.png", encode())]))
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(BadRecord, match="shard ends inside .image"):
        source[0]


def test_a_shard_that_disappears_gives_bad_records(shard, encode, tmp_path):
    source = open_source(shard([("a.png", encode())]))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BadRecord, match="shard cannot be read .No such file"):
        source[0]


def test_cifar10(data_dir, capsys):
    source = open_source(f"webdataset:{data_dir}/cifar10/test-*.tar")
    assert len(source) == 10_000 and source.ignored == {} and source.label_names[9] == "truck"
    with tarfile.open(data_dir / "cifar10" / "test-000000.tar") as tar:
        for index in (0, 1):
            want = {part: tar.extractfile(f"{index:06}.{part}").read() for part in ("jpg", "txt", "cls")}
            record = source[index]
            assert record["image"] == want["jpg"] and record["label"] == int(want["cls"])
            assert record["caption"] == want["txt"].decode()
    for index in range(0, 10_000, 501):
        record = source[index]
        assert decode(record["image"], Data()).shape == (32, 32, 3)
        assert record["caption"].endswith(source.label_names[record["label"]])


def test_captions_are_measured_without_reading_images(shard, monkeypatch):
    members = [m for i in range(20) for m in ((f"{i}.png", bytes(5000)), (f"{i}.txt", b"text"))]
    members += [("j.png", bytes(5000)), ("j.json", b'{"caption": "from json"}')]
    records = PictureRecords(shard(members), Data())
    read, real = [], os.pread

    def pread(*args):
        read.append(len(data := real(*args)))
        return data

    monkeypatch.setattr(webdataset.files.os, "pread", pread)
    found = [records.without_images(i) for i in range(21)]
    assert found == [{"caption": "text", "images": [None]}] * 20 + [{"caption": "from json", "images": [None]}]
    assert sum(read) == 20 * 4 + 24


def test_threads_read_side_by_side_and_none_loses_its_file(shard, tmp_path, monkeypatch):
    """With one file open at a time, each thread's is let go while it reads."""
    for i in range(8):
        shard([(f"{i}.png", bytes([i]) * 1000)], f"{i}.tar")
    source, real = open_source(f"webdataset:{tmp_path}/*.tar"), os.pread
    monkeypatch.setattr(webdataset.files, "MAX_OPEN_FILES", 1)
    together = threading.Barrier(8)  # which nobody passes alone

    def pread(*args):
        together.wait(timeout=20)
        return real(*args)

    monkeypatch.setattr(webdataset.files.os, "pread", pread)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: source[i]["image"], range(8))) == [bytes([i]) * 1000 for i in range(8)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1
