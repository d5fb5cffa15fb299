"""Edits of scenes: a picture, what to do with it, and the picture that should come of it.

A pure function of (split, index, image size), as scenes are. One object is recoloured, resized, given another shape,
moved to an empty cell, taken away or added; all else stays, place in the cell and background included. Both scenes of a
pair belong to the split, so a held-out edit starts and ends at combinations that no training has shown.

An instruction names its object by what tells it from the others. `parse_instruction` reads it back, so that a program
can say from the words alone what should be seen.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ddt_jax.data import scenes, shapes
from ddt_jax.data.scenes import Obj, Scene, ScenesSource, Stream
from ddt_jax.data.shapes import CELLS, COLOURS, MAX_OBJECTS, SHAPES, SIZES

KINDS = ("recolour", "resize", "reshape", "move", "remove", "add")
_SALTS = {"train": 0x5CE9ED01, "heldout": 0x5CE9ED02}
_WORDS_SALT = 0xED175

# An object by some of its attributes. Which of these say enough depends on the scene.
_REFERENCES = (
    "the {shape}",
    "the {colour} object",
    "the {colour} {shape}",
    "the {size} {colour} {shape}",
    "the object at the {cell}",
    "the {shape} at the {cell}",
)
_NEW = "a {new_size} {new_colour} {new_shape}"
_PHRASINGS = {
    "recolour": ("make {ref} {new_colour}", "paint {ref} {new_colour}", "change the colour of {ref} to {new_colour}"),
    "resize": ("make {ref} {new_size}", "change the size of {ref} to {new_size}"),
    "reshape": ("turn {ref} into a {new_shape}", "make a {new_shape} of {ref}"),
    "move": ("move {ref} to the {new_cell}", "put {ref} at the {new_cell}"),
    "remove": ("remove {ref}", "take {ref} away"),
    "add": (f"add {_NEW} at the {{new_cell}}", f"draw {_NEW} at the {{new_cell}}", f"at the {{new_cell}} add {_NEW}"),
}
NUM_PHRASINGS = {kind: len(phrasings) for kind, phrasings in _PHRASINGS.items()}
_CHOICES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "cell": CELLS}
_CHANGES = {"recolour": "colour", "resize": "size", "reshape": "shape", "move": "cell"}


class Edit(NamedTuple):
    """What is done.

    Attributes:
      kind: one of KINDS.
      cell: of the object that it is done to; -1 where one is added.
      value: the new attribute, by name (of "move", the number of a cell); of "add", the key of the new object; None
        where one is removed.
    """

    kind: str
    cell: int
    value: Any = None


def is_possible(objects: Iterable[Obj], edit: Edit) -> bool:
    """Whether an edit can be made: it changes something, finds its object and room, and leaves a scene."""
    by_cell = {o.cell: o for o in objects}
    if edit.kind == "add":
        return len(by_cell) < MAX_OBJECTS and edit.value[3] not in by_cell
    if edit.cell not in by_cell:
        return False
    if edit.kind == "remove":
        return len(by_cell) > 1
    if edit.kind == "move":
        return edit.value not in by_cell
    return getattr(by_cell[edit.cell], _CHANGES[edit.kind]) != edit.value


def apply(objects: Iterable[Obj], edit: Edit) -> tuple[Obj, ...]:
    """The objects after a possible edit, in the order of their cells."""
    by_cell = {o.cell: o for o in objects}
    if edit.kind == "add":
        added = Obj(*edit.value)
        by_cell[added.cell] = added
    else:
        old = by_cell.pop(edit.cell)
        if edit.kind != "remove":
            new = old._replace(**{_CHANGES[edit.kind]: edit.value})
            by_cell[new.cell] = new
    return tuple(by_cell[cell] for cell in sorted(by_cell))


class Pair(NamedTuple):
    """A scene, an edit of it and what comes of it."""

    source: Scene
    edit: Edit
    edited: Scene


def sample_pair(split: str, index: int) -> Pair:
    """The pair of an index. The kind is drawn once, so that redrawing does not shift its share; not so the number of
    objects, because some splits hold no edit of some kind between two single objects."""
    rng = Stream(_SALTS[split], index)
    kind = KINDS[rng.integers(len(KINDS))]
    fewest, most = int(kind == "remove") + 1, MAX_OBJECTS - int(kind == "add")
    while True:
        count = 0
        while not fewest <= count <= most:
            count = scenes.sample_count(rng)
        objects = [Obj(*key) for key in scenes.sample_combination(rng, count, split)]
        edit = _propose(kind, objects, rng)
        if scenes.is_heldout(o.key for o in apply(objects, edit)) == (split == "heldout"):
            break
    objects = [scenes.jittered(o.key, rng) for o in objects]
    if kind == "add":
        edit = edit._replace(value=scenes.jittered(edit.value, rng))
    background = rng.integers(shapes.NUM_BACKGROUNDS)
    return Pair(Scene(tuple(objects), background), edit, Scene(apply(objects, edit), background))


def _propose(kind, objects, rng):
    """A possible edit of a kind."""
    taken = {o.cell for o in objects}
    empty = [cell for cell in range(len(CELLS)) if cell not in taken]
    if kind == "add":
        key = [options[rng.integers(len(options))] for options in (SHAPES, COLOURS, SIZES, empty)]
        return Edit(kind, -1, tuple(key))
    chosen = objects[rng.integers(len(objects))]
    if kind == "remove":
        return Edit(kind, chosen.cell)
    name = _CHANGES[kind]
    options = empty if kind == "move" else [x for x in _CHOICES[name] if x != getattr(chosen, name)]
    return Edit(kind, chosen.cell, options[rng.integers(len(options))])


def _words(key, prefix=""):
    shape, colour, size, cell = key[:4]
    words = {"shape": shape, "colour": colour, "size": size, "cell": CELLS[cell]}
    return {f"{prefix}{name}": word for name, word in words.items()}


def references(objects: Iterable[Obj], cell: int) -> list[str]:
    """All ways to name the object in a cell that name no other one."""
    said = {o.cell: [form.format(**_words(o)) for form in _REFERENCES] for o in objects}
    others = {text for c, texts in said.items() if c != cell for text in texts}
    return [text for text in said[cell] if text not in others]


def instruction(objects: Iterable[Obj], edit: Edit, phrasing: int, reference: int = 0) -> str:
    """An edit in words.

    Args:
      objects: of the scene that is edited.
      phrasing: which of NUM_PHRASINGS[edit.kind].
      reference: which of `references`, counted round.
    """
    template = _PHRASINGS[edit.kind][phrasing]
    if edit.kind == "add":
        return template.format(**_words(edit.value, "new_"))
    names = references(objects, edit.cell)
    changed = _CHANGES.get(edit.kind, "")
    value = CELLS[edit.value] if edit.kind == "move" else edit.value
    return template.format(ref=names[reference % len(names)], **{f"new_{changed}": value})


def _pattern(template):
    groups = {f"new_{name}": f"(?P<{name}>{'|'.join(options)})" for name, options in _CHOICES.items()}
    return re.compile(template.format(ref="(?P<ref>the .+)", **groups))


_PATTERNS = [(kind, _pattern(template)) for kind, templates in _PHRASINGS.items() for template in templates]


def parse_instruction(text: str, objects: Iterable[Obj]) -> Edit | None:
    """The edit that an instruction asks for: the inverse of `instruction`.

    Case, spacing and a final full stop are ignored.

    Args:
      objects: of the scene that it is said of.

    Returns:
      None for any other text, an object that is not there or not the only one, or an edit that is not possible.
    """
    text = " ".join(text.lower().split()).removesuffix(".").rstrip()
    objects = list(objects)
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            edit = _read(kind, match.groupdict(), objects)
            if edit is not None and is_possible(objects, edit):
                return edit
    return None


def _read(kind, said, objects):
    if kind == "add":
        return Edit(kind, -1, (said["shape"], said["colour"], said["size"], CELLS.index(said["cell"])))
    named = [o.cell for o in objects if said["ref"] in references(objects, o.cell)]
    if not named:
        return None
    value = said.get(_CHANGES.get(kind, ""))
    return Edit(kind, named[0], CELLS.index(value) if kind == "move" else value)


class EditsSource(ScenesSource):
    """Pairs of one split as a Source (see data.base): each record has two images and a document of its own.

    Args:
      split, image_size, and what is raised: as `ScenesSource`.
    """

    kind = "scenes_edits"

    def pair(self, i) -> Pair:
        """The Pair behind record i; IndexError outside 0 <= i < len(self)."""
        self.check(i)
        return sample_pair(self.split, int(i))

    def scene(self, i):
        """The scene before the edit, which `image`, `caption` and `label` are of."""
        return self.pair(i).source

    def __getitem__(self, i):
        """As that of scenes, of the scene before the edit, and in meta `images`: one, of the scene after it, `turns`
        (see multimodal/records.py), `pair` and `instruction`."""
        pair = self.pair(i)
        rng = Stream(_SALTS[self.split], int(i), _WORDS_SALT)
        objects, edit = pair.source.objects, pair.edit
        said = instruction(objects, edit, rng.integers(NUM_PHRASINGS[edit.kind]), rng.integers(len(_REFERENCES)))
        return {
            "image": scenes.render(pair.source, self.image_size),
            "caption": scenes.caption_of(pair.source, rng),
            "label": len(objects),
            "meta": {
                "images": [scenes.render(pair.edited, self.image_size)],
                "turns": [["USER", [0, said]], ["ASSISTANT", [1]]],
                "pair": pair,
                "instruction": said,
            },
        }
