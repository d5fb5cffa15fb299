"""What a scene is drawn from: shapes, colours, sizes, cells and backgrounds, and their rasters.

Everything is laid out in pixels of a 32 px picture (2 x 2 cells of 16 px); 64 px pictures are the same at twice the
scale. The four shapes were chosen by measurement: of 17 candidates they are nearly the set whose smallest squared
difference is largest after a 1 px blur, under the best shift of up to 2 px and between any two sizes (19 at first, 16
with a thicker rim). Disc against square or diamond against plus has 1, and a tokenizer confuses exactly those.
tests/data/test_scenes.py::test_any_two_shapes_stay_apart_when_blurred holds it.

Legend: H shapes, Z sizes, J jitters along one axis, C cell side, S image side, N backgrounds.
"""

from functools import lru_cache

import numpy as np

SHAPES = ("disc", "frame", "bar", "pillar")  # a bar lies, a pillar stands
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
CELLS = ("top left", "top right", "bottom left", "bottom right")  # row by row
JITTERS = (-1, 0, 1)
MAX_OBJECTS = 3  # one cell is always empty and shows the background

BASE_SIZE = 32
CELL = 16
RADII = (5.0, 7.0)  # 7 and a jitter of 1 just fit the half cell of 8

COLOUR_RGB = np.array(
    [(222, 40, 44), (34, 186, 70), (36, 74, 214), (250, 214, 40), (190, 44, 206), (44, 208, 226)], np.float32
)

# Light warm, light cool, middle, dark; each lit from one of four sides. 16 pictures in all cost a tokenizer 4 bit.
_TINTS = np.array([(230, 222, 208), (192, 200, 214), (120, 114, 110), (54, 58, 72)], np.float32)
_LIGHTS = ((-1, 0), (1, 0), (0, -1), (0, 1))
_SHADE = 14.0  # brightness at the lit edge, less as much at the other one
NUM_BACKGROUNDS = len(_TINTS) * len(_LIGHTS)

_SUPERSAMPLE = 8


def _covers(shape, x, y):
    """Whether the points (x, y), in radii from the centre, lie inside the shape."""
    if shape == "disc":
        return x * x + y * y <= 1
    if shape == "frame":
        side = np.maximum(np.abs(x), np.abs(y))
        return (side <= 0.95) & (side >= 0.5)
    along, across = (x, y) if shape == "bar" else (y, x)
    return (np.abs(along) <= 1) & (np.abs(across) <= 0.4)


def coverage(shape, radius, cell, dx=0.0, dy=0.0):
    """Share of each pixel that a shape covers.

    Args:
      shape: one of SHAPES.
      radius, dx, dy: in pixels of this raster; dx goes right and dy goes down from the middle of the cell.
      cell: side of the raster in pixels.
    Returns:
      float32 [cell, cell] in [0, 1].
    """
    points = (np.arange(cell * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE - cell / 2
    inside = _covers(shape, (points[None, :] - dx) / radius, (points[:, None] - dy) / radius)
    return inside.reshape(cell, _SUPERSAMPLE, cell, _SUPERSAMPLE).mean((1, 3), dtype=np.float32)


@lru_cache
def alpha_masks(image_size):
    """Coverage of every shape, size and jitter. float32 [H, Z, J (dy), J (dx), C, C], read only."""
    scale = image_size // BASE_SIZE
    masks = np.array(
        [
            [
                [[coverage(h, r * scale, CELL * scale, dx * scale, dy * scale) for dx in JITTERS] for dy in JITTERS]
                for r in RADII
            ]
            for h in SHAPES
        ]
    )
    masks.setflags(write=False)
    return masks


@lru_cache
def backgrounds(image_size):
    """Every background. float32 [N, S, S, 3] in 0..255, read only."""
    ramp = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size * 2 - 1
    shades = [_SHADE * (lx * ramp[None, :] + ly * ramp[:, None]) for lx, ly in _LIGHTS]
    pictures = np.stack(
        [tint + np.broadcast_to(s, (image_size, image_size))[..., None] for tint in _TINTS for s in shades]
    )
    pictures.setflags(write=False)
    return pictures
