"""Procedural scenes with captions: one to three objects on a 2 x 2 grid, a pure function of (split, index, image size).

The two splits share no combination, that is no set of (shape, colour, size, cell): a hash sends a tenth of them to
`heldout`, and an index whose draw falls on the wrong side draws again. Randomness comes from a SplitMix64 stream in
plain integers: NumPy promises no stable streams across versions, and a new Generator costs as much as a picture.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ddt_jax.data import shapes
from ddt_jax.data.shapes import CELLS, COLOURS, JITTERS, MAX_OBJECTS, SHAPES, SIZES
from ddt_jax.errors import UserError

SPLITS = {"train": 1_000_000, "heldout": 100_000}
IMAGE_SIZES = (32, 64)
HELDOUT_ONE_IN = 10
_COUNT_PERCENT = (30, 75, 100)  # cumulative shares of 1, 2 and 3 objects

_MASK = (1 << 64) - 1
_SALTS = {"train": 0x5CE9E501, "heldout": 0x5CE9E502, "combination": 0x5CE9E503}
_CAPTION_SALT = 0xCA9710


def _mix(x):
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Stream:
    """Small deterministic random stream; `integers(high)` as numpy.random.Generator has it."""

    def __init__(self, *key):
        state = 0
        for part in key:
            state = _mix((state + part + 0x9E3779B97F4A7C15) & _MASK)
        self._state = state

    def integers(self, high):
        """An int in [0, high)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        return (_mix(self._state) * high) >> 64


def shuffled(items, rng):
    """The items as a list in a random order. rng: a Stream or a numpy.random.Generator."""
    items = list(items)
    for i in range(len(items) - 1, 0, -1):
        j = int(rng.integers(i + 1))
        items[i], items[j] = items[j], items[i]
    return items


class Obj(NamedTuple):
    """One object: names from data.shapes, its cell (row by row) and its jitter in pixels of a 32 px picture."""

    shape: str
    colour: str
    size: str
    cell: int
    dx: int = 0
    dy: int = 0

    @property
    def key(self):
        """(shape, colour, size, cell): what a caption says and the verifier reads."""
        return tuple(self[:4])


@dataclass(frozen=True)
class Scene:
    """Objects in the order of their cells, and the number of the background."""

    objects: tuple[Obj, ...]
    background: int

    @property
    def keys(self):
        """The combination: a frozenset of (shape, colour, size, cell)."""
        return frozenset(o.key for o in self.objects)


_KINDS = tuple((h, c, z) for h in SHAPES for c in COLOURS for z in SIZES)
_KIND_NUMBER = {kind: i for i, kind in enumerate(_KINDS)}


def _code_is_heldout(code):
    return Stream(_SALTS["combination"], code).integers(HELDOUT_ONE_IN) == 0


def _digit(kind, cell):
    """An object's part in the number of its combination: one digit per cell, 0 when empty."""
    return (kind + 1) * (len(_KINDS) + 1) ** cell


def is_heldout(keys):
    """Whether a combination (any collection of (shape, colour, size, cell)) belongs to the held-out split."""
    return _code_is_heldout(sum(_digit(_KIND_NUMBER[k[:3]], k[3]) for k in keys))


def sample_count(rng):
    """A number of objects, by its share of scenes."""
    percent = rng.integers(100)
    return 1 + sum(percent >= share for share in _COUNT_PERCENT)


def sample_combination(rng, count, split):
    """Keys of `count` objects that belong to a split, in the order of their cells."""
    code = None
    while code is None or _code_is_heldout(code) != (split == "heldout"):
        cells = sorted(shuffled(range(len(CELLS)), rng)[:count])
        kinds = [rng.integers(len(_KINDS)) for _ in cells]
        code = sum(map(_digit, kinds, cells))
    return [(*_KINDS[kind], cell) for kind, cell in zip(kinds, cells, strict=True)]


def jittered(key, rng):
    """The Obj of a key, a little off the middle of its cell."""
    return Obj(*key, JITTERS[rng.integers(len(JITTERS))], JITTERS[rng.integers(len(JITTERS))])


def sample_scene(split, index):
    """The scene of an index. The number of objects is drawn once, so that redrawing does not shift its shares."""
    rng = Stream(_SALTS[split], index)
    keys = sample_combination(rng, sample_count(rng), split)
    return Scene(tuple(jittered(key, rng) for key in keys), rng.integers(shapes.NUM_BACKGROUNDS))


def render(scene, image_size=32):
    """The picture of a scene: uint8 [image_size, image_size, 3]."""
    picture = shapes.backgrounds(image_size)[scene.background].copy()
    masks = shapes.alpha_masks(image_size)
    side = image_size // 2
    for o in scene.objects:
        top, left = (o.cell // 2) * side, (o.cell % 2) * side
        block = picture[top : top + side, left : left + side]
        alpha = masks[SHAPES.index(o.shape), SIZES.index(o.size), JITTERS.index(o.dy), JITTERS.index(o.dx), ..., None]
        block += alpha * (shapes.COLOUR_RGB[COLOURS.index(o.colour)] - block)
    return (picture + 0.5).astype(np.uint8)


# Phrasings: an opening and the words for one object. Objects are joined by commas and a last "and".
_PHRASINGS = (
    ("", "a {size} {colour} {shape} at the {cell}"),
    ("", "at the {cell} a {size} {colour} {shape}"),
    ("a picture of ", "a {size} {colour} {shape} in the {cell} corner"),
    ("{count}: ", "a {shape} at the {cell} that is {size} and {colour}"),
    ("there is ", "a {colour} {shape} at the {cell} of {size} size"),
    ("{count}: ", "{cell} {size} {colour} {shape}"),
)
NUM_PHRASINGS = len(_PHRASINGS)
_COUNT_WORDS = ("one object", "two objects", "three objects")
assert len(_COUNT_WORDS) == MAX_OBJECTS


def _item_pattern(words):
    groups = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "cell": CELLS}
    return words.format(**{name: f"(?P<{name}>{'|'.join(options)})" for name, options in groups.items()})


_ITEM_PATTERNS = tuple(re.compile(_item_pattern(words)) for _, words in _PHRASINGS)


def phrase(keys, phrasing):
    """The caption of objects, (shape, colour, size, cell) or Obj in the order given, in one of NUM_PHRASINGS ways."""
    opening, words = _PHRASINGS[phrasing]
    items = [words.format(shape=k[0], colour=k[1], size=k[2], cell=CELLS[k[3]]) for k in keys]
    listed = items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
    return opening.format(count=_COUNT_WORDS[len(items) - 1]) + listed


def caption_of(scene, rng):
    """A caption that names every attribute of every object; order and phrasing are random.

    Args:
      scene: a Scene.
      rng: a Stream or a numpy.random.Generator.
    """
    return phrase(shuffled(scene.objects, rng), int(rng.integers(NUM_PHRASINGS)))


def parse_caption(text):
    """What a caption says: the inverse of `caption_of`.

    Case, spacing and a final full stop are ignored; otherwise only a text that `phrase` can make is understood.

    Returns:
      frozenset of (shape, colour, size, cell), or None for any other text.
    """
    text = " ".join(text.lower().split()).removesuffix(".").rstrip()
    for phrasing, pattern in enumerate(_ITEM_PATTERNS):
        keys = [(m["shape"], m["colour"], m["size"], CELLS.index(m["cell"])) for m in pattern.finditer(text)]
        cells = {k[3] for k in keys}
        # Saying it again must give the same words: that refuses junk between the items and a wrong count.
        if 0 < len(keys) == len(cells) <= MAX_OBJECTS and phrase(keys, phrasing) == text:
            return frozenset(keys)
    return None


class ScenesSource:
    """The scenes of one split as a Source (see data.base).

    Args:
      split: "train" (1,000,000 scenes) or "heldout" (100,000).
      image_size: 32 or 64.

    Raises:
      UserError: for another split or size.
    """

    kind = "scenes"
    label_names = ("no object", "one object", "two objects", "three objects")

    def __init__(self, split="train", image_size=32):
        if split not in SPLITS:
            names = " or ".join(f"{self.kind}:{name}" for name in SPLITS)
            raise UserError(f"data: {self.kind}:{split} is not a split of scenes; use {names}")
        if image_size not in IMAGE_SIZES:
            raise UserError(f"data: scenes cannot be drawn at {image_size} px; set data.image_size to 32 or 64")
        self.split = split
        self.image_size = image_size
        self.name = f"{self.kind}:{split}"

    def __len__(self):
        return SPLITS[self.split]

    def check(self, i):
        """Raises IndexError outside 0 <= i < len(self)."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self):,} scenes, not one numbered {i}")

    def scene(self, i):
        """The Scene behind record i; IndexError outside 0 <= i < len(self)."""
        self.check(i)
        return sample_scene(self.split, int(i))

    def __getitem__(self, i):
        """Record with image uint8 [S, S, 3], caption, label (the number of objects) and meta {"scene": Scene}."""
        scene = self.scene(i)
        return {
            "image": render(scene, self.image_size),
            "caption": caption_of(scene, Stream(_SALTS[self.split], int(i), _CAPTION_SALT)),
            "label": len(scene.objects),
            "meta": {"scene": scene},
        }

    def describe(self, i):
        """Where record i comes from, for error messages."""
        return f"{self.name} index {i}"
