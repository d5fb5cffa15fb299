import errno
import os

import pytest

from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    def fill(contents):
        root = tmp_path / "pictures"
        for name, data in contents.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return root

    return fill


def test_images_and_captions_in_the_order_of_their_paths(folder, encode):
    root = folder(
        {
            "b.png": encode(seed=1),
            "a/z.JPEG": encode("JPEG"),
            "a/z.txt": b" zebra\n",
            "c.webp": encode("WEBP"),
            "c.txt": b" \n",
            "notes.md": b"x",
            ".hidden.png": b"x",
            ".git/d.png": b"x",
        }
    )
    source = open_source(f"folder:{root}/")
    assert [source.describe(i) for i in range(len(source))] == ["a/z.JPEG", "b.png", "c.webp"]
    assert source[0] == {"image": encode("JPEG"), "caption": "zebra"}
    assert source[1] == {"image": encode(seed=1)} and source[2] == {"image": encode("WEBP")}
    assert source.label_names is None


def test_subfolders_are_classes_when_every_image_lies_in_one(folder, encode):
    root = folder({"dog/1.png": encode(), "cat/deep/2.png": encode(), "cat/1.png": encode(), "readme.txt": b"x"})
    source = open_source(f"folder:{root}?caption=label")
    assert source.label_names == ("cat", "dog")
    assert [source[i]["label"] for i in range(3)] == [0, 0, 1]
    assert source[2]["caption"] == "a photo of a dog" and not hasattr(source, "without_image")


def test_what_cannot_be_read_is_a_bad_record(folder, encode):
    root = folder({"a.png": encode(), "b.png": encode(), "b.txt": b"\xff\xff"})
    source = open_source(f"folder:{root}")
    (root / "a.png").unlink()
    with pytest.raises(BadRecord, match="the file is gone"):
        source[0]
    with pytest.raises(BadRecord, match="caption is not UTF-8"):
        source[1]


def test_no_images_is_an_error(folder):
    with pytest.raises(UserError, match="holds no images"):
        open_source(f"folder:{folder({'a.txt': b'x'})}")


def test_a_file_is_not_a_folder(folder, encode):
    with pytest.raises(UserError, match="is not a folder"):
        open_source(f"folder:{folder({'a.png': encode()})}/a.png")


def test_linked_folders_are_followed_but_not_round_in_a_circle(folder, encode, tmp_path):
    root = folder({"dog/1.png": encode(), "ape/1.png": encode()})
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "2.png").write_bytes(encode(seed=1))
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (root / "dog" / "all").symlink_to(root)
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere" / "deep" / "..")
    (root / "gone").symlink_to(tmp_path / "nowhere")
    source = open_source(f"folder:{root}")
    assert [source.describe(i) for i in range(len(source))] == ["ape/1.png", "cat/deep/2.png", "dog/1.png"]
    assert source.label_names == ("ape", "cat", "dog") and source[1] == {"image": encode(seed=1), "label": 1}


@pytest.mark.parametrize("kind", ["folder", "video"])
def test_a_folder_that_may_not_be_listed_is_an_error(folder, encode, monkeypatch, kind):
    root, real = folder({"a/1.png": encode(), "b/1.png": encode()}), os.scandir

    def scandir(path):
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may list anything
    with pytest.raises(UserError, match="pictures/b cannot be listed .Permission denied.; give the right to read it"):
        open_source(f"{kind}:{root}", clips=kind == "video")
