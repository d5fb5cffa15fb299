import json
import pickle
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.images import decode
from ddt_jax.errors import UserError
from ddt_jax.settings import Data


def write(path, columns, features=None, **options):
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)


def hf(images):
    return pa.array([image and {"bytes": image, "path": "x.png"} for image in images])


def test_hugging_face_layout_with_metadata(tmp_path, encode):
    images = [encode(seed=i) for i in range(6)]
    columns = {
        "thumb": hf([b"no"] * 6),
        "picture": hf(images),
        "kind": [0, 1, 2, 0, 1, 2],
        "text": ["a", " b ", "", None, "e", "f"],
    }
    features = {"picture": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["x", "y", "z"]}}
    write(tmp_path / "a.parquet", columns, features, row_group_size=4)
    source = open_source(f"parquet:{tmp_path}/*.parquet")
    assert len(source) == 6 and source.label_names == ("x", "y", "z")
    records = [source[i] for i in range(6)]
    assert [r["image"] for r in records] == images
    assert [r["label"] for r in records] == [0, 1, 2, 0, 1, 2]
    assert [r.get("caption") for r in records] == ["a", "b", None, None, "e", "f"]
    assert "caption" not in records[2]
    assert source.describe(5) == "a.parquet row 5"


def test_files_follow_each_other_by_name(tmp_path, encode):
    for name, seeds in (("b", [2]), ("a", [0, 1])):
        write(tmp_path / f"{name}.parquet", {"image": hf([encode(seed=s) for s in seeds])})
    source = open_source(f"parquet:{tmp_path}/*.parquet")
    assert [source[i]["image"] for i in range(3)] == [encode(seed=i) for i in range(3)]
    assert source.describe(2) == "b.parquet row 0"
    for outside in (3, -1):
        with pytest.raises(IndexError):
            source[outside]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_binary_column(tmp_path, encode, kind):
    write(tmp_path / "a.parquet", {"id": ["q"], "payload": pa.array([encode()], kind)})
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    assert source[0] == {"image": encode()}


def test_options_name_the_columns(tmp_path, encode):
    columns = {"a": [b"1"], "b": [encode()], "said": ["hello"], "text": ["no"], "n": [7]}
    write(tmp_path / "a.parquet", columns)
    source = open_source(f"parquet:{tmp_path}/a.parquet?image=b&caption=said&label=n")
    assert source[0] == {"image": encode(), "caption": "hello", "label": 7}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "has no image column; it has pixels (int64), words (string)"),
        ("?image=words", "no image column"),
        ("?image=nope", "no column nope (option image); it has pixels"),
        ("?caption=pixels", "no image column"),
        ("?cache_mb=lots", "not a number of MiB"),
    ],
)
def test_a_missing_column_lists_those_there_are(tmp_path, options, words):
    write(tmp_path / "a.parquet", {"pixels": [1], "words": ["x"]})
    with pytest.raises(UserError) as error:
        open_source(f"parquet:{tmp_path}/a.parquet{options}")
    assert words in str(error.value)


def test_wrong_types_of_named_columns(tmp_path, encode):
    write(tmp_path / "a.parquet", {"image": [encode()], "n": [1], "t": ["x"]})
    with pytest.raises(UserError, match="column n of a.parquet holds int64, not text"):
        open_source(f"parquet:{tmp_path}/a.parquet?caption=n")
    with pytest.raises(UserError, match="column t of a.parquet holds string, not whole numbers"):
        open_source(f"parquet:{tmp_path}/a.parquet?label=t")


def test_files_of_two_layouts_are_refused(tmp_path, encode):
    write(tmp_path / "a.parquet", {"image": hf([encode()]), "text": ["x"]})
    write(tmp_path / "b.parquet", {"image": hf([encode()])})
    with pytest.raises(UserError, match="one glob for each layout"):
        open_source(f"parquet:{tmp_path}/*.parquet")


def test_what_is_not_parquet_is_named(tmp_path, encode):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(UserError, match="a.parquet is not a readable Parquet file"):
        open_source(f"parquet:{tmp_path}/*.parquet")
    write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(UserError, match="holds no images"):
        open_source(f"parquet:{tmp_path}/*.parquet")


def test_rows_without_bytes_are_bad_and_shift_nothing(tmp_path, encode):
    rows = pa.array([None, {"bytes": None, "path": "x"}, {"bytes": encode(), "path": None}])
    write(tmp_path / "a.parquet", {"image": rows})
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    for index in (0, 1):
        with pytest.raises(BadRecord, match="no image bytes"):
            source[index]
    assert source[2] == {"image": encode()}


def test_a_column_whose_name_is_no_text_is_one_line(tmp_path):
    write(tmp_path / "a.parquet", {"image": [b"x"]})
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"image", b"\x80mage"))
    with pytest.raises(UserError, match="a.parquet is not a readable Parquet file"):
        open_source(f"parquet:{tmp_path}/a.parquet")


def test_a_damaged_row_group_is_bad_and_others_are_not(tmp_path):
    noise = np.random.default_rng(0).bytes
    images = [noise(4000) for _ in range(8)]
    path = tmp_path / "a.parquet"
    write(path, {"image": images}, row_group_size=4, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    source = open_source(f"parquet:{path}")
    with pytest.raises(BadRecord, match="corrupt row group"):
        source[1]
    assert source[5]["image"] == images[5]


def test_the_cache_keeps_its_limit_and_forgets_the_oldest(tmp_path):
    images = [bytes([i]) * 300_000 for i in range(12)]
    write(tmp_path / "a.parquet", {"image": images}, row_group_size=2, compression="none", use_dictionary=False)
    source = open_source(f"parquet:{tmp_path}/a.parquet?cache_mb=2")
    order = np.random.default_rng(0).permutation(12)
    assert all(source[int(i)]["image"] == images[i] for i in order)
    assert 0 < source._cached_bytes <= 2 << 20 and len(source._cache) == 3
    tiny = open_source(f"parquet:{tmp_path}/a.parquet?cache_mb=0")
    assert [tiny[i]["image"] for i in range(12)] == images and len(tiny._cache) == 1


def test_a_copy_for_another_process_leaves_the_cache_behind(tmp_path):
    images = [bytes([i]) * 100_000 for i in range(4)]
    write(tmp_path / "a.parquet", {"image": images})
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    assert source[3]["image"] == images[3]
    packed = pickle.dumps(source)
    assert len(packed) < 10_000 and pickle.loads(packed)[3]["image"] == images[3]


def test_threads_share_a_source(tmp_path):
    images = [bytes([i]) * 1000 for i in range(64)]
    write(tmp_path / "a.parquet", {"image": images}, row_group_size=4)
    source = open_source(f"parquet:{tmp_path}/a.parquet?cache_mb=0")
    wrong = []

    def read(seed):
        order = np.random.default_rng(seed).permutation(64)
        wrong.extend(i for i in order if source[int(i)]["image"] != images[i])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_cifar10(data_dir):
    names = (data_dir / "cifar10" / "classes.txt").read_text().split()
    source = open_source(f"parquet:{data_dir}/cifar10/train-*.parquet")
    assert len(source) == 50_000 and source.label_names == tuple(names)
    assert source.describe(20_417) == "train-00002-of-00005.parquet row 417"
    # The captions in the files are an oracle for those made from class names.
    named = open_source(f"parquet:{data_dir}/cifar10/train-*.parquet?caption=label")
    for index in range(0, 50_000, 997):
        assert named[index]["caption"] == source[index]["caption"]
        assert decode(source[index]["image"], Data()).shape == (32, 32, 3)
    assert named.without_image(997) == {k: v for k, v in named[997].items() if k != "image"}
    table = pq.read_table(data_dir / "cifar10" / "train-00003-of-00005.parquet")
    assert source[31_234]["image"] == table["image"][1234].as_py()["bytes"]
    assert source[31_234]["label"] == table["label"][1234].as_py()


@pytest.mark.parametrize("struct", [True, False])
def test_a_row_group_too_large_for_one_array_is_read_in_chunks(tmp_path, encode, monkeypatch, struct):
    images = [encode(seed=i) for i in range(4)]
    write(tmp_path / "a.parquet", {"image": hf(images) if struct else pa.array(images), "text": list("abcd")})
    source, whole = open_source(f"parquet:{tmp_path}/a.parquet"), pq.ParquetFile.read_row_group

    class Column:
        """Stands for one of more than 2 GiB."""

        def __init__(self, column):
            self._column = pa.chunked_array([column.chunk(0)[:3], column.chunk(0)[3:]])

        def combine_chunks(self):
            raise pa.ArrowInvalid("offset overflow while concatenating arrays")

        def __getitem__(self, row):
            return self._column[row]

        def flatten(self):
            return self._column.flatten()

    class Table:
        def __init__(self, table):
            self._table, self.nbytes = table, table.nbytes

        def column(self, name):
            return Column(self._table.column(name))

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *args, **options: Table(whole(*args, **options)))
    assert [source[i] for i in range(4)] == [{"image": images[i], "caption": "abcd"[i]} for i in range(4)]


def test_what_pyarrow_cannot_hold_is_not_called_damaged(tmp_path, encode, monkeypatch):
    write(tmp_path / "a.parquet", {"image": hf([encode()])})
    source = open_source(f"parquet:{tmp_path}/a.parquet")

    def read(*args, **options):
        raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    with pytest.raises(BadRecord, match="^row group cannot be read .Nested data"):
        source[0]


def test_texts_are_read_without_the_column_of_images(tmp_path, encode, monkeypatch):
    columns = {"image": hf([encode()] * 2), "text": ["a", None], "label": [3, 4], "other": [0, 0]}
    write(tmp_path / "a.parquet", columns)
    source, asked, real = open_source(f"parquet:{tmp_path}/a.parquet"), [], pq.ParquetFile.read_row_group

    def read(self, group, columns, **options):
        asked.append(columns)
        return real(self, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    assert [source.without_image(i) for i in range(2)] == [{"caption": "a", "label": 3}, {"label": 4}]
    assert asked == [["text", "label"]]
    assert source[0] == {"image": encode(), "caption": "a", "label": 3}
