"""Karpathy's splits: which records a file and its options make, where images are looked for, and what is refused."""

import json
import os
import pickle

import pytest

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.loader import Loader
from ddt_jax.errors import UserError
from ddt_jax.settings import Data

FOLDERS = {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}


def image(split, number, *captions, **more):
    """An image as dataset_coco.json has it."""
    folder, sentences = FOLDERS[split], [{"raw": caption, "tokens": caption.split()} for caption in captions]
    name = {"filepath": folder, "filename": f"COCO_{folder}_{number:012d}.jpg", "cocoid": number, "imgid": number}
    return {"split": split, "sentences": sentences, "sentids": [number], **name, **more}


COCO = [
    image("test", 7, "A cat. ", "un chat\n", "", "a pet", "a cat", "Kätzchen", "one more"),
    image("train", 3, "a dog", "a brown dog"),
    image("restval", 5, "two birds"),
    image("test", 2, "a bus", "a bus"),
    image("test", 9, " "),
    image("val", 4, "a kite", "a boy with a kite"),
]


@pytest.fixture
def coco(tmp_path, encode):
    """(records) → path of the file of them, their pictures beside it as COCO's archives lay them; seed: the number."""

    def write(records=COCO, flat=False, under="coco"):
        root = tmp_path / under
        for record in records:
            place = root if flat else root / record.get("filepath", "")
            place.mkdir(parents=True, exist_ok=True)
            (place / record["filename"]).write_bytes(encode("JPEG", seed=record["imgid"]))
        root.mkdir(exist_ok=True)
        path = root / "dataset_coco.json"
        path.write_text(json.dumps({"images": records, "dataset": "coco"}))
        return path

    return write


def test_a_record_is_an_image_with_all_of_its_captions(coco, encode):
    source = open_source(f"karpathy:{coco()}")
    assert len(source) == 3 and source.each == "image" and source.label_names is None
    said = ["A cat.", "un chat", "a pet", "a cat", "Kätzchen", "one more"]
    assert source[0] == {"image": encode("JPEG", seed=7), "caption": "A cat.", "captions": said}
    assert source[1] == {"image": encode("JPEG", seed=2), "caption": "a bus", "captions": ["a bus", "a bus"]}
    assert source[2] == {"image": encode("JPEG", seed=9)}  # what says nothing is no caption
    assert source.describe(1) == "val2014/COCO_val2014_000000000002.jpg"
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            source[outside]


def test_or_each_caption_is_a_record(coco, encode):
    source = open_source(f"karpathy:{coco()}?split=train+restval&each=caption")
    found = [source[i] for i in range(len(source))]
    assert [record["caption"] for record in found] == ["a dog", "a brown dog", "two birds"]
    assert [record["image"] for record in found] == [encode("JPEG", seed=i) for i in (3, 3, 5)]
    assert all(record.keys() == {"image", "caption"} for record in found) and source.each == "caption"
    assert source.describe(1) == "train2014/COCO_train2014_000000000003.jpg caption 1"
    # An image without captions makes no record, and does not move those behind it.
    swapped = [COCO[4], *COCO[:4]]
    source = open_source(f"karpathy:{coco(swapped)}?each=caption")
    assert [source[i]["caption"] for i in (0, 5, 6)] == ["A cat.", "one more", "a bus"] and len(source) == 8
    with pytest.raises(IndexError):
        source[8]


def test_at_most_so_many_captions_of_an_image(coco):
    path = coco()
    source = open_source(f"karpathy:{path}?captions=5")
    assert source[0]["captions"] == ["A cat.", "un chat", "a pet", "a cat", "Kätzchen"]
    assert source[1]["captions"] == ["a bus", "a bus"]
    assert len(open_source(f"karpathy:{path}?captions=1&each=caption")) == 2


def test_flickr_has_no_folders_and_no_numbers_of_coco(coco, encode):
    bare = {"split": "test", "imgid": 4, "filename": "1007129816.jpg", "sentences": [{"raw": "A man."}] * 5}
    source = open_source(f"karpathy:{coco([bare])}")
    assert source[0] == {"image": encode("JPEG", seed=4), "caption": "A man.", "captions": ["A man."] * 5}


def test_images_lie_elsewhere_or_in_one_folder(coco, encode, monkeypatch, tmp_path):
    path = coco(flat=True)
    flat = open_source(f"karpathy:{path}")
    assert flat[1]["image"] == encode("JPEG", seed=2) and flat.describe(1) == "COCO_val2014_000000000002.jpg"
    elsewhere = coco(under="other")
    os.remove(path.parent / COCO[3]["filename"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PICTURES", "other")
    for images in (elsewhere.parent, f"{elsewhere.parent}/", "~/other", "~/${PICTURES}"):
        source = open_source(f"karpathy:{path}?images={images}")
        assert source[1]["image"] == encode("JPEG", seed=2)
    # Both places are tried for each image.
    (elsewhere.parent / COCO[3]["filepath"] / COCO[3]["filename"]).rename(elsewhere.parent / COCO[3]["filename"])
    assert [source[i]["image"] for i in (0, 1)] == [encode("JPEG", seed=i) for i in (7, 2)]
    monkeypatch.chdir(path.parent)
    assert open_source("karpathy:dataset_coco.json")[0]["image"] == encode("JPEG", seed=7)


def test_an_image_that_is_missing_is_a_bad_record(coco):
    path = coco()
    source = open_source(f"karpathy:{path}")
    os.remove(path.parent / "val2014" / COCO[0]["filename"])
    with pytest.raises(BadRecord, match=f"there is no such file in {path.parent}"):
        source[0]
    assert source[1]["caption"] == "a bus"
    assert len(open_source(f"karpathy:{path}")) == 3  # the second one is there


def test_a_folder_without_the_images_is_refused_at_once(coco, tmp_path):
    path, empty = coco(), tmp_path / "emtpy"
    empty.mkdir()
    name = COCO[0]["filename"]
    with pytest.raises(UserError) as error:
        open_source(f"karpathy:{path}?images={empty}")
    assert f"is in {empty}, as val2014/{name} or {name}; name their folder with &images=FOLDER" in str(error.value)
    with pytest.raises(UserError, match=r"there is no folder .*/empty; did you mean emtpy\?"):
        open_source(f"karpathy:{path}?images={tmp_path}/empty")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("split=dev", "has no split dev; it has restval, test, train, val"),
        ("split=train+rest", "has no split rest; it has restval"),
        ("split=", "has no split ''; it has restval"),
        ("each=captions", "each=captions of .* is none of its choices; did you mean caption?"),
        ("captions=0", "captions=0 of .* is not a number of captions"),
        ("captions=five", "captions=five of"),
        ("caption=label", "caption is not an option of karpathy; did you mean captions?"),
    ],
)
def test_a_wrong_option_is_named(coco, options, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        open_source(f"karpathy:{coco()}?{options}")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("{", "is not whole JSON of Karpathy's splits .Expecting"),
        ("[" * 200_000, "is nested too deeply"),
        ([], "it holds a list, not an object"),
        ({"image": []}, "has no field images; did you mean image?"),
        ({"images": {}}, "field images is not a list"),
        ({"images": []}, "has no split test; it has no images"),
        ({"images": [3]}, r"images\[0\] is not an object with the field split"),
        ({"images": [image("test", 1) | {"split": "a\nb"}]}, "is no name of a split"),
        ({"images": [image("test", 1) | {"filename": None}]}, "field filename is not a text but 'None'"),
        ({"images": [image("test", 1) | {"filename": "../a.jpg"}]}, "'../a.jpg' is no path inside a folder"),
        ({"images": [image("test", 1) | {"filename": "/a.jpg"}]}, "is no path inside a folder"),
        ({"images": [image("test", 1) | {"filename": "s3://a.jpg"}]}, "is no path inside a folder"),
        ({"images": [image("test", 1) | {"filename": "a\0.jpg"}]}, "is no path inside a folder"),
        ({"images": [image("test", 1) | {"filepath": 3}]}, "field filepath is not a text but '3'"),
        ({"images": [image("test", 1) | {"sentences": ["a"]}]}, r"images\[0\] sentences\[0\] is not an object"),
        ({"images": [image("test", 1, "\ud800")]}, "holds half of a letter"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, tree, words):
    (tmp_path / "a.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    with pytest.raises(UserError, match=words.replace("?", r"\?")) as error:
        open_source(f"karpathy:{tmp_path}/a.json")
    assert str(error.value).startswith("data: ") and "\n" not in str(error.value)


def test_missing_files_and_captions_are_named(coco, tmp_path):
    path = coco()
    with pytest.raises(UserError, match=r"no file matches .*; did you mean dataset_coco.json\?"):
        open_source(f"karpathy:{path.parent}/dataset_coc.json")
    path.with_name("b.json").write_text("{}")
    with pytest.raises(UserError, match="names 2 files; name one"):
        open_source(f"karpathy:{path.parent}/*.json")
    with pytest.raises(UserError, match="in the split test has a caption"):
        open_source(f"karpathy:{coco([COCO[4]])}?each=caption")


def test_a_copy_in_another_process_gives_the_same(coco):
    source = open_source(f"karpathy:{coco()}?split=train&each=caption")
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(2)] == [source[i] for i in range(2)]
    assert (copy.name, copy.each, len(copy)) == (source.name, source.each, 2)


def test_every_caption_is_trained_on_once_an_epoch(coco):
    source = open_source(f"karpathy:{coco()}?split=train+restval+test&each=caption")
    loader = Loader(source, Data(image_size=8), batch_size=11, seed=0, with_captions=True)
    wanted = sorted(source[i]["caption"] for i in range(11))
    for step in range(2):
        assert sorted(loader.batch_at(step)["caption"]) == wanted
    assert wanted.count("a bus") == 2 and "two birds" in wanted


def test_from_a_bucket(bucket, encode):
    picture = {f"coco/val2014/{COCO[i]['filename']}": encode("JPEG", seed=i) for i in (0, 3)}
    root = bucket(picture | {"coco/dataset_coco.json": json.dumps({"images": COCO}).encode(), "x/y": b""})
    source = open_source(f"karpathy:{root}/coco/dataset_coco.json")
    assert source[1]["image"] == encode("JPEG", seed=3)
    with pytest.raises(BadRecord, match="there is no such file"):
        source[2]
    assert open_source(f"karpathy:{root}/coco/dataset_coco.json?images={root}/coco/val2014")[0]["caption"] == "A cat."
    with pytest.raises(UserError, match="is in s3://bucket/x, as val2014"):
        open_source(f"karpathy:{root}/coco/dataset_coco.json?images={root}/x")
    with pytest.raises(UserError, match="gcs"):
        open_source("karpathy:gs://b/a.json")


def test_what_is_too_large_is_a_bad_record(coco, monkeypatch):
    source = open_source(f"karpathy:{coco()}")
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(BadRecord, match="more than 10 bytes"):
        source[0]
