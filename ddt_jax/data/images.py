"""From encoded bytes to uint8 [S, S, 3]: decode, check, lay over the background, crop, resize, flip.

Whatever Pillow can open becomes plain 8-bit RGB or a BadRecord: never a guess, never a grey picture.
"""

import contextlib
import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord
from ddt_jax.errors import UserError
from ddt_jax.settings import Data

# The formats that training data come in. Pillow knows more, some of which start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "PPM", "BMP", "GIF", "TIFF")
# Sizes are checked against data.max_pixels before decoding; Pillow's second opinion at half of it is noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_file(file: str, data: Data) -> np.ndarray:
    """A picture of a user as the model takes it; see `prepare`. Raises UserError if it is none."""
    path = files.path_of(file)
    if not path.is_file():
        raise UserError(f"image: {file} does not exist")
    try:
        return prepare(path.read_bytes(), data)
    except BadRecord as error:
        raise UserError(f"image: {file} cannot be read: {error}") from error


def prepare(image, data: Data, rng: np.random.Generator | None = None):
    """One image as the model takes it.

    Args:
      image: encoded bytes, or uint8 [H, W, 3].
      data: image_size, crop, flip, background, min_image_size, max_pixels.
      rng: for random crops and flips, drawn in this order; None = center crop, no flip (evaluation).

    Returns:
      uint8 [S, S, 3], contiguous.

    Raises:
      BadRecord: corrupt, too large, too small, or of a kind that has no plain RGB reading.
    """
    if isinstance(image, np.ndarray):
        check_array(image, data)
    else:
        image = decode(image, data)
    return fit(image[None], data, rng)[0]


def check_array(image, data: Data):
    """Raises BadRecord unless it is uint8 [H, W, 3] of a size that the settings allow."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise BadRecord(f"array of {image.dtype} {list(image.shape)} is not an image")
    _check_size(image.shape[1], image.shape[0], data)


def decode(encoded: bytes, data: Data):
    """Encoded bytes to uint8 [H, W, 3], upright; the first frame of an animation.

    Raises:
      BadRecord: see `prepare`.
    """
    with opened(encoded) as image:
        return rgb(image, data)


@contextlib.contextmanager
def opened(encoded: bytes):
    """A Pillow image, nothing of it decoded; what goes wrong with it inside becomes a BadRecord."""
    kind = "image"
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            kind = image.format
            yield image
    except BadRecord:
        raise
    except Image.UnidentifiedImageError:
        raise BadRecord("empty file" if not encoded else "not an image in a known format") from None
    except Image.DecompressionBombError:
        raise BadRecord("more pixels than Pillow opens") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        if any(word in str(error).lower() for word in ("truncated", "unexpected end", "eof")):
            raise BadRecord(f"truncated {kind}") from None
        raise BadRecord(f"corrupt {kind} ({error})") from None


def rgb(image, data: Data):
    """The frame at which an opened image stands: uint8 [H, W, 3], upright."""
    _check_size(*image.size, data)
    image.load()
    return _to_rgb(_upright(image), data.background)


def _check_size(width: int, height: int, data: Data):
    if width * height > data.max_pixels:
        raise BadRecord(f"{width} x {height} pixels, more than data.max_pixels={data.max_pixels}")
    if min(width, height) < data.min_image_size:
        raise BadRecord(f"{width} x {height} pixels, smaller than data.min_image_size={data.min_image_size}")


def _upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image


def _to_rgb(image, background):
    mode = image.mode
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _over(image.convert("RGBA"), background)
    if mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadRecord(f"32-bit pixels ({grey.min()} to {grey.max()})")
        # A 16-bit file says nothing about the range it uses, so the full range is taken: 65535 = 257 * 255.
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if mode == "F":
        raise BadRecord("floating-point pixels")
    return np.asarray(image.convert("RGB"))


def _over(image, background):
    rgba = np.asarray(image).astype(np.int32)
    alpha = rgba[..., 3:]
    mixed = rgba[..., :3] * alpha + np.asarray(background, np.int32) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def fit(images, data: Data, rng=None):
    """Crop, antialiased resize and flip of uint8 [T, H, W, 3], the same for all, to the model's size; see `prepare`."""
    height, width = images.shape[1:3]
    side = min(height, width)
    if data.crop == "stretch":
        left, top, crop_width, crop_height = 0, 0, width, height
    elif data.crop == "random" and rng is not None:
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        crop_width = crop_height = side
    else:
        left, top = (width - side) // 2, (height - side) // 2
        crop_width = crop_height = side
    images = images[:, top : top + crop_height, left : left + crop_width]
    if images.shape[1:3] != (data.image_size, data.image_size):
        images = np.stack([_resized(image, data.image_size) for image in images])
    if data.flip and rng is not None and rng.random() < 0.5:
        images = images[:, :, ::-1]
    return np.ascontiguousarray(images)


def _resized(image, size):
    # Pillow widens the bicubic kernel by the scale when it shrinks an image, which is the antialiasing.
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BICUBIC))
