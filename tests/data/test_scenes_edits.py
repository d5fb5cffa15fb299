"""Edits of scenes: both ends in their split, words that can be read back, pictures that a program finds right."""

import hashlib
import pickle
from collections import Counter

import numpy as np
import pytest

from ddt_jax.data import scenes, scenes_edits
from ddt_jax.data.base import open_source
from ddt_jax.data.scenes import Obj, Scene
from ddt_jax.data.scenes_edits import KINDS, NUM_PHRASINGS, Edit, EditsSource, parse_instruction
from ddt_jax.errors import UserError
from ddt_jax.evaluation import compositional

DISC, BAR = Obj("disc", "red", "small", 0), Obj("bar", "blue", "large", 3)


@pytest.fixture(scope="module")
def pairs():
    return {split: [scenes_edits.sample_pair(split, i) for i in range(800)] for split in scenes.SPLITS}


@pytest.mark.parametrize(("split", "golden"), [("train", "69f0cab84456005c"), ("heldout", "7b81339145375167")])
def test_pairs_and_instructions_never_change(split, golden):
    """A change here makes figures on edits incomparable: change it knowingly."""
    source = EditsSource(split)
    text = repr([(source.pair(i), source[i]["caption"], source[i]["meta"]["instruction"]) for i in range(100)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == golden


def test_both_scenes_of_a_pair_belong_to_its_split(pairs):
    for split, some in pairs.items():
        for pair in some:
            for scene in (pair.source, pair.edited):
                assert scenes.is_heldout(scene.keys) == (split == "heldout") and 1 <= len(scene.objects) <= 3


def test_kinds_are_equally_common_and_all_numbers_of_objects_come(pairs):
    for some in pairs.values():
        counts = Counter(pair.edit.kind for pair in some)
        assert set(counts) == set(KINDS)
        assert all(abs(n - 800 / 6) < 5 * np.sqrt(800 * 5 / 36) for n in counts.values())
        assert {len(pair.source.objects) for pair in some} == {1, 2, 3}


def test_an_edit_changes_one_object_in_one_way_and_nothing_else(pairs):
    for pair in pairs["train"] + pairs["heldout"]:
        before, after = set(pair.source.objects), set(pair.edited.objects)
        gone, new = before - after, after - before
        assert pair.source.background == pair.edited.background
        assert (len(gone), len(new)) == {"remove": (1, 0), "add": (0, 1)}.get(pair.edit.kind, (1, 1))
        if gone and new:
            differing = [name for name, a, b in zip(Obj._fields, *gone, *new, strict=True) if a != b]
            attribute = {"recolour": "colour", "resize": "size", "reshape": "shape", "move": "cell"}
            assert differing == [attribute[pair.edit.kind]]


def test_every_way_to_say_an_edit_is_read_back(pairs):
    said = set()
    for pair in pairs["heldout"][:300]:
        objects, edit = pair.source.objects, pair.edit
        names = scenes_edits.references(objects, edit.cell) if edit.kind != "add" else [""]
        for phrasing in range(NUM_PHRASINGS[edit.kind]):
            for reference in range(len(names)):
                text = scenes_edits.instruction(objects, edit, phrasing, reference)
                read = parse_instruction(text.upper() + " .", objects)
                wanted = {o.key for o in scenes_edits.apply(objects, read)}
                assert wanted == pair.edited.keys, text
                said.add((edit.kind, phrasing))
    assert len(said) == sum(NUM_PHRASINGS.values())


@pytest.mark.parametrize(
    "text",
    [
        "make it blue",
        "make the disc red",  # it is
        "make the disc large and blue",
        "make the large disc blue",  # there is none
        "make the green object blue",
        "make the small object blue",  # nobody says so
        "move the disc to the bottom right",  # taken
        "add a small red disc at the top left",  # taken
        "remove the disc and the bar",
        "",
    ],
)
def test_what_cannot_be_done_or_understood_is_no_edit(text):
    assert parse_instruction(text, (DISC, BAR)) is None


def test_names_that_fit_two_objects_are_no_names():
    two = (DISC, Obj("disc", "red", "large", 1))
    assert scenes_edits.references(two, 0) == [
        "the small red disc",
        "the object at the top left",
        "the disc at the top left",
    ]
    assert parse_instruction("remove the red disc", two) is None
    assert parse_instruction("remove the small red disc", two) == Edit("remove", 0)
    assert parse_instruction("remove the red disc", two[:1]) is None  # nothing would be left
    three = (*two, BAR)
    assert parse_instruction("add a small red bar at the bottom left", three) is None  # one cell stays empty


@pytest.mark.parametrize("image_size", [32, 64])
def test_the_verifier_finds_the_second_image_right_and_a_copy_unchanged(image_size):
    records = [EditsSource("heldout", image_size)[i] for i in range(120)]
    pairs = [record["meta"]["pair"] for record in records]
    before, after = [p.source for p in pairs], [p.edited for p in pairs]

    def right(images):
        return {k: v["value"] for k, v in compositional.editing(np.stack(images), before, after).items()}

    assert right([r["meta"]["images"][0] for r in records]) == dict.fromkeys(
        ("edit_all_correct", "edit_changed", "edit_kept"), 1.0
    )
    assert right([r["image"] for r in records]) == {"edit_all_correct": 0.0, "edit_changed": 0.0, "edit_kept": 1.0}


def test_a_record_is_a_picture_with_a_caption_and_a_conversation_about_two():
    source = open_source("scenes_edits:heldout", image_size=32)
    assert source.name == "scenes_edits:heldout" and len(source) == 100_000 and source.describe(3).endswith("index 3")
    record = pickle.loads(pickle.dumps(source))[3]
    assert scenes.parse_caption(record["caption"]) == source.scene(3).keys
    assert record["meta"]["turns"] == [["USER", [0, record["meta"]["instruction"]]], ["ASSISTANT", [1]]]
    assert len(record["meta"]["images"]) == 1 and record["label"] == len(source.scene(3).objects)
    assert isinstance(source.scene(3), Scene)
    with pytest.raises(IndexError, match="scenes_edits:heldout has 100,000 scenes"):
        source[100_000]
    with pytest.raises(UserError, match="scenes_edits:test is not a split of scenes; use scenes_edits:train or"):
        EditsSource("test")
