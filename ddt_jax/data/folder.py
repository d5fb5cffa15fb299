"""A folder of images, searched through and through, in the order of their paths.

`name.txt` beside `name.jpg` is its caption. When every image lies in a subfolder, the first subfolder is its class.
"""

import os

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, Record
from ddt_jax.errors import UserError


class FolderSource:
    """All images under a folder. Hidden files and folders are left out.

    Raises:
      UserError: the folder does not exist or holds no image.
    """

    def __init__(self, folder: str):
        self.name = f"folder:{folder}"
        self._root = folder.rstrip("/") or "/"
        try:
            if not files.path_of(self._root).is_dir():
                raise UserError(f"data: {folder} is not a folder{files.nearest_folder(self._root)}")
            names = sorted(_walk_local(self._root) if files.is_local(self._root) else _walk(files.path_of(self._root)))
        except ImportError as error:
            raise files.remote_error(folder, error) from None
        self._images = [name for name in names if _extension(name) in files.IMAGE_EXTENSIONS]
        if not self._images:
            raise UserError(f"data: {folder} holds no images ({', '.join(files.IMAGE_EXTENSIONS)})")
        self._captions = {name for name in names if _extension(name) == "txt"}
        self.label_names = None
        if all("/" in name for name in self._images):
            self.label_names = tuple(sorted({name.split("/", 1)[0] for name in self._images}))
            self._numbers = {name: number for number, name in enumerate(self.label_names)}

    def __len__(self):
        return len(self._images)

    def describe(self, index):
        return self._images[index]

    def __getitem__(self, index) -> Record:
        name = self._images[index]
        record = Record(image=self._read(name))
        caption = name.rpartition(".")[0] + ".txt"
        if caption in self._captions:
            text = files.read_text(self._read(caption), "caption")
            if text:
                record["caption"] = text
        if self.label_names:
            record["label"] = self._numbers[name.split("/", 1)[0]]
        return record

    def _read(self, name):
        try:
            path = f"{self._root}/{name}"
            with open(path, "rb") if files.is_local(path) else files.path_of(path).open("rb") as file:
                return file.read()
        except FileNotFoundError:
            raise BadRecord("the file is gone") from None
        except PermissionError:
            raise BadRecord("no permission to read it") from None


def _extension(name):
    return name.rpartition(".")[2].lower()


def _walk_local(root):
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in names:
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}"


def _walk(path, inside=""):
    """The same for a remote folder (epath's walk drops the scheme there)."""
    for child in path.iterdir():
        if child.name.startswith("."):
            continue
        if _extension(child.name) in (*files.IMAGE_EXTENSIONS, "txt"):  # spares a request for each file
            yield inside + child.name
        elif child.is_dir():
            yield from _walk(child, f"{inside}{child.name}/")
