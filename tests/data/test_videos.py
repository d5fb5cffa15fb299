"""Clips of a folder: what is one, which frames of it are taken, and what cannot be used."""

import io

import numpy as np
import pytest
from PIL import Image

from ddt_jax.data import moving_scenes, videos
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.loader import Loader
from ddt_jax.errors import UserError
from ddt_jax.settings import Data

SIZE = 32
FRAMES = moving_scenes.render(moving_scenes.sample_scene("train", 0), range(6), SIZE)


def animated(kind, frames=FRAMES, **options):
    file = io.BytesIO()
    first, *rest = (Image.fromarray(x) for x in frames)
    first.save(file, kind, save_all=True, append_images=rest, **options)
    return file.getvalue()


def still(frame, size=None):
    file = io.BytesIO()
    image = Image.fromarray(frame)
    (image.resize(size) if size else image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    def fill(contents):
        for name, data in contents.items():
            path = tmp_path / "clips" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "clips"

    return fill


def frames_in(name, frames=FRAMES):
    return {f"{name}/{i:03}.png": still(x) for i, x in enumerate(frames)}


def test_files_that_move_and_folders_of_frames_are_clips(folder):
    root = folder(
        frames_in("walk/a")
        | {"walk/a.txt": b"someone walks\n", "walk/b.gif": animated("GIF"), "run/x/c.png": animated("PNG")}
        | {"run/x/d.png": animated("PNG"), "run/x/d.txt": b"two run", "run/e.webp": animated("WEBP", lossless=True)}
    )
    source = open_source(f"video:{root}", clips=True)
    names = [source.describe(i) for i in range(len(source))]
    assert names == ["run/e.webp", "run/x/c.png", "run/x/d.png", "walk/a", "walk/b.gif"]
    assert source.label_names == ("run", "walk") and [source[i]["label"] for i in range(5)] == [0, 0, 0, 1, 1]
    assert [source[i].get("caption") for i in range(5)] == [None, None, "two run", "someone walks", None]
    for i, most in enumerate((0, 0, 0, 0, 40)):  # a GIF has 256 colours
        clip = source[i]["video"]
        assert len(clip) == 6
        got = np.stack(clip.read(range(1, 6, 2), Data()))
        assert got.dtype == np.uint8 and np.abs(got.astype(int) - FRAMES[1::2]).max() <= most, names[i]
    assert open_source(f"video:{folder(frames_in('z'))}", clips=True).label_names is None


def test_batches_of_clips_are_the_frames_that_the_settings_ask_for(folder):
    source = open_source(f"video:{folder(frames_in('a') | frames_in('b', FRAMES[::-1]))}", clips=True)

    def batch(**changes):
        data = Data(image_size=SIZE, frames=2, frame_step=2, threads=0, **changes)
        return Loader(source, data, batch_size=2, seed=1, shuffle=False)

    (held_out,) = batch(clip_start="random", flip=True).eval_batches(2, 2)
    assert held_out["video"].dtype == np.uint8 and "image" not in held_out
    np.testing.assert_array_equal(held_out["video"], np.stack([FRAMES[1:4:2], FRAMES[::-1][1:4:2]]))
    found = {int(x) for step in range(12) for x in starts(batch(clip_start="random").batch_at(step)["video"][0])}
    assert found == {0, 1, 2, 3}
    flipped = [batch(flip=True).batch_at(step)["video"][0] for step in range(8)]
    shares = [np.array_equal(x[:, :, ::-1], FRAMES[1:4:2]) for x in flipped]
    assert 0 < sum(shares) < 8 and all(
        s or np.array_equal(x, FRAMES[1:4:2]) for s, x in zip(shares, flipped, strict=True)
    )
    small = Loader(source, Data(image_size=8, frames=3, crop="random"), batch_size=2, seed=1)
    assert small.batch_at(0)["video"].shape == (2, 3, 8, 8, 3)


def starts(clip):
    return [i for i in range(4) if np.array_equal(clip, FRAMES[i : i + 3 : 2])]


def test_what_cannot_be_used_is_a_bad_record(folder):
    gif = animated("GIF")
    odd = frames_in("odd")
    odd["odd/003.png"] = still(FRAMES[3], (20, 30))
    broken = frames_in("broken")
    broken["broken/002.png"] = still(FRAMES[2])[:200]
    root = folder(
        odd
        | broken
        | {"cut.gif": gif[: len(gif) // 2], "junk.gif": b"GIF89a?", "short.gif": animated("GIF", FRAMES[:2])}
    )
    source = open_source(f"video:{root}", clips=True)
    reasons = {
        "broken": "002.png: truncated PNG",
        "cut.gif": "fewer than the 6|truncated GIF",
        "junk.gif": "known format|GIF",
        "odd": "frame 3 is 20 x 30, frame 0 32 x 32",
        "short.gif": "2 frames, fewer than the 6 of data.frames=6, data.frame_step=1",
    }
    for i, (name, why) in enumerate(reasons.items()):
        assert source.describe(i) == name
        with pytest.raises(BadRecord, match=why):
            videos.prepare(source[i]["video"], Data(image_size=SIZE, frames=6))


def test_a_source_of_the_other_sort_is_refused(folder):
    root = folder(frames_in("a"))
    with pytest.raises(UserError, match="holds clips; set data.frames, how many"):
        open_source(f"video:{root}")
    with pytest.raises(UserError, match="holds images, not clips; set data.frames=0"):
        open_source(f"folder:{root}", clips=True)
    with pytest.raises(UserError, match="holds no clips"):
        open_source(f"video:{folder({'only/a.txt': b'x'})}/only", clips=True)


def test_videos_ask_for_what_reads_them_before_anything_else(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    root = folder({"x/a.mp4": b"", "x/b.gif": animated("GIF")})
    with pytest.raises(UserError, match=r"x/a.mp4 is a video, which PyAV reads; run: pip install 'ddt-jax\[video\]'"):
        open_source(f"video:{root}", clips=True)


@pytest.mark.slow
def test_frames_of_a_video_file(folder, oracle):
    av = oracle("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    source = open_source(f"video:{folder({'a.mp4': file.getvalue(), 'b.mp4': b'no video'})}", clips=True)
    clip = source[0]["video"]
    assert len(clip) == 6
    got = np.stack(clip.read([1, 4], Data())).astype(int)
    assert np.abs(got - FRAMES[[1, 4]]).mean() < 12 < np.abs(got - FRAMES[[4, 1]]).mean()
    with pytest.raises(BadRecord, match="ends before frame 9"):
        clip.read([2, 9], Data())
    with pytest.raises(BadRecord, match="corrupt video"):
        len(source[1]["video"])
