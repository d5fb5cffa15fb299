"""tools/cider.py on files as they are found, and as `generate` writes them."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAID = {"a/COCO_val2014_000000000042.jpg": "a shoe rack", "COCO_val2014_000000000073.jpg": "a motorcycle"}
OFFICIAL = {
    "images": [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in (73, 42, 74)],
    "annotations": [
        {"image_id": 42, "id": 1, "caption": "A shoe rack with shoes."},
        {"image_id": 73, "id": 2, "caption": "a motorcycle"},
        {"image_id": 42, "id": 3, "caption": "a dog on shoes"},
        {"image_id": 74, "id": 4, "caption": "a dog"},
    ],
}


@pytest.fixture
def cider(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("cider")


def written(folder, name, tree):
    (folder / name).write_text(json.dumps(tree))
    return str(folder / name)


def test_files_and_numbers_of_images_say_the_same(cider, tmp_path, capsys):
    people = written(tmp_path, "captions_val2014.json", OFFICIAL)
    by_file = written(tmp_path, "said.json", {"drawn": [], "captions": SAID | {"9.jpg": "of another split"}})
    results = [{"image_id": int(name[-16:-4]), "caption": text} for name, text in SAID.items()]
    results.append({"image_id": 9, "caption": "of another split"})
    by_number = written(tmp_path, "results.json", results)
    found = []
    for said in (by_file, by_number):
        assert cider.main([said, "--references", people]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and found[0]["images"] == 2 and found[0]["of"] == 3
    assert found[0]["left_out"] == 1
    assert 0 < found[0]["cider_d"] < 10


def test_a_mistake_is_one_line(cider, tmp_path, capsys):
    people = written(tmp_path, "captions_val2014.json", OFFICIAL)
    for tree, message in (
        ({"captions": {"9.jpg": "a"}}, "captions_val2014.json, but 9.jpg; name the other split"),
        ([{"image_id": 42, "caption": "a"}] * 2, "describes an image more than once"),
        ({"captions": {}}, "holds no captions"),
    ):
        assert cider.main([written(tmp_path, "said.json", tree), "--references", people]) == 2
        assert message in capsys.readouterr().err
    plain = tmp_path / "p.txt"
    plain.write_text("a cat")
    assert cider.main([people, "--references", str(plain)]) == 2
    assert "holds no captions of COCO" in capsys.readouterr().err
