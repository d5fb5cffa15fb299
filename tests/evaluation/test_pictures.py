import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFont

from ddt_jax.evaluation import pictures


def _images(n=3, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 200, (n, size, size, 3), dtype=np.uint8)


def _find(canvas, image):
    """Top left corners of the places where an image lies in a canvas."""
    h, w = image.shape[:2]
    starts = np.argwhere((canvas[: -h + 1, : -w + 1] == image[0, 0]).all(-1))
    return [(y, x) for y, x in starts.tolist() if (canvas[y : y + h, x : x + w] == image).all()]


def _enlarged(image, factor):
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def test_a_contact_sheet_shows_frames_evenly_in_time_a_row_for_each_clip():
    clips = np.stack([_images(9, seed=s) for s in (0, 1)])
    sheet = pictures.contact_sheet(clips, ["first", "second"], most=3)
    for clip in clips:
        places = [_find(sheet, _enlarged(frame, 3)) for frame in clip]
        shown = [i for i, place in enumerate(places) if place]
        assert shown == [0, 4, 8] and len({place[0][0] for place in places if place}) == 1
    assert _find(sheet, _enlarged(clips[1, 0], 3))[0][0] > _find(sheet, _enlarged(clips[0, 0], 3))[0][0]


def test_a_gif_moves_as_the_clips_do(tmp_path):
    clips = np.stack([np.repeat(_images(1, 8, seed=s), 3, axis=0) // 64 * 64 for s in (0, 1)])
    clips[:, 1] = 255 - clips[:, 1]
    frames = pictures.moving_grid(clips)
    pictures.save_gif(frames, tmp_path / "a.gif", per_second=4)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["duration"] == 250 and gif.info["loop"] == 0
        for i in range(3):
            gif.seek(i)
            assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - frames[i]).mean() < 8


def test_grid_shows_every_image_unchanged_in_its_row_and_column():
    originals, few, all_of_them = _images(seed=0), _images(seed=1), _images(seed=2)
    canvas = pictures.reconstruction_grid(originals, {"2 tokens\n17.0 dB": few, "all": all_of_them})
    assert canvas.dtype == np.uint8 and canvas.shape[2] == 3
    places = [[_find(canvas, _enlarged(image, 3)) for image in row] for row in (originals, few, all_of_them)]
    assert all(len(place) == 1 for row in places for place in row)
    y = np.array([[place[0][0] for place in row] for row in places])
    x = np.array([[place[0][1] for place in row] for row in places])
    assert (y == y[:, :1]).all() and (np.diff(y[:, 0]) >= 96).all()
    assert (x == x[:1]).all() and (np.diff(x[0]) >= 96).all()
    assert canvas.shape[0] >= y.max() + 96 and canvas.shape[1] >= x.max() + 96


def test_each_row_has_a_label_left_of_its_images():
    canvas = pictures.reconstruction_grid(_images(1), {"a": _images(1), "": _images(1)})
    (x,) = {_find(canvas, _enlarged(_images(1)[0], 3))[0][1]}
    tops = sorted(y for y, _ in _find(canvas, _enlarged(_images(1)[0], 3)))
    inked = [bool((canvas[y : y + 96, : x - 2] != 255).any()) for y in tops]
    assert inked == [True, True, False]


@pytest.mark.parametrize(("size", "factor"), [(8, 12), (32, 3), (64, 2), (100, 1), (256, 1)])
def test_small_images_are_enlarged_by_whole_factors(size, factor):
    image = _images(1, size)
    assert _find(pictures.grid(image), _enlarged(image[0], factor))


def test_captions_stand_below_their_images_and_fit_the_column():
    plain = pictures.grid(_images(4), columns=4)
    text = "three objects: a pillar at the top left that is large and purple"
    captioned = pictures.grid(_images(4), ["", text, "", "word" * 40], columns=4)
    corners = [_find(captioned, _enlarged(image, 4))[0] for image in _images(4)]
    inked = [bool((captioned[y + 130 :, x : x + 128] != 255).any()) for y, x in corners]
    assert inked == [False, True, False, True]
    gaps = [captioned[y + 130 :, x + 128 : x + 138] for y, x in corners]
    assert all((gap == 255).all() for gap in gaps)  # no text runs into the next column
    assert plain.shape[0] < captioned.shape[0]


def test_a_long_caption_ends_in_an_ellipsis_and_words_are_kept_in_order():
    font = ImageFont.load_default(12)
    assert pictures._wrap("a b  c", font, 500) == ["a b c"]
    lines = pictures._wrap(" ".join(str(i) for i in range(200)), font, 128)
    assert len(lines) == 8 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 128 for line in lines)
    assert " ".join(lines)[:60] == " ".join(str(i) for i in range(200))[:60]


def test_grey_images_are_drawn():
    grey = _images(2)[..., :1]
    canvas = pictures.grid(grey)
    assert _find(canvas, _enlarged(np.repeat(grey[0], 3, axis=-1), 3))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="'half' has the shape"):
        pictures.reconstruction_grid(_images(3), {"half": _images(2)})
    with pytest.raises(ValueError, match="uint8"):
        pictures.grid(_images().astype(np.float32))
    with pytest.raises(ValueError, match="no images"):
        pictures.grid(_images(0))
    with pytest.raises(ValueError, match="3 images but 2 captions"):
        pictures.grid(_images(3), ["a", "b"])


def test_saved_picture_reads_back_and_leaves_nothing_else(tmp_path):
    image = pictures.grid(_images())
    path = pictures.save_png(image, tmp_path / "new" / "grid.png")
    with Image.open(path) as saved:
        np.testing.assert_array_equal(np.asarray(saved), image)
    assert os.listdir(tmp_path / "new") == ["grid.png"]


def test_matplotlib_is_imported_only_when_drawing():
    code = (
        "import sys; from ddt_jax.evaluation import pictures, plots; "
        "print('matplotlib' in sys.modules, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_images_that_stand_side_by_side_are_all_there():
    left, right = _images(seed=0), _images(seed=1)
    tiles = pictures.side_by_side(left, right)
    for n, tile in enumerate(tiles):
        (at,), (beside,) = (_find(tile, _enlarged(side[n], 3)) for side in (left, right))
        assert at == (0, 0) and beside[0] == 0 and beside[1] > 96
    assert pictures.grid(tiles, ["a", "b", "c"]).shape[2] == 3


@pytest.mark.parametrize("side", [8, 32, 100])
def test_rows_of_a_sheet_are_those_that_it_was_made_of(side):
    rng = np.random.default_rng(side)
    images = [rng.integers(0, 255, (3, side, side, 3), np.uint8) for _ in range(3)]
    sheet = pictures.reconstruction_grid(images[0], {"2 tokens\n17 dB": images[1], "4 tokens": images[2]})
    rows = pictures.rows_of(sheet, 3)
    factor = max(1, -(-96 // side))
    size = side * factor
    assert [row.shape for row in rows] == [(size + 2, 3 * (size + 6) - 6 + 2, 3)] * 3
    for row, of in zip(rows, images, strict=True):
        for i, image in enumerate(of):
            left = 1 + i * (size + 6)
            assert (row[1 : 1 + size : factor, left : left + size : factor] == image).all()
    assert pictures.rows_of(np.zeros((77, 50, 3), np.uint8), 3) == []
