"""Every source that reads files, from a bucket that epath believes to be s3."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddt_jax.data.array_record import write_array_record
from ddt_jax.data.base import open_source
from ddt_jax.data.loader import Loader
from ddt_jax.errors import UserError
from ddt_jax.settings import Data
from tests.data.test_webdataset import tar_of


def parquet_of(images):
    file = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([{"bytes": i, "path": "x"} for i in images])}), file, row_group_size=2)
    return file.getvalue()


def test_parquet(bucket, encode):
    images = [encode(seed=i) for i in range(5)]
    root = bucket({"set/a.parquet": parquet_of(images[:3]), "set/b.parquet": parquet_of(images[3:]), "x": b""})
    source = open_source(f"parquet:{root}/set/*.parquet")
    assert [source[i]["image"] for i in range(5)] == images and source.describe(3) == "b.parquet row 0"


def test_webdataset_and_its_index(bucket, encode, cache_home, capsys):
    members = [("a.png", encode()), ("a.txt", b"hi"), ("b.png", encode(seed=1))]
    root = bucket({"t/0.tar": tar_of(members), "t/classes.txt": b"x\ny\n"})
    for _ in range(2):
        source = open_source(f"webdataset:{root}/t/*.tar")
        assert source[0] == {"image": encode(), "caption": "hi"} and source[1] == {"image": encode(seed=1)}
        assert source.label_names == ("x", "y")
    assert capsys.readouterr().err.count("indexing") == 1
    # The bucket tells no time, so a new shard of the same size is known by its ends.
    bucket({"t/0.tar": tar_of([("z.png", encode()), *members[1:]])})
    assert open_source(f"webdataset:{root}/t/*.tar").describe(0) == "0.tar sample z"


def test_index_in_the_bucket(bucket, encode, capsys):
    root = bucket({"t/0.tar": tar_of([("a.png", encode())])})
    for _ in range(2):
        assert open_source(f"webdataset:{root}/t/0.tar", cache_dir=f"{root}/cache")[0]["image"] == encode()
    assert capsys.readouterr().err.count("indexing") == 1


def test_folder(bucket, encode):
    root = bucket({"f/cat/1.png": encode(), "f/cat/1.txt": b"purr", "f/dog/2.jpg": encode("JPEG")})
    source = open_source(f"folder:{root}/f")
    assert source[0] == {"image": encode(), "caption": "purr", "label": 0} and source[1]["label"] == 1


def test_array_record_is_copied_once(bucket, encode, tmp_path, capsys):
    write_array_record(tmp_path / "a", [{"image": encode()}])
    root = bucket({"r/a": (tmp_path / "a").read_bytes()})
    for _ in range(2):
        assert open_source(f"arrayrecord:{root}/r/a")[0]["image"] == encode()
    assert capsys.readouterr().err.count("copying") == 1
    with pytest.raises(UserError, match="must be a local folder"):
        open_source(f"arrayrecord:{root}/r/a", cache_dir=f"{root}/cache")


def test_missing_things_are_named(bucket, encode):
    root = bucket({"f/a.tar": tar_of([("a.png", encode())])})
    for spec, words in [
        (f"webdataset:{root}/f/b.tar", "did you mean a.tar?"),
        (f"webdataset:{root}/f/*.parquet", "holds a.tar"),
        (f"folder:{root}/g", "is not a folder"),
    ]:
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            open_source(spec)


def test_a_store_without_its_package_says_which():
    for spec, words in [("parquet:gs://b/*.parquet", "gcs"), ("folder:gs://b/x", "gcs")]:
        with pytest.raises(UserError, match=words):
            open_source(spec)


def test_the_loader_reads_the_same_from_bucket_and_disk(bucket, encode, tmp_path):
    data = parquet_of([encode(seed=i) for i in range(10)])
    (tmp_path / "a.parquet").write_bytes(data)
    batches = []
    for root in (bucket({"a.parquet": data}), tmp_path):
        loader = Loader(open_source(f"parquet:{root}/a.parquet"), Data(image_size=16), batch_size=4, seed=0)
        with loader.iterate(0, 4) as iterator:
            batches.append(list(iterator))
    for there, here in zip(*batches, strict=True):
        np.testing.assert_array_equal(there["image"], here["image"])
