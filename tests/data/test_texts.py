import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddt_jax.data.base import BadRecord
from ddt_jax.data.texts import TextRecords
from ddt_jax.errors import UserError


def write(path, **columns):
    pq.write_table(pa.table(columns), path)


def test_a_record_is_a_text_and_no_image(tmp_path):
    write(tmp_path / "a.parquet", id=[1, 2, 3], text=["one", " two ", None], picture=[b"x"] * 3)
    write(tmp_path / "b.parquet", id=[4], text=["four"], picture=[b"x"])
    records = TextRecords(f"parquet:{tmp_path}/*.parquet", "")
    assert len(records) == 4 and records.num_codes == 0
    assert [records[i] for i in (0, 1, 3)] == [{"caption": c, "images": []} for c in ("one", "two", "four")]
    assert records.without_images(3) == records[3] == pickle.loads(pickle.dumps(records))[3]
    with pytest.raises(BadRecord, match="no text"):
        records[2]
    assert len(TextRecords(f"parquet:{tmp_path}/*.parquet", "", 2)) == 2


def test_a_column_can_be_named_and_others_are_not_read(tmp_path):
    write(tmp_path / "a.parquet", text=["no"], body=["yes"], label=[1])
    records = TextRecords(f"parquet:{tmp_path}/a.parquet?caption=body", "")
    assert records[0] == {"caption": "yes", "images": []}
    assert records.source._columns.to_read() == ["body"]


@pytest.mark.parametrize(
    ("spec", "count", "message"),
    [
        ("scenes:train", 0, "texts are read from parquet:GLOB, or parquet:GLOB.caption=COLUMN, not from scenes:train"),
        ("parquet:{0}/a.parquet?label=n", 0, "texts are read from parquet:GLOB"),
        ("parquet:{0}/a.parquet", 0, "has no column of text; it has n .int64.; name one with .caption="),
        ("parquet:{0}/b.parquet", 3, "has 1 texts, not records=3"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, spec, count, message):
    write(tmp_path / "a.parquet", n=[1])
    write(tmp_path / "b.parquet", text=["x"])
    with pytest.raises(UserError, match=message) as error:
        TextRecords(spec.format(tmp_path), "", count)
    assert "\n" not in str(error.value)


def test_its_identity_tells_columns_and_folders_apart_but_not_ways_to_write_them(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.parquet", text=["x"], body=["y"])
    spec = f"parquet:{tmp_path}/one/*.parquet"
    specs = [spec, f"{spec}?caption=body", f"parquet:{tmp_path}/two/*.parquet"]
    assert len({TextRecords(spec, "").identity for spec in specs}) == 3
    found = []
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        records = TextRecords("parquet:./a.parquet?caption=text", "")
        assert records.name == records.origin == "parquet:./a.parquet"  # orders of formats hang on it
        found.append(records.identity)
        assert found[-1] == TextRecords(f"parquet:{tmp_path}/{name}/a.parquet?caption=text", "").identity
    assert found[0] != found[1]
