"""Pictures that a person looks at, made of images: grids of examples and of reconstructions.

Small images are enlarged by whole factors without smoothing, so that a pixel stays a pixel.
"""

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddt_jax.io import atomic

_TILE = 96  # enlarged until at least this wide
_GAP = 6
_MARGIN = 16
_FONT = 14
_SMALL_FONT = 12
_INK = (38, 42, 48)
_FAINT = (112, 118, 128)
_PAPER = (255, 255, 255)
_HAIRLINE = (216, 220, 226)  # around each tile, or white images would have no edge


def save_png(image, path):
    """Saves uint8 [H, W, 3] as PNG, whole or not at all. Returns the path."""
    return atomic.write_bytes(path, _png(Image.fromarray(np.asarray(image))))


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _checked(images):
    """[N, H, W, 3] uint8; grey images get three channels.

    Raises:
      ValueError: for anything else.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise ValueError(f"pictures are uint8 [N, H, W, 1 or 3]; got {images.dtype} {images.shape}")
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _enlarge(images, tile):
    factor = max(1, math.ceil(tile / images.shape[2]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def _paste(draw, canvas, image, x, y):
    draw.rectangle((x - 1, y - 1, x + image.shape[1], y + image.shape[0]), outline=_HAIRLINE)
    canvas.paste(Image.fromarray(image), (x, y))


def reconstruction_grid(originals, reconstructions: dict, first: str = "original") -> np.ndarray:
    """A column per image: the original, then what was made of it.

    Args:
      originals: uint8 [N, H, W, C].
      reconstructions: label (may have several lines) → uint8 of the same shape, top to bottom.
      first: label of the originals.
    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: if shapes differ or there is nothing to draw.
    """
    rows = {first: _checked(originals)} | {str(label): _checked(x) for label, x in reconstructions.items()}
    shape = rows[first].shape
    if not shape[0]:
        raise ValueError("pictures: there are no images to draw")
    for label, images in rows.items():
        if images.shape != shape:
            raise ValueError(f"pictures: {label!r} has the shape {images.shape}, the originals {shape}")
    rows = {label: _enlarge(images, _TILE) for label, images in rows.items()}
    height, width = rows[first].shape[1:3]

    font = ImageFont.load_default(_FONT)
    small = ImageFont.load_default(_SMALL_FONT)
    left = _MARGIN + 14 + math.ceil(max(font.getlength(line) for label in rows for line in label.split("\n")))
    size = (left + shape[0] * (width + _GAP) - _GAP + _MARGIN, 2 * _MARGIN + len(rows) * (height + _GAP))
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    y = _MARGIN
    for row, (label, images) in enumerate(rows.items()):
        head, *rest = label.split("\n")
        line = _FONT + 4
        top = y + (height - line * (1 + len(rest))) // 2
        draw.text((_MARGIN, top), head, _INK, font)
        for i, text in enumerate(rest):
            draw.text((_MARGIN, top + line * (i + 1)), text, _FAINT, small)
        for i, image in enumerate(images):
            _paste(draw, canvas, image, left + i * (width + _GAP), y)
        # A wider gap sets the originals apart from what is compared with them.
        y += height + _GAP * (2 if row == 0 else 1)
    return np.asarray(canvas)


def rows_of(sheet, rows: int) -> list[np.ndarray]:
    """The rows of a `reconstruction_grid` without their labels, originals first.

    Args:
      sheet: uint8 [H, W, 3].
      rows: how many it has.
    Returns:
      uint8 [h, w, 3] each, of one size; [] for a picture that is no such sheet.
    """
    height, rest = divmod(sheet.shape[0] - 2 * _MARGIN, rows)
    top = sheet[_MARGIN - 1]  # the hairline over the originals
    inked = np.flatnonzero((top == _HAIRLINE).all(axis=-1))
    if rest or height <= _GAP or not len(inked):
        return []
    left, height = inked[0], height - _GAP
    starts = [_MARGIN + row * (height + _GAP) + (_GAP if row else 0) for row in range(rows)]
    return [sheet[y - 1 : y + height + 1, left : sheet.shape[1] - _MARGIN + 1] for y in starts]


def grid(images, captions=None, *, columns: int = 0) -> np.ndarray:
    """Images in rows, each over its caption.

    Args:
      images: uint8 [N, H, W, C].
      captions: N texts, wrapped to the width of a tile; None: none.
      columns: 0: about as many as rows.
    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: for no images, or another number of captions.
    """
    images = _checked(images)
    n = len(images)
    if not n:
        raise ValueError("pictures: there are no images to draw")
    if captions is not None and len(captions) != n:
        raise ValueError(f"pictures: {n} images but {len(captions)} captions")
    images = _enlarge(images, _TILE if captions is None else 128)  # a caption needs a wider column
    height, width = images.shape[1:3]
    columns = min(n, columns or max(1, math.ceil(math.sqrt(n * 1.5))))
    font = ImageFont.load_default(_SMALL_FONT)
    line = _SMALL_FONT + 3
    texts = [_wrap(str(caption), font, width) for caption in captions] if captions is not None else [[]] * n
    gap = _GAP if captions is None else 2 * _GAP

    starts = range(0, n, columns)
    below = [max(len(text) for text in texts[i : i + columns]) * line for i in starts]
    size = (2 * _MARGIN + columns * (width + gap) - gap, 2 * _MARGIN + sum(height + gap + b for b in below) - gap)
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    y = _MARGIN
    for start, extra in zip(starts, below, strict=True):
        for column in range(min(columns, n - start)):
            x = _MARGIN + column * (width + gap)
            _paste(draw, canvas, images[start + column], x, y)
            for i, text in enumerate(texts[start + column]):
                draw.text((x, y + height + 3 + i * line), text, _INK, font)
        y += height + gap + extra
    return np.asarray(canvas)


def contact_sheet(clips, captions=None, *, most: int = 8) -> np.ndarray:
    """A row of frames, evenly spread in time, for each clip, over its caption.

    Args:
      clips: uint8 [N, T, H, W, C].
      captions: N texts; None: none.
      most: frames of a row.
    Returns:
      uint8 [H, W, 3].
    """
    clips = np.asarray(clips)
    shown = np.linspace(0, clips.shape[1] - 1, min(most, clips.shape[1])).round().astype(int)
    return grid(side_by_side(*(clips[:, t] for t in shown)), captions, columns=1)


def moving_grid(clips, captions=None) -> np.ndarray:
    """`grid` of clips uint8 [N, T, H, W, C], frame by frame: uint8 [T, H, W, 3]."""
    return np.stack([grid(frames, captions) for frames in np.asarray(clips).swapaxes(0, 1)])


def save_gif(frames, path, *, per_second: float = 8.0):
    """Saves uint8 [T, H, W, 3] as a GIF without end, whole or not at all. Returns the path."""
    first, *rest = (Image.fromarray(frame) for frame in np.asarray(frames))
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=rest, loop=0, duration=round(1000 / per_second))
    return atomic.write_bytes(path, buffer.getvalue())


def side_by_side(*images) -> np.ndarray:
    """Tiles for `grid` that each hold several images, left to right: uint8 [N, H, W, 3].

    Args:
      images: uint8 [N, H, W, C] each.
    """
    enlarged = [_enlarge(_checked(x), _TILE) for x in images]
    gap = np.full((*enlarged[0].shape[:2], _GAP, 3), _PAPER, np.uint8)
    return np.concatenate([part for x in enlarged for part in (gap, x)][1:], axis=2)


def _wrap(text, font, width, most=8):
    """Lines that fit the width, at most so many; what is left out shows as an ellipsis."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width:  # a word longer than the tile is cut
            cut = max(i for i in range(1, len(word) + 1) if i == 1 or font.getlength(word[:i]) <= width)
            lines, word = [line for line in lines if line] + [word[:cut]], word[cut:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
        while len(lines[-1]) > 1 and font.getlength(lines[-1]) > width:
            lines[-1] = lines[-1][:-3] + " …"
    return [line for line in lines if line]
