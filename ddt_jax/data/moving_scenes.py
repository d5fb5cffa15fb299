"""Procedural clips with captions: one or two objects, each on a lane of its own, a pure function of (split, index).

All objects of a clip move along one axis: across the picture, on its top or bottom half, or up and down, on its left or
right half. So they never meet. What leaves on one side comes back on the other, and after `PERIOD` frames all begins
anew: clips have no end, and what is drawn beyond the length that was trained can be judged by the same rules.

The two splits share no combination, that is no set of (shape, colour, size, direction, speed, lane); see data.scenes.
Legend: T frames, S image side, C cell side.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ddt_jax.data import shapes
from ddt_jax.data.base import Record
from ddt_jax.data.scenes import IMAGE_SIZES, Stream, shuffled
from ddt_jax.data.shapes import BASE_SIZE, CELL, COLOURS, JITTERS, SHAPES, SIZES
from ddt_jax.errors import UserError

SPLITS = {"train": 1_000_000, "heldout": 100_000}
HELDOUT_ONE_IN = 10
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")  # one pixel of a 32 px picture in a frame, or two
LANES = (("top", "bottom"), ("left side", "right side"))  # of each axis, in the order in which labels name them
MAX_OBJECTS = 2
PERIOD = BASE_SIZE

_SALTS = {"train": 0x30F1A601, "heldout": 0x30F1A602, "combination": 0x30F1A603}
_CAPTION_SALT = 0xCA9711
_KINDS = tuple((h, c, z, d, s) for h in SHAPES for c in COLOURS for z in SIZES for d in DIRECTIONS for s in SPEEDS)
_KIND_NUMBER = {kind: i for i, kind in enumerate(_KINDS)}


class Mover(NamedTuple):
    """One object: names from data.shapes and this file, its lane (0 or 1), and what captions leave out.

    `start` is where its middle is in frame 0, `offset` how far it is from the middle of its lane, both in pixels of a
    32 px picture.
    """

    shape: str
    colour: str
    size: str
    direction: str
    speed: str
    lane: int
    start: int = 0
    offset: int = 0

    @property
    def key(self):
        """(shape, colour, size, direction, speed, lane): what a caption says and the verifier reads."""
        return tuple(self[:6])

    def at(self, frame: int) -> tuple[int, int]:
        """Row and column of its middle in a frame, in pixels of a 32 px picture."""
        along = (self.start + velocity(self.direction, self.speed) * frame) % BASE_SIZE
        across = CELL // 2 + CELL * self.lane + self.offset
        return (along, across) if axis_of(self.direction) else (across, along)


@dataclass(frozen=True)
class MovingScene:
    """Objects in the order of their lanes, and the number of the background."""

    objects: tuple[Mover, ...]
    background: int

    @property
    def keys(self):
        """The combination: a frozenset of keys."""
        return frozenset(o.key for o in self.objects)


def axis_of(direction: str) -> int:
    """0: across the picture, 1: up and down."""
    return DIRECTIONS.index(direction) // 2


def velocity(direction: str, speed: str) -> int:
    """Pixels of a 32 px picture in a frame, to the right or down."""
    return (1 if direction in ("right", "down") else -1) * (1 + SPEEDS.index(speed))


# Directions of the objects in the order of their lanes; a clip's label is its number here.
MOTIONS = tuple((d,) for d in DIRECTIONS) + tuple(
    (a, b) for a in DIRECTIONS for b in DIRECTIONS if axis_of(a) == axis_of(b)
)


def label_of(keys) -> int:
    """The number of the motion of objects (keys or Movers, in any order) among MOTIONS."""
    return MOTIONS.index(tuple(k[3] for k in sorted(keys, key=lambda k: k[5])))


def is_heldout(keys) -> bool:
    """Whether a combination (any collection of keys or Movers) belongs to the held-out split."""
    code = sum((_KIND_NUMBER[tuple(k[:5])] + 1) * (len(_KINDS) + 1) ** k[5] for k in keys)
    return Stream(_SALTS["combination"], code).integers(HELDOUT_ONE_IN) == 0


def sample_scene(split: str, index: int) -> MovingScene:
    """The scene of an index. Axis and number of objects are drawn once, so that redrawing leaves their shares alone."""
    rng = Stream(_SALTS[split], index)
    axis, count = rng.integers(2), 1 + rng.integers(MAX_OBJECTS)
    kinds = [kind for kind in _KINDS if axis_of(kind[3]) == axis]
    keys = None
    while keys is None or is_heldout(keys) != (split == "heldout"):
        lanes = sorted(shuffled(range(MAX_OBJECTS), rng)[:count])
        keys = [(*kinds[rng.integers(len(kinds))], lane) for lane in lanes]
    movers = (Mover(*key, rng.integers(PERIOD), JITTERS[rng.integers(len(JITTERS))]) for key in keys)
    return MovingScene(tuple(movers), rng.integers(shapes.NUM_BACKGROUNDS))


def render(scene: MovingScene, numbers, image_size: int = BASE_SIZE) -> np.ndarray:
    """Frames of a scene by their numbers: uint8 [T, S, S, 3]."""
    scale, cell = image_size // BASE_SIZE, CELL * image_size // BASE_SIZE
    still = JITTERS.index(0)
    frames = np.repeat(shapes.backgrounds(image_size)[scene.background][None], len(numbers), axis=0)
    for o in scene.objects:
        alpha_CC1 = shapes.alpha_masks(image_size)[SHAPES.index(o.shape), SIZES.index(o.size), still, still, ..., None]
        for picture, number in zip(frames, numbers, strict=True):
            corner = [(middle - CELL // 2) * scale for middle in o.at(number)]
            place = np.ix_(*((start + np.arange(cell)) % image_size for start in corner))
            picture[place] += alpha_CC1 * (shapes.COLOUR_RGB[COLOURS.index(o.colour)] - picture[place])
    return (frames + 0.5).astype(np.uint8)


# Phrasings: an opening and the words for one object. Objects are joined by commas and a last "and".
_PHRASINGS = (
    ("", "a {size} {colour} {shape} moves {speed} {direction} along the {lane}"),
    ("", "along the {lane} a {size} {colour} {shape} moves {direction} {speed}"),
    ("a clip of ", "a {colour} {shape} of {size} size that moves {speed} {direction} along the {lane}"),
    ("{count}: ", "{size} {colour} {shape} {speed} {direction} along the {lane}"),
)
NUM_PHRASINGS = len(_PHRASINGS)
_COUNT_WORDS = ("one object", "two objects")
_DIRECTION_WORDS = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
_LANE_WORDS = {words: (axis, lane) for axis, names in enumerate(LANES) for lane, words in enumerate(names)}


def _item_pattern(words):
    groups = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "speed": SPEEDS}
    groups |= {"direction": _DIRECTION_WORDS.values(), "lane": _LANE_WORDS}
    return re.compile(words.format(**{name: f"(?P<{name}>{'|'.join(options)})" for name, options in groups.items()}))


_ITEM_PATTERNS = tuple(_item_pattern(words) for _, words in _PHRASINGS)


def phrase(keys, phrasing: int) -> str:
    """The caption of objects, keys or Movers in the order given, in one of NUM_PHRASINGS ways."""
    opening, words = _PHRASINGS[phrasing]
    items = [
        words.format(
            shape=k[0],
            colour=k[1],
            size=k[2],
            direction=_DIRECTION_WORDS[k[3]],
            speed=k[4],
            lane=LANES[axis_of(k[3])][k[5]],
        )
        for k in keys
    ]
    listed = items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
    return opening.format(count=_COUNT_WORDS[len(items) - 1]) + listed


def caption_of(scene: MovingScene, rng) -> str:
    """A caption that names every attribute of every object; order and phrasing are random. rng: a `Stream`."""
    return phrase(shuffled(scene.objects, rng), int(rng.integers(NUM_PHRASINGS)))


def parse_caption(text: str) -> frozenset | None:
    """What a caption says: the inverse of `caption_of`, a frozenset of keys.

    Case, spacing and a final full stop are ignored; None for any text that `phrase` cannot make of such a scene.
    """
    text = " ".join(text.lower().split()).removesuffix(".").rstrip()
    directions = {words: name for name, words in _DIRECTION_WORDS.items()}
    for phrasing, pattern in enumerate(_ITEM_PATTERNS):
        keys, axes = [], set()
        for m in pattern.finditer(text):
            axis, lane = _LANE_WORDS[m["lane"]]
            axes.add(axis)
            keys.append((m["shape"], m["colour"], m["size"], directions[m["direction"]], m["speed"], lane))
        lanes, fits = {k[5] for k in keys}, all(axes == {axis_of(k[3])} for k in keys)
        # Saying it again must give the same words: that refuses junk between the items and a wrong count.
        if fits and 0 < len(keys) == len(lanes) and phrase(keys, phrasing) == text:
            return frozenset(keys)
    return None


@dataclass(frozen=True)
class _Clip:
    """The frames of one scene; see `data.videos.Clip`."""

    scene: MovingScene
    image_size: int

    def __len__(self):
        return PERIOD

    def read(self, numbers, data):
        del data
        return list(render(self.scene, list(numbers), self.image_size))


class MovingScenesSource:
    """The moving scenes of one split as a Source of clips (see data.base).

    Args:
      split: "train" (1,000,000 scenes) or "heldout" (100,000).
      image_size: 32 or 64.

    Raises:
      UserError: for another size.
    """

    clips = True
    label_names = tuple(" and ".join(directions) for directions in MOTIONS)

    def __init__(self, split: str, image_size: int):
        if image_size not in IMAGE_SIZES:
            raise UserError(f"data: moving scenes cannot be drawn at {image_size} px; set data.image_size to 32 or 64")
        self.split = split
        self.image_size = image_size
        self.name = f"moving_scenes:{split}"

    def __len__(self):
        return SPLITS[self.split]

    def scene(self, index) -> MovingScene:
        """The scene behind record i; IndexError outside 0 <= i < len(self)."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self):,} scenes, not one numbered {index}")
        return sample_scene(self.split, int(index))

    def __getitem__(self, index) -> Record:
        """Record with video, caption, label (the number of the motion) and meta {"scene": MovingScene}."""
        scene = self.scene(index)
        return Record(
            video=_Clip(scene, self.image_size),
            caption=caption_of(scene, Stream(_SALTS[self.split], int(index), _CAPTION_SALT)),
            label=label_of(scene.objects),
            meta={"scene": scene},
        )

    def describe(self, index):
        return f"{self.name} index {index}"
