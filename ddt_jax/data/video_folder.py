"""A folder of clips, searched through and through, in the order of their paths.

A clip is a video, an image file that moves (GIF; PNG and WebP where the first file of their folder moves), or a folder
of frames in the order of their names. `name.txt` beside the file or the folder `name` is its caption. When every clip
lies in a subfolder, the first subfolder is its class.
"""

from ddt_jax.data import files, folder, images, videos
from ddt_jax.data.base import BadRecord, Record
from ddt_jax.data.patience import Patience
from ddt_jax.errors import UserError
from ddt_jax.settings import Data


class VideoFolderSource:
    """All clips under a folder. Hidden files and folders are left out.

    Raises:
      UserError: the folder does not exist, holds no clip, or holds videos and nothing is installed that reads them.
    """

    clips = True

    def __init__(self, root: str, *, retry_seconds: float = Data.retry_seconds):
        self.name = f"video:{root}"
        wanted = (*files.IMAGE_EXTENSIONS, *videos.ANIMATIONS, *videos.VIDEOS, "txt")
        self._files = folder.Files(root, wanted, Patience(self.name, retry_seconds))
        found = {}  # path of a clip → its frames, or None where it is a file
        by_folder: dict[str, list[str]] = {}
        for name in self._files.names:
            kind = folder.extension(name)
            if kind in videos.ANIMATIONS or kind in videos.VIDEOS:
                found[name] = None
            elif kind in files.IMAGE_EXTENSIONS:
                by_folder.setdefault(name.rpartition("/")[0], []).append(name)
        for inside, frames in by_folder.items():
            if self._moves(frames[0]):
                found |= dict.fromkeys(frames)
            elif inside:
                found[inside] = tuple(frames)
        if not found:
            raise UserError(
                f"data: {root} holds no clips ({', '.join(videos.ANIMATIONS + videos.VIDEOS)}, or a folder of frames "
                "for each)"
            )
        self._clips = sorted(found.items())
        if video := next((name for name in found if folder.extension(name) in videos.VIDEOS), None):
            videos.need_reader(video)
        self.label_names, self._labels = folder.classes([name for name, _ in self._clips])

    def __len__(self):
        return len(self._clips)

    def describe(self, index):
        return self._clips[index][0]

    def __getitem__(self, index) -> Record:
        name, frames = self._clips[index]
        if frames is not None:
            clip = videos.Frames(frames, self._files.read)
        elif folder.extension(name) in videos.VIDEOS:
            clip = videos.Video(self._files.read(name, files.MAX_VIDEO_BYTES))
        else:
            clip = videos.Animation(self._files.read(name))
        record = Record(video=clip)
        if text := self._files.caption(name if frames is not None else name.rpartition(".")[0]):
            record["caption"] = text
        if self.label_names:
            record["label"] = self._labels[index]
        return record

    def _moves(self, name) -> bool:
        try:
            with images.opened(self._files.read(name)) as image:
                return getattr(image, "is_animated", False)
        except BadRecord:  # says so when it is asked for
            return False
