"""Karpathy's splits of MS-COCO and Flickr30K (arXiv 1412.2306): images with several captions each, told by one file.

dataset_coco.json and dataset_flickr30k.json hold {"images": [{"split", "filename", "sentences": [{"raw"}]}]}, of COCO
with "filepath", the folder of an image (train2014 or val2014). What else they hold is not read.
"""

import os
from typing import Any

import numpy as np

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, Record, nearest
from ddt_jax.data.fields import field
from ddt_jax.data.folder import Gone, content
from ddt_jax.data.patience import Patience
from ddt_jax.errors import UserError
from ddt_jax.io import json_object
from ddt_jax.settings import Data

EACH = ("image", "caption")
_LOOKED_FOR = 4  # images that are looked for before a run begins


class _Texts:
    """Texts as one array of bytes: the half million captions of COCO go to worker processes faster than as a list."""

    def __init__(self, texts: list[str]):
        encoded = [text.encode() for text in texts]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].tobytes().decode()


class KarpathySource:
    """Images of a split, in the order of the file. An image is FOLDER/filepath/filename, or FOLDER/filename.

    Args:
      path: of the JSON file.
      split: its name, or several with a plus between them: `train+restval` is what COCO's models are trained on.
      images: their folder; "": that of the file.
      each: "image": a record has `caption`, the first one, and `captions`, all; "caption": each caption is a record,
        those of an image one after another.
      captions: of each image at most so many, from the first; "": all. COCO has six or seven of a few images.

    Attributes:
      each: as above.

    Raises:
      UserError: a file that cannot be read or lacks a field, no such split, or none of its first images is there.
    """

    label_names = None

    def __init__(
        self,
        path: str,
        *,
        split: str = "test",
        images: str = "",
        each: str = "image",
        captions: str = "",
        retry_seconds: float = Data.retry_seconds,
    ):
        if each not in EACH:
            raise UserError(f"data: each={each} of {path} is none of its choices{nearest(each, EACH)}")
        if captions and not (captions.isascii() and captions.isdigit() and int(captions)):
            raise UserError(f"data: captions={captions} of {path} is not a number of captions; leave it out for all")
        self.each = each
        self.name = f"karpathy:{path}?split={split}"
        self.name += f"&captions={captions}" * bool(captions) + f"&each={each}" * (each != "image")
        self._patience = Patience(self.name, retry_seconds)
        self._folder = (os.path.expanduser(images) or path.rpartition("/")[0] or ".").rstrip("/") or "/"
        found = _images_of(path, _tree(path, self._patience), split)
        said = [texts[: int(captions)] if captions else texts for _, _, texts in found]
        self._folders, self._names = _Texts([image[0] for image in found]), _Texts([image[1] for image in found])
        self._captions = _Texts([text for texts in said for text in texts])
        self._by_image = files.ByFile([len(texts) for texts in said])
        self._len = len(found) if each == "image" else len(self._by_image)
        if not self._len:
            raise UserError(f"data: no image of {path} in the split {split} has a caption; leave out each=caption")
        self._flat = False
        self._flat = self._patience.opening(self._are_flat)

    def __len__(self):
        return self._len

    def describe(self, index):
        image, caption = self._locate(index)
        return self._places(image)[0] + f" caption {caption}" * (self.each == "caption")

    def __getitem__(self, index) -> Record:
        image, caption = self._locate(index)
        record = Record(image=self._patience.record(lambda: self._read(image), self._places(image)[0]))
        first = int(self._by_image.ends[image - 1]) if image else 0
        if self.each == "caption":
            record["caption"] = self._captions[first + caption]
        elif captions := [self._captions[i] for i in range(first, int(self._by_image.ends[image]))]:
            record |= {"caption": captions[0], "captions": captions}
        return record

    def _locate(self, index):
        """(image, caption of it)"""
        if self.each == "caption":
            return self._by_image.locate(index)
        if not 0 <= index < self._len:
            raise IndexError(index)
        return int(index), 0

    def _places(self, image) -> list[str]:
        """Where an image may be in the folder, the likelier place first."""
        folder, name = self._folders[image], self._names[image]
        return [f"{folder}/{name}", name][:: -1 if self._flat else 1] if folder else [name]

    def _read(self, image):
        for place in self._places(image):
            try:
                return content(f"{self._folder}/{place}", files.MAX_IMAGE_BYTES)
            except Gone:
                pass
        raise BadRecord(f"there is no such file in {self._folder}")

    def _are_flat(self) -> bool:
        """Whether images lie in the folder itself, not in train2014 and the like inside it. Raises UserError."""
        some = [self._locate(i)[0] for i in range(min(_LOOKED_FOR, self._len))]
        try:
            for image in some:
                for place in self._places(image):
                    if files.path_of(f"{self._folder}/{place}").exists():
                        return place == self._names[image]
            known = files.path_of(self._folder).is_dir()
            why = f", as {' or '.join(self._places(some[0]))}" if known else files.nearest_folder(self._folder)
        except ImportError as error:
            raise files.remote_error(self._folder, error) from None
        raise UserError(
            f"data: none of the first images of {self.name} is in {self._folder}{why}; name their folder with "
            "&images=FOLDER"
        )


def _tree(path: str, patience: Patience) -> dict[str, Any]:
    """What the file holds."""

    def read():
        found = files.match_files(path)
        if len(found) > 1:
            raise UserError(f"data: {path} names {len(found)} files; name one")
        return files.path_of(found[0]).read_bytes()

    try:
        return json_object.loads(patience.opening(read))
    except ValueError as error:
        raise UserError(f"data: {path} is not whole JSON of Karpathy's splits ({error})") from None
    except PermissionError:
        raise UserError(f"data: no permission to read {path}") from None


def _images_of(path: str, tree: dict[str, Any], split: str) -> list[tuple[str, str, list[str]]]:
    """(folder or "", name, captions) of the images in a split. Blank captions are left out."""
    wanted, splits, found = set(split.split("+")), set(), []
    for i, record in enumerate(_field(tree, "images", list, path)):
        where = f"{path} images[{i}]"
        splits.add(_field(record, "split", str, where))
        if record["split"] in wanted:
            folder = _inside(_field(record, "filepath", str, where), where) if record.get("filepath") else ""
            name = _inside(_field(record, "filename", str, where), where)
            said = enumerate(_field(record, "sentences", list, where))
            captions = [_field(one, "raw", str, f"{where} sentences[{j}]").strip() for j, one in said]
            found.append((folder, name, [caption for caption in captions if caption]))
    for name in split.split("+"):
        if name not in splits:
            there = ", ".join(sorted(splits)) if splits else "no images"
            raise UserError(f"data: {path} has no split {name or repr(name)}; it has {there}")
    return found


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    """`fields.field`; a text can be written and is one line of a message."""
    value = field(record, name, kind, f"data: {where}")
    if kind is str and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(f"data: {where}: field {name} holds half of a letter (a surrogate)")
    if name == "split" and not value.isprintable():
        raise UserError(f"data: {where}: {value!r} is no name of a split")
    return value


def _inside(name: str, where: str) -> str:
    """A path that stays in the folder it is joined to."""
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise UserError(f"data: {where}: {name[:80]!r} is no path inside a folder")
    return name
