import os
import subprocess
import sys

import pytest

from ddt_jax.data import files
from ddt_jax.data.base import CaptionFromLabel, open_source, parse_spec
from ddt_jax.errors import UserError


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("parquet:/a/b-*.parquet", ("parquet", "/a/b-*.parquet", {})),
        ("parquet:/a/b-0000?.parquet", ("parquet", "/a/b-0000?.parquet", {})),
        ("parquet:/a/?.parquet?image=x&cache_mb=5", ("parquet", "/a/?.parquet", {"image": "x", "cache_mb": "5"})),
        ("parquet:s3://b/x.parquet?caption=label", ("parquet", "s3://b/x.parquet", {"caption": "label"})),
        ("scenes:train", ("scenes", "train", {})),
    ],
)
def test_spec_is_split(spec, want):
    assert parse_spec(spec) == want


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("parket:/x", "did you mean parquet?"),
        ("zzz:/x", "choose from parquet, webdataset"),
        ("/x/y.parquet", "kind:where"),
        ("scenes", "scenes:train or heldout"),
        ("scenes:heldot", "did you mean heldout?"),
        ("digits:valid", "choose from train, test"),
        ("parquet:/x?captoin=a", "captoin is not an option of parquet; did you mean caption?"),
        ("scenes:train?image=3", "it takes none"),
        ("folder:/x?caption=foo", "only choice is ?caption=label"),
        ("parquet:${DDT_NOT_SET}/x", "DDT_NOT_SET"),
        ("", "kind:where"),
    ],
)
def test_a_wrong_spec_is_one_line_with_the_way_out(spec, words):
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("data: ")


def test_missing_files_name_what_is_near(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train-0.parquet").touch()

    def said(spec):
        with pytest.raises(UserError) as error:
            open_source(spec)
        return str(error.value)

    assert "did you mean train-0.parquet?" in said(f"parquet:{tmp_path}/images/train-00.parquet")
    assert "holds train-0.parquet" in said(f"webdataset:{tmp_path}/images/*.tar")
    assert "no folder" in said(f"parquet:{tmp_path}/imgs/*.parquet")
    assert "did you mean images?" in said(f"parquet:{tmp_path}/imags/*.parquet")
    assert "did you mean images?" in said(f"folder:{tmp_path}/imags")
    assert "is a folder" in said(f"parquet:{tmp_path}/images")
    (tmp_path / "empty").mkdir()
    assert "empty is empty" in said(f"parquet:{tmp_path}/empty/*")
    assert "no folder" in said("folder:/no/such/place")


def test_environment_and_home_expand(monkeypatch, tmp_path):
    monkeypatch.setenv("PICTURES", "/p")
    monkeypatch.setenv("HOME", "/home/me")
    assert files.expand("folder:${PICTURES}/x") == "folder:/p/x"
    assert files.expand("folder:~/x") == "folder:/home/me/x"
    assert files.expand("folder:/a~b") == "folder:/a~b"


class Named:
    name, label_names = "named", ("airplane", "deer")

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return [{"image": b"", "label": 0}, {"image": b"", "label": 1, "caption": "x"}, {"image": b""}][index]

    def describe(self, index):
        return f"row {index}"


def test_captions_from_class_names():
    source = CaptionFromLabel(Named())
    assert source[0]["caption"] == "a photo of an airplane" and source[1]["caption"] == "a photo of a deer"
    assert "caption" not in source[2] and source.describe(2) == "row 2" and len(source) == 3


def test_captions_from_labels_need_names():
    nameless = Named()
    nameless.label_names = None
    with pytest.raises(UserError, match="no class names"):
        CaptionFromLabel(nameless)


def test_locating_a_record_among_files():
    by_file = files.ByFile([3, 0, 2])
    assert [by_file.locate(i) for i in range(5)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            by_file.locate(outside)


def test_handles_stay_few_and_read_right(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_OPEN_FILES", 3)
    for i in range(9):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 10)
    handles = files.Handles()
    before = len(os.listdir("/proc/self/fd"))
    for i in [*range(9), 0, 8, 4]:
        assert handles.read(str(tmp_path / str(i)), 3, 2) == bytes([i, i])
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    handles.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_importing_base_is_light():
    heavy = ["numpy", "PIL", "pyarrow", "grain", "jax", "sklearn", "tensorflow_datasets", "etils", "array_record"]
    code = f"import sys, ddt_jax.data.base; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
