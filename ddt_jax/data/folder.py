"""A folder of images, searched through and through, in the order of their paths.

`name.txt` beside `name.jpg` is its caption. When every image lies in a subfolder, the first subfolder is its class.
"""

import os
import stat

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, Record
from ddt_jax.data.patience import Patience, is_passing
from ddt_jax.errors import UserError
from ddt_jax.settings import Data


class Gone(BadRecord):
    """There is no such file, or no longer."""


class Files:
    """The files under a folder that may be of use. Hidden files and folders are left out.

    Attributes:
      names: paths inside the folder, sorted.

    Args:
      extensions: of those that are listed, in lower case.
      patience: of the source.

    Raises:
      UserError: the folder does not exist.
    """

    def __init__(self, folder: str, extensions: tuple[str, ...], patience: Patience):
        self._root = folder.rstrip("/") or "/"
        self._patience = patience
        try:
            self.names = patience.opening(lambda: self._list(folder, extensions))
        except ImportError as error:
            raise files.remote_error(folder, error) from None
        self._captions = {name for name in self.names if extension(name) == "txt"}

    def _list(self, folder, extensions):
        if not files.path_of(self._root).is_dir():
            raise UserError(f"data: {folder} is not a folder{files.nearest_folder(self._root)}")
        local = files.is_local(self._root)
        names = (_walk_local if local else _walk)(files.path_of(self._root), extensions)
        return sorted(name for name in names if extension(name) in extensions)

    def read(self, name: str, limit: int = files.MAX_IMAGE_BYTES) -> bytes:
        """A file's content.

        Args:
          limit: of its bytes.

        Raises:
          BadRecord: it is gone, may not be read, is no file, or is larger; and UserError as `Patience.record`.
        """
        return self._patience.record(lambda: content(f"{self._root}/{name}", limit), name)

    def caption(self, stem: str) -> str:
        """What STEM.txt says, "" where there is none. Raises BadRecord."""
        name = f"{stem}.txt"
        return files.read_text(self.read(name, files.MAX_TEXT_BYTES), "caption") if name in self._captions else ""


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

    def __init__(self, folder: str, *, retry_seconds: float = Data.retry_seconds):
        self.name = f"folder:{folder}"
        self._files = Files(folder, (*files.IMAGE_EXTENSIONS, "txt"), Patience(self.name, retry_seconds))
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


def content(path: str, limit: int) -> bytes:
    """A file's content, read once.

    Raises:
      Gone: there is no such file.
      BadRecord: it may not be read, is no file, or is larger. What passes (`patience.is_passing`) is raised as it is.
    """
    try:
        if files.is_local(path):
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
                raise BadRecord("it is no file")
            _check_size(found.st_size, limit)
            with open(path, "rb") as file:
                return file.read()
        with files.path_of(path).open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise Gone("the file is gone") from None
    except PermissionError:
        raise BadRecord("no permission to read it") from None
    except OSError as error:
        if is_passing(error):
            raise
        raise BadRecord(f"it cannot be read ({error.strerror or error})") from None
    _check_size(len(data), limit)
    return data


def _check_size(size, limit):
    if size > limit:
        raise BadRecord(f"more than {limit:,} bytes")


def _walk_local(root, extensions):
    """Names inside the folder, links to folders followed. os.walk leaves out what it cannot list, which would give the
    data another order and other classes.

    Raises:
      UserError: a folder may not be listed.
    """
    pending = [(str(root), "", os.path.realpath(root), frozenset())]
    while pending:
        folder, inside, real, above = pending.pop()
        if real in above:  # a link to where it lies
            continue
        try:
            with os.scandir(folder) as found:
                entries = [entry for entry in found if not entry.name.startswith(".")]
        except OSError as error:
            _check_listing(folder, error)
            continue
        for entry in entries:
            if _is_folder(entry, extensions):
                below = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"
                pending.append((entry.path, f"{inside}{entry.name}/", below, above | {real}))
            else:
                yield inside + entry.name


def _is_folder(entry, extensions):
    try:
        return entry.is_dir()
    except OSError as error:  # a link that cannot be followed
        if extension(entry.name) not in extensions:
            _check_listing(entry.path, error)
        return False  # a file says what is wrong when it is read


def _check_listing(folder, error):
    """Raises unless the folder has gone meanwhile."""
    if is_passing(error):
        raise error
    if not isinstance(error, FileNotFoundError):
        raise UserError(
            f"data: {folder} cannot be listed ({error.strerror}); give the right to read it, or take it elsewhere"
        ) from None


def _walk(path, extensions, inside=""):
    """The same for a remote folder (epath's walk drops the scheme there)."""
    for child in path.iterdir():
        if child.name.startswith("."):
            continue
        if extension(child.name) in extensions:  # spares a request for each file
            yield inside + child.name
        elif child.is_dir():
            yield from _walk(child, extensions, f"{inside}{child.name}/")
