"""A folder of images, searched through and through, in the order of their paths.

`name.txt` beside `name.jpg` is its caption. When every image lies in a subfolder, the first subfolder is its class.
"""

import os

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, Record
from ddt_jax.errors import UserError


class Files:
    """The files under a folder that may be of use. Hidden files and folders are left out.

    Attributes:
      names: paths inside the folder, sorted.

    Args:
      extensions: of those that are listed, in lower case.

    Raises:
      UserError: the folder does not exist.
    """

    def __init__(self, folder: str, extensions: tuple[str, ...]):
        self._root = folder.rstrip("/") or "/"
        try:
            if not files.path_of(self._root).is_dir():
                raise UserError(f"data: {folder} is not a folder{files.nearest_folder(self._root)}")
            local = files.is_local(self._root)
            names = _walk_local(self._root) if local else _walk(files.path_of(self._root), extensions)
            self.names = sorted(name for name in names if extension(name) in extensions)
        except ImportError as error:
            raise files.remote_error(folder, error) from None
        self._captions = {name for name in self.names if extension(name) == "txt"}

    def read(self, name: str) -> bytes:
        """Raises BadRecord."""
        try:
            path = f"{self._root}/{name}"
            with open(path, "rb") if files.is_local(path) else files.path_of(path).open("rb") as file:
                return file.read()
        except FileNotFoundError:
            raise BadRecord("the file is gone") from None
        except PermissionError:
            raise BadRecord("no permission to read it") from None

    def caption(self, stem: str) -> str:
        """What STEM.txt says, "" where there is none. Raises BadRecord."""
        name = f"{stem}.txt"
        return files.read_text(self.read(name), "caption") if name in self._captions else ""


def classes(names: list[str]) -> tuple[tuple[str, ...] | None, list[int]]:
    """Names of the classes and the class of each path: its first subfolder, if every path has one; else (None, [])."""
    if not all("/" in name for name in names):
        return None, []
    found = [name.split("/", 1)[0] for name in names]
    label_names = tuple(sorted(set(found)))
    numbers = {name: number for number, name in enumerate(label_names)}
    return label_names, [numbers[name] for name in found]


class FolderSource:
    """All images under a folder. Hidden files and folders are left out.

    Raises:
      UserError: the folder does not exist or holds no image.
    """

    def __init__(self, folder: str):
        self.name = f"folder:{folder}"
        self._files = Files(folder, (*files.IMAGE_EXTENSIONS, "txt"))
        self._images = [name for name in self._files.names if extension(name) in files.IMAGE_EXTENSIONS]
        if not self._images:
            raise UserError(f"data: {folder} holds no images ({', '.join(files.IMAGE_EXTENSIONS)})")
        self.label_names, self._labels = classes(self._images)

    def __len__(self):
        return len(self._images)

    def describe(self, index):
        return self._images[index]

    def __getitem__(self, index) -> Record:
        name = self._images[index]
        record = Record(image=self._files.read(name))
        if text := self._files.caption(name.rpartition(".")[0]):
            record["caption"] = text
        if self.label_names:
            record["label"] = self._labels[index]
        return record


def extension(name):
    return name.rpartition(".")[2].lower()


def _walk_local(root):
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in names:
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}"


def _walk(path, extensions, inside=""):
    """The same for a remote folder (epath's walk drops the scheme there)."""
    for child in path.iterdir():
        if child.name.startswith("."):
            continue
        if extension(child.name) in extensions:  # spares a request for each file
            yield inside + child.name
        elif child.is_dir():
            yield from _walk(child, extensions, f"{inside}{child.name}/")
