import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddt_jax.data.base import BadRecord
from ddt_jax.data.images import decode, prepare
from ddt_jax.settings import Data

DATA = Data(image_size=8, background=(10, 200, 30))


def saved(array, kind="PNG", mode=None, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array, mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(value, dtype=np.uint8):
    return np.full((8, 8), value, dtype)


def png(width, height, bits, colour, rows):
    """A PNG written by hand, for the kinds that Pillow does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_rgb_comes_back_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    out = prepare(saved(pixels), DATA)
    np.testing.assert_array_equal(out, pixels)
    assert out.flags.c_contiguous and out.dtype == np.uint8
    np.testing.assert_array_equal(prepare(pixels, DATA), pixels)


@pytest.mark.parametrize("alpha", [0, 1, 128, 254, 255])
def test_transparent_pixels_are_laid_over_the_background(alpha):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = (250, 0, 100), alpha
    want = np.rint((np.array([250, 0, 100.0]) * alpha + np.array(DATA.background) * (255 - alpha)) / 255)
    for mode in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if mode == "WEBP" else {}
        np.testing.assert_array_equal(decode(saved(pixels, mode, **options), DATA)[3, 3], want)


def test_grey_with_alpha_and_grey():
    both = np.stack([grey(60), grey(0)], -1)
    both[:4, :, 1] = 255
    out = decode(saved(Image.fromarray(both, "LA")), DATA)
    assert out[0, 0].tolist() == [60, 60, 60] and out[7, 7].tolist() == list(DATA.background)
    assert decode(saved(grey(77)), DATA)[0, 0].tolist() == [77, 77, 77]
    assert decode(saved(Image.new("1", (8, 8), 1)), DATA)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00"])
def test_palette_with_and_without_transparency(transparency):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([1, 2, 3, 90, 80, 70])
    image.putpixel((5, 5), 1)
    out = decode(saved(image, **({} if transparency is None else {"transparency": transparency})), DATA)
    assert out[0, 0].tolist() == [1, 2, 3]
    assert out[5, 5].tolist() == ([90, 80, 70] if transparency is None else list(DATA.background))


def test_transparent_colour_of_an_rgb_png():
    pixels = np.full((8, 8, 3), (9, 9, 9), np.uint8)
    pixels[0, 0] = 50
    out = decode(saved(pixels, transparency=(9, 9, 9)), DATA)
    assert out[0, 0].tolist() == [50, 50, 50] and out[1, 1].tolist() == list(DATA.background)


def test_cmyk_jpeg_is_about_the_same_colour():
    rgb = Image.new("RGB", (32, 32), (200, 40, 90))
    out = decode(saved(rgb.convert("CMYK"), "JPEG", quality=95), DATA)
    assert np.abs(out.astype(int) - [200, 40, 90]).max() < 8


@pytest.mark.parametrize(("value", "want"), [(0, 0), (257, 1), (32768, 128), (65535, 255), (200, 1), (128, 0)])
def test_sixteen_bit_grey_is_scaled_by_its_full_range(value, want):
    out = decode(saved(grey(value, np.uint16)), DATA)
    assert (out == want).all() and out.shape == (8, 8, 3)
    pgm = b"P5 8 8 65535\n" + np.full(64, value, ">u2").tobytes()
    assert (decode(pgm, DATA) == want).all()
    assert (decode(saved(grey(value, np.uint16), "TIFF"), DATA) == want).all()


def test_sixteen_bit_colour():
    row = b"\0" + struct.pack(">HHH", 0xFFFF, 0x8000, 0x0101) * 8
    assert decode(png(8, 8, 16, 2, row * 8), DATA)[2, 2].tolist() == [255, 128, 1]


def test_wide_integers_and_floats_are_refused_not_guessed():
    with pytest.raises(BadRecord, match="32-bit"):
        decode(saved(grey(70_000, np.int32), "TIFF"), DATA)
    with pytest.raises(BadRecord, match="floating-point"):
        decode(saved(grey(0.5, np.float32), "TIFF"), DATA)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # What each value means, by hand: the stored rows and columns as seen by a person.
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    back = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(saved(np.ascontiguousarray(back), exif=exif), DATA)[..., 0], upright)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
        assert decode(data, DATA)[4, 4].tolist() == [255, 0, 0], kind


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_cut_off_file_is_bad_and_never_grey(kind, keep, encode):
    data = encode(kind, (64, 64))
    with pytest.raises(BadRecord) as error:
        decode(data[: int(len(data) * keep)], DATA)
    if kind in ("JPEG", "PNG") and keep > 0.8:
        assert str(error.value) == f"truncated {kind}"


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "empty file"), (b"hello", "known format"), (b"%!PS-Adobe", "known")]
)
def test_what_is_no_image_is_named(data, reason):
    with pytest.raises(BadRecord, match=reason):
        decode(data, DATA)


def test_flipped_byte_in_a_png_is_noticed(encode):
    data = bytearray(encode("PNG"))
    data[len(data) // 2] ^= 0x40
    with pytest.raises(BadRecord, match="PNG"):
        decode(bytes(data), DATA)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damage_is_a_bad_record_or_an_image_never_another_error(data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]))
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    encoded = bytearray(saved(pixels, kind))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert prepare(bytes(encoded), Data(image_size=8, max_pixels=10_000)).shape == (8, 8, 3)
    except BadRecord as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "header",
    [
        png(30_000, 30_000, 8, 2, b""),
        b"P6 30000 30000 255\n",
        b"BM" + struct.pack("<QIIiiHH", 0, 54, 40, 30_000, 30_000, 1, 24),
    ],
    ids=["png", "ppm", "bmp"],
)
def test_an_image_of_30000_by_30000_is_refused_by_its_header(header):
    """There are no pixels behind it, so that whoever decoded would say "truncated"; nor would they fit in memory."""
    for limit in (Data().max_pixels, 10**10):
        with pytest.raises(BadRecord, match="more pixels than Pillow opens"):
            decode(header + bytes(60), Data(max_pixels=limit))


def test_size_is_checked_before_decoding():
    with pytest.raises(BadRecord, match="2000 x 2000 pixels, more than data.max_pixels=1000"):
        decode(png(2000, 2000, 8, 2, b""), Data(max_pixels=1000))
    with pytest.raises(BadRecord, match="8 x 8 pixels, smaller than data.min_image_size=9"):
        decode(saved(grey(1)), Data(min_image_size=9))
    with pytest.raises(BadRecord, match="smaller"):
        prepare(np.zeros((8, 99, 3), np.uint8), Data(min_image_size=9))


@pytest.mark.parametrize("array", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)])
def test_arrays_that_are_no_images_are_refused(array):
    with pytest.raises(BadRecord, match="not an image"):
        prepare(array, DATA)


def columns():
    """8 rows, 24 columns; a pixel holds its column's number."""
    return np.repeat(np.tile(np.arange(24, dtype=np.uint8), (8, 1))[..., None], 3, axis=2)


def test_center_crop_is_in_the_middle():
    np.testing.assert_array_equal(prepare(columns(), DATA), columns()[:, 8:16])
    np.testing.assert_array_equal(prepare(columns().transpose(1, 0, 2), DATA), columns()[:, 8:16].transpose(1, 0, 2))


def test_random_crop_reaches_every_place_and_follows_its_key():
    data = Data(image_size=8, crop="random")
    lefts = {int(prepare(columns(), data, np.random.default_rng(seed))[0, 0, 0]) for seed in range(300)}
    assert lefts == set(range(17))
    first, again = (prepare(columns(), data, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(prepare(columns(), data), columns()[:, 8:16])  # evaluation: the middle


def test_flip_happens_half_the_time_and_not_in_evaluation():
    data = Data(image_size=8, flip=True)
    flips = [prepare(columns(), data, np.random.default_rng(seed))[0, 0, 0] == 15 for seed in range(400)]
    assert 150 < sum(flips) < 250  # 5 sigma
    assert prepare(columns(), data)[0, 0, 0] == 8


def test_stretch_keeps_both_ends():
    out = prepare(columns(), Data(image_size=8, crop="stretch"))
    assert out.shape == (8, 8, 3) and out[0, 0, 0] <= 2 and out[0, -1, 0] >= 21


def test_shrinking_is_antialiased():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    out = prepare(board, DATA).astype(int)  # plain bicubic would pick single squares: 0 or 255
    assert np.abs(out - 127.5).max() < 12
