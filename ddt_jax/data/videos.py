"""From clips to uint8 [T, S, S, 3]: which frames, all of one size, all cropped and flipped alike.

A clip is read frame by frame, in the order of time, and no more of it than is asked for.

Legend: T frames that the model takes, S image side.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ddt_jax.data import images
from ddt_jax.data.base import BadRecord
from ddt_jax.errors import UserError
from ddt_jax.settings import Data

ANIMATIONS = ("gif", "apng")
VIDEOS = ("mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg")


class Clip(Protocol):
    """What a source of clips gives as `video`."""

    def __len__(self) -> int:
        """How many frames there are; raises BadRecord where that cannot be told."""
        ...

    def read(self, numbers: Iterable[int], data: Data) -> list[np.ndarray]:
        """Frames by their numbers, increasing, each uint8 [H, W, 3]. Raises BadRecord."""
        ...


def prepare(clip: Clip, data: Data, rng: np.random.Generator | None = None) -> np.ndarray:
    """One clip as the model takes it.

    Args:
      data: frames, frame_step and clip_start, which say what is taken of it; the rest as in `images.prepare`.
      rng: for the first frame, random crops and flips, drawn in this order; None = the middle, no flip (evaluation).

    Returns:
      uint8 [T, S, S, 3], contiguous.

    Raises:
      BadRecord: too few frames, frames of different sizes, or as `images.prepare`.
    """
    return _read(clip, window(len(clip), data, rng), data, rng)


def whole(clip: Clip, data: Data) -> np.ndarray:
    """All frames of a clip, not flipped and the middle of them cropped: uint8 [F, S, S, 3]. Raises as `prepare`."""
    there = len(clip)
    if not there:
        raise BadRecord("no frames")
    return _read(clip, range(there), data, None)


def window(there: int, data: Data, rng: np.random.Generator | None = None) -> range:
    """Which of so many frames are taken; arguments as in `prepare`. Raises BadRecord if there are too few."""
    span = (data.frames - 1) * data.frame_step + 1
    if there < span:
        raise BadRecord(
            f"{there} frames, fewer than the {span} of data.frames={data.frames}, data.frame_step={data.frame_step}"
        )
    start = (there - span) // 2
    if data.clip_start == "random" and rng is not None:
        start = int(rng.integers(there - span + 1))
    return range(start, start + span, data.frame_step)


def _read(clip, numbers, data, rng):
    frames = clip.read(numbers, data)
    for number, frame in zip(numbers, frames, strict=True):
        images.check_array(frame, data)
        if frame.shape != frames[0].shape:
            sizes = [f"{x.shape[1]} x {x.shape[0]}" for x in (frame, frames[0])]
            raise BadRecord(f"frame {number} is {sizes[0]}, frame {numbers[0]} {sizes[1]}")
    return images.fit(np.stack(frames), data, rng)


@dataclass(frozen=True)
class Frames:
    """A clip whose frames are files.

    Attributes:
      names: of the files, in the order of time.
      load: name → encoded bytes; may raise BadRecord.
    """

    names: Sequence[str]
    load: Callable[[str], bytes]

    def __len__(self):
        return len(self.names)

    def read(self, numbers, data):
        found = []
        for number in numbers:
            try:
                found.append(images.decode(self.load(self.names[number]), data))
            except BadRecord as error:
                raise BadRecord(f"{self.names[number].rpartition('/')[2]}: {error}") from None
        return found


@dataclass(frozen=True)
class Animation:
    """A clip that is one image file which moves: GIF, PNG or WebP."""

    encoded: bytes

    def __len__(self):
        with images.opened(self.encoded) as image:
            return getattr(image, "n_frames", 1)

    def read(self, numbers, data):
        found = []
        with images.opened(self.encoded) as image:
            for number in numbers:
                image.seek(number)
                found.append(images.rgb(image, data))
        return found


@dataclass(frozen=True)
class Video:
    """A clip that is a video file, read by PyAV (`need_reader`)."""

    encoded: bytes

    def __len__(self):
        with _container(self.encoded) as container:
            stated = container.streams.video[0].frames
            return stated or sum(1 for _ in container.decode(video=0))  # some containers do not say

    def read(self, numbers, data):
        wanted, found = set(numbers), []
        with _container(self.encoded) as container:
            # From the start: seeking goes to key frames by time stamps, which files are often wrong about.
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    found.append(frame.to_ndarray(format="rgb24"))
                if len(found) == len(wanted):
                    return found
        raise BadRecord(f"ends before frame {max(wanted)}")


def need_reader(name: str):
    """PyAV, which reads video files; name: of one. Raises UserError where it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError(f"data: {name} is a video, which PyAV reads; run: pip install 'ddt-jax[video]'") from None
    return av


class _container:  # noqa: N801  used like a function
    """An opened video; what goes wrong with it inside becomes a BadRecord."""

    def __init__(self, encoded: bytes):
        self._av = need_reader("it")
        self._encoded = encoded

    def __enter__(self):
        try:
            self._opened = self._av.open(io.BytesIO(self._encoded))
        except self._av.error.FFmpegError as error:
            raise BadRecord(f"corrupt video ({error.strerror})") from None
        if not self._opened.streams.video:
            raise BadRecord("a file without pictures")
        return self._opened

    def __exit__(self, kind, error, trace):
        self._opened.close()
        if isinstance(error, self._av.error.FFmpegError):
            raise BadRecord(f"corrupt video ({error.strerror})") from None
