"""Pictures and captions of the built-in scenes, judged by what they say: text to image, image to text, editing.

A program reads pictures (`data.scenes_verifier`) and captions (`data.scenes.parse_caption`), so every figure is a share
of right ones, {"value", "n", "low", "high"} with Wilson's interval of 95 %. Figures that nothing was asked of are left
out. The truth of a scene may be given as a caption, a Scene, or a collection of (shape, colour, size, cell); background
and jitter are not part of it. An answer that is no picture at all (`valid` False) is wrong in everything.

Legend: B images, S image side, C = 3 channels.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from ddt_jax.data.scenes import Obj, Scene, parse_caption
from ddt_jax.data.scenes_edits import apply, parse_instruction
from ddt_jax.data.scenes_verifier import ReadScene, read_scene
from ddt_jax.data.shapes import CELLS
from ddt_jax.errors import UserError
from ddt_jax.evaluation import tables
from ddt_jax.evaluation.metrics import binomial_interval

Truth = str | Scene | Collection[tuple[str, str, str, int]]
Keys = frozenset[tuple[str, str, str, int]]
Figures = dict[str, dict[str, float]]


def _shapes(keys: Iterable) -> Counter:
    return Counter(k[0] for k in keys)


def _pairs(keys: Iterable) -> Counter:
    return Counter((k[0], k[1]) for k in keys)


def _shape_by_cell(keys: Iterable) -> set:
    return {(k[3], k[0]) for k in keys}


def _can_be_misbound(keys: Keys) -> bool:
    """Whether two objects could swap colours and make another set of (shape, colour) pairs."""
    return any(a[0] != b[0] and a[1] != b[1] for a in keys for b in keys)


# Task → whether a caption asks for it, and whether what was read from its picture is right. `Counter <=` is "each one,
# as often as asked".
_TASKS: dict[str, tuple[Callable[[Keys], bool], Callable[[Keys, Keys], bool]]] = {
    "single_object": (lambda asked: len(asked) == 1, lambda asked, read: _shapes(asked) <= _shapes(read)),
    "two_objects": (
        lambda asked: len(asked) == 2 and len(_shapes(asked)) == 2,
        lambda asked, read: _shapes(asked) <= _shapes(read),
    ),
    "counting": (lambda asked: len(asked) > 1, lambda asked, read: len(asked) == len(read)),
    "colours": (lambda asked: len(asked) == 1, lambda asked, read: _pairs(asked) <= _pairs(read)),
    "position": (lambda asked: True, lambda asked, read: _shape_by_cell(asked) <= _shape_by_cell(read)),
    "attribute_binding": (_can_be_misbound, lambda asked, read: _pairs(asked) <= _pairs(read)),
}


def pictures(images_BSSC, captions: Sequence[Truth], valid_B=None) -> Figures:
    """Text to image: what the pictures show of what their captions ask for.

    Tasks are those of GenEval (arXiv 2310.11513). A caption of scenes says everything about each object, so it serves
    all the tasks that it has the objects for, and a task reads only its own part of the picture. As in GenEval further
    objects do no harm but in counting; `t2i_all_correct` is what forgives nothing.

    | figure                  | captions                              | right when the picture holds                |
    |-------------------------|---------------------------------------|---------------------------------------------|
    | `t2i_all_correct`       | all                                   | exactly the objects asked for, and is clean |
    | `t2i_count`             | all                                   | as many objects as asked for                |
    | `t2i_single_object`     | one object                            | that shape, of any colour                   |
    | `t2i_two_objects`       | two objects of different shapes       | both shapes, of any colour                  |
    | `t2i_counting`          | two or three objects                  | as many objects                             |
    | `t2i_colours`           | one object                            | that shape in that colour                   |
    | `t2i_position`          | all                                   | in each asked cell that shape               |
    | `t2i_attribute_binding` | some two objects differ in both shape | each (shape, colour) pair, as often as      |
    |                         | and colour                            | asked for                                   |

    "Clean" is the verifier's small residual; it and size matter to `t2i_all_correct` alone, place to it and to
    `t2i_position`. Chance is far from 0 in the easy ones: who always draws two objects has 45 % of `t2i_count` right.

    Args:
      images_BSSC: uint8, S a multiple of 32.
      captions: B of them.
      valid_B: bool, which of the images were drawn; None: all.

    Raises:
      UserError: a caption that `parse_caption` can't read: nobody can say whether its picture is right.
      ValueError: the lengths differ or the images are not such.
    """
    asked, read = _keys(captions), _read(images_BSSC, captions, valid_B)
    pairs = list(zip(asked, read, strict=True))
    right = {
        "t2i_all_correct": [_is_exact(a, r) for a, r in pairs],
        "t2i_count": [r is not None and len(a) == r.count for a, r in pairs],
    }
    for task, (asks, is_right) in _TASKS.items():
        right[f"t2i_{task}"] = [r is not None and is_right(a, r.keys) for a, r in pairs if asks(a)]
    return shares(right)


def right_pictures(images_BSSC, captions: Sequence[Truth], valid_B=None) -> list[bool]:
    """Which pictures `t2i_all_correct` of `pictures` counts."""
    return [_is_exact(a, r) for a, r in zip(_keys(captions), _read(images_BSSC, captions, valid_B), strict=True)]


def right_captions(said: Sequence[str], truth: Sequence[Truth]) -> list[bool]:
    """Which captions `caption_all_correct` of `captions` counts."""
    return [parse_caption(text) == keys for text, keys in zip(said, _keys(truth), strict=True)]


def captions(said: Sequence[str], truth: Sequence[Truth]) -> Figures:
    """Image to text: what captions say of the scenes they were given.

    A caption is right when it says exactly the scene, all attributes of all objects; their order and the phrasing are
    free. `parse_caption` reads only captions that are complete and say their own count right, so one that leaves out a
    size is not readable, one that leaves out an object is readable and wrong. What can't be read is wrong.

    Returns:
      `caption_all_correct`; `caption_count`, as many objects as there are; `caption_parsed`, could be read.

    Raises:
      UserError: a truth that is a caption and can't be read.
      ValueError: the lengths differ.
    """
    if len(said) != len(truth):
        raise ValueError(f"compositional: {len(said)} captions said but {len(truth)} scenes")
    pairs = list(zip(map(parse_caption, said), _keys(truth), strict=True))
    return shares(
        {
            "caption_all_correct": [s == t for s, t in pairs],
            "caption_count": [s is not None and len(s) == len(t) for s, t in pairs],
            "caption_parsed": [s is not None for s, t in pairs],
        }
    )


def editing(images_BSSC, before: Sequence[Truth], wanted: Sequence[Truth], valid_B=None) -> Figures:
    """Whether edited pictures changed where they should, and only there.

    A scene is four cells, each with an object or empty. Cells that differ between the two scenes are to change, the
    others to stay. A model that copies its input has all kept and none changed. The background is not looked at.

    Args:
      images_BSSC: the edited pictures, uint8.
      before: what the pictures showed.
      wanted: what they should show now.
      valid_B: as `pictures`.
    Returns:
      `edit_all_correct`: exactly the wanted scene, and clean. `edit_changed`: all cells that should change hold what is
      wanted, of the edits that change something. `edit_kept`: all others hold what they held.

    Raises:
      UserError: a caption that can't be read.
      ValueError: the lengths differ or the images are not such.
    """
    if len(before) != len(wanted):
        raise ValueError(f"compositional: {len(before)} scenes before the edit but {len(wanted)} wanted")
    right: dict[str, list[bool]] = {"edit_all_correct": [], "edit_changed": [], "edit_kept": []}
    for old, new, r in zip(_keys(before), _keys(wanted), _read(images_BSSC, wanted, valid_B), strict=True):
        right["edit_all_correct"].append(_is_exact(new, r))
        was, want, now = _cells(old), _cells(new), None if r is None else _cells(r.keys)
        changing = {cell for cell in range(len(CELLS)) if was.get(cell) != want.get(cell)}
        staying = set(range(len(CELLS))) - changing
        for name, cells in (("edit_changed", changing), ("edit_kept", staying)):
            if cells:
                right[name].append(now is not None and all(now.get(cell) == want.get(cell) for cell in cells))
    return shares(right)


def edited(captions: Sequence[str], instructions: Sequence[str]) -> list[Keys]:
    """What pictures should show once these instructions for pictures with these captions are followed.

    Raises:
      UserError: a caption or an instruction that can't be read, or an instruction that can't be followed.
    """
    found = []
    for i, (keys, said) in enumerate(zip(_keys(captions), instructions, strict=True)):
        objects = [Obj(*key) for key in keys]
        edit = parse_instruction(said, objects)
        if edit is None:
            raise UserError(
                f"evaluation: instruction {i + 1} of {len(instructions)}, {said!r} of {captions[i]!r}, is not one of "
                "scenes, and only those can be judged; take scenes_edits:heldout, or set evaluate.verifier=False"
            )
        found.append(frozenset(o.key for o in apply(objects, edit)))
    return found


def valid(task: str, valid_B: Sequence[bool]) -> Figures:
    """TASK_valid: the share of answers ("t2i", "edit") that are images."""
    return shares({f"{task}_valid": [bool(v) for v in valid_B]})


def flat(figures: Figures) -> dict[str, float]:
    """As one level for JSON and loggers: NAME is the value, beside it NAME_n, NAME_low and NAME_high."""
    return {
        (name if part == "value" else f"{name}_{part}"): number
        for name, figure in figures.items()
        for part, number in figure.items()
    }


_SECTIONS = {
    "t2i": "Pictures of captions",
    "caption": "Captions of pictures",
    "edit": "Edited pictures",
}


def table(results: dict[str, Any]) -> str:
    """Markdown of what `flat` results hold, one table for each of the three; other results are passed over."""
    parts = []
    for prefix, title in _SECTIONS.items():
        names = [name for name in results if name.startswith(f"{prefix}_") and f"{name}_low" in results]
        if names:
            lines = [f"{title}, share that is right (95 %).", "", "| | right | of |", "|---|---:|---:|"]
            for name in names:
                label = name.removeprefix(f"{prefix}_").replace("_", " ")
                right = tables.share(results[name], (results[f"{name}_low"], results[f"{name}_high"]))
                lines.append(f"| {label} | {right} | {results[f'{name}_n']:,} |")
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def shares(right: dict[str, list[bool]]) -> Figures:
    """The share of what is right in each list that has anything in it, with its interval."""
    found = {}
    for name, values in right.items():
        if values:
            low, high = binomial_interval(sum(values), len(values))
            found[name] = {"value": sum(values) / len(values), "n": len(values), "low": low, "high": high}
    return found


def _keys(truth: Sequence[Truth]) -> list[Keys]:
    found = []
    for i, scene in enumerate(truth):
        if isinstance(scene, str):
            keys = parse_caption(scene)
            if keys is None:
                raise UserError(
                    f"evaluation: caption {i + 1} of {len(truth)}, {scene!r}, is not one of scenes, and only those can "
                    "be judged; take captions of scenes:heldout, or set evaluate.verifier=False"
                )
        else:
            keys = scene.keys if isinstance(scene, Scene) else frozenset(tuple(k[:4]) for k in scene)
        found.append(keys)
    return found


def _read(images_BSSC, scenes: Sequence[Truth], valid_B) -> list[ReadScene | None]:
    """What each picture shows; None where there is no picture."""
    read = read_scene(images_BSSC)
    if len(read) != len(scenes):
        raise ValueError(f"compositional: {len(read)} images but {len(scenes)} scenes")
    return read if valid_B is None else [r if v else None for r, v in zip(read, valid_B, strict=True)]


def _is_exact(asked: Keys, read: ReadScene | None) -> bool:
    return read is not None and read.keys == asked and read.clean


def _cells(keys: Keys) -> dict[int, tuple[str, str, str]]:
    return {k[3]: tuple(k[:3]) for k in keys}
