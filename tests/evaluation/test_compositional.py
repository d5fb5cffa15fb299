"""What is drawn on purpose is judged as such: right scenes, a missing object, swapped colours, swapped places.

Every change is made to the objects of a scene, which are then drawn; no figure is compared with the verifier's own.
"""

import json

import numpy as np
import pytest

from ddt_jax.data import scenes
from ddt_jax.data.scenes import NUM_PHRASINGS, Obj, Scene, phrase, render, sample_scene
from ddt_jax.errors import UserError
from ddt_jax.evaluation import compositional

N = 400
T2I = ("all_correct", "count", "single_object", "two_objects", "counting", "colours", "position", "attribute_binding")
HELDOUT = [sample_scene("heldout", i) for i in range(N)]
CAPTIONS = [phrase(s.objects, i % NUM_PHRASINGS) for i, s in enumerate(HELDOUT)]


def drawn(batch, size=32):
    return np.stack([render(s, size) for s in batch])


def values(figures):
    return {name: figure["value"] for name, figure in figures.items()}


def scene(*objects, background=0):
    return Scene(tuple(Obj(*o) for o in objects), background)


def one(picture_of, caption_of):
    """Figures of one picture as whole numbers, without their prefix."""
    found = compositional.pictures(drawn([picture_of]), [phrase(caption_of.objects, 0)])
    return {name.removeprefix("t2i_"): figure["value"] for name, figure in found.items()}


DISC, BAR = ("disc", "red", "small", 0), ("bar", "blue", "large", 3)


@pytest.mark.parametrize("size", [32, 64])
def test_scenes_drawn_as_asked_are_right_in_everything(size):
    found = compositional.pictures(drawn(HELDOUT, size), CAPTIONS)
    # The verifier reads at least 999 of 1,000 clean scenes exactly.
    assert list(found) == [f"t2i_{name}" for name in T2I] and min(values(found).values()) >= 0.99
    assert found["t2i_all_correct"]["n"] == found["t2i_position"]["n"] == N
    one_object = sum(len(s.objects) == 1 for s in HELDOUT)
    assert found["t2i_single_object"]["n"] == found["t2i_colours"]["n"] == one_object
    assert found["t2i_counting"]["n"] == N - one_object
    for figure in found.values():
        assert figure["low"] <= figure["value"] <= figure["high"]


def test_scenes_of_other_captions_are_at_chance():
    found = values(compositional.pictures(drawn(HELDOUT), CAPTIONS[1:] + CAPTIONS[:1]))
    # Not 0: a tenth of the 192 combinations of a single object are held out, and 30 % of the scenes are these few.
    assert found["t2i_all_correct"] < 0.02
    # Two draws of the number of objects agree with 0.3^2 + 0.45^2 + 0.25^2.
    assert found["t2i_count"] == pytest.approx(0.355, abs=0.08)
    assert max(found[f"t2i_{name}"] for name in ("colours", "position", "attribute_binding")) < 0.2


def test_truth_is_the_same_as_caption_as_scene_and_as_keys():
    images = drawn(HELDOUT[:50])
    found = compositional.pictures(images, CAPTIONS[:50])
    assert found == compositional.pictures(images, HELDOUT[:50])
    assert found == compositional.pictures(images, [s.keys for s in HELDOUT[:50]])


def test_a_missing_object_is_a_wrong_count():
    asked = scene(DISC, BAR)
    wrong = one(scene(DISC), asked)
    assert set(wrong) == set(T2I) - {"single_object", "colours"} and not any(wrong.values())
    # What is there too much costs only where numbers are asked for.
    more = one(scene(DISC, ("pillar", "cyan", "large", 1), BAR), asked)
    assert [name for name, value in more.items() if not value] == ["all_correct", "count", "counting"]


def test_swapped_colours_are_wrong_in_binding_and_right_in_counting():
    swapped = scene(("disc", "blue", "small", 0), ("bar", "red", "large", 3))
    found = one(swapped, scene(DISC, BAR))
    assert [name for name, value in found.items() if not value] == ["all_correct", "attribute_binding"]
    assert {"count", "counting", "two_objects", "position"} <= set(found)


def test_swapped_places_are_wrong_in_position_alone():
    found = one(scene(("bar", "blue", "large", 0), ("disc", "red", "small", 3)), scene(DISC, BAR))
    assert [name for name, value in found.items() if not value] == ["all_correct", "position"]


def test_colour_and_shape_of_a_single_object_are_told_apart():
    blue = one(scene(("disc", "blue", "small", 0)), scene(DISC))
    assert blue == {"all_correct": 0, "count": 1, "single_object": 1, "colours": 0, "position": 1}
    bar = one(scene(("bar", "red", "small", 0)), scene(DISC))
    assert bar == {"all_correct": 0, "count": 1, "single_object": 0, "colours": 0, "position": 0}
    large = one(scene(("disc", "red", "large", 2)), scene(DISC))
    assert large == {"all_correct": 0, "count": 1, "single_object": 1, "colours": 1, "position": 0}


def test_half_an_object_is_read_but_is_not_all_correct():
    asked = scene(("frame", "red", "large", 0), BAR)
    picture = drawn([asked])
    picture[0, 9:16, :16] = drawn([scene(BAR)])[0, 9:16, :16]  # the lower half of the frame is background
    found = compositional.pictures(picture, [asked])
    assert [name for name, figure in found.items() if not figure["value"]] == ["t2i_all_correct"]
    edited = compositional.editing(picture, [scene(BAR)], [asked])
    assert values(edited) == {"edit_all_correct": 0.0, "edit_changed": 1.0, "edit_kept": 1.0}


def test_tasks_without_a_caption_are_left_out():
    # Two of a shape can't be told from one another by shape, nor two of a colour by colour.
    same_shape = one(scene(DISC, ("disc", "blue", "large", 1)), scene(DISC, ("disc", "blue", "large", 1)))
    assert set(same_shape) == {"all_correct", "count", "counting", "position"}
    same_colour = scene(DISC, ("bar", "red", "large", 1))
    assert set(one(same_colour, same_colour)) == set(same_shape) | {"two_objects"}
    assert compositional.pictures(np.zeros((0, 32, 32, 3), np.uint8), []) == {}


def test_a_caption_of_something_else_is_refused():
    with pytest.raises(UserError, match="caption 2 of 2, 'a photo of a bench', is not one of scenes"):
        compositional.pictures(drawn(HELDOUT[:2]), [CAPTIONS[0], "a photo of a bench"])
    with pytest.raises(ValueError, match="2 images but 1 scenes"):
        compositional.pictures(drawn(HELDOUT[:2]), CAPTIONS[:1])


# ---- image to text


def test_all_phrasings_and_orders_of_a_scene_are_right():
    for s in HELDOUT[:30]:
        said = [phrase(s.objects[::step], p) for p in range(NUM_PHRASINGS) for step in (1, -1)]
        for truth in (s, phrase(s.objects, 0)):
            found = compositional.captions(said + [said[0].upper() + "."], [truth] * (len(said) + 1))
            assert values(found) == {"caption_all_correct": 1.0, "caption_count": 1.0, "caption_parsed": 1.0}


def test_each_mistake_of_a_caption_counts_where_it_belongs():
    truth = scene(DISC, BAR)
    large = "a large red disc at the top left and a large blue bar at the bottom right"
    fewer = "a small red disc at the top left"
    no_size = "a red disc at the top left and a large blue bar at the bottom right"
    wrong_count = "three objects: " + phrase(truth.objects, 5).partition(": ")[2]
    said = [phrase(truth.objects, 0), large, fewer, no_size, wrong_count, ""]
    results = [values(compositional.captions([s], [truth])) for s in said]
    columns = [[int(r[f"caption_{name}"]) for r in results] for name in ("all_correct", "count", "parsed")]
    assert columns == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert compositional.captions(said, [truth] * 6)["caption_parsed"] == {
        "value": 0.5,
        "n": 6,
        "low": pytest.approx(0.1876, abs=1e-4),  # scipy.stats.binomtest(3, 6).proportion_ci(method="wilson")
        "high": pytest.approx(0.8124, abs=1e-4),
    }


def test_captions_of_other_scenes_are_wrong_but_readable():
    found = values(compositional.captions(CAPTIONS[1:] + CAPTIONS[:1], HELDOUT))
    assert found["caption_all_correct"] < 0.02 and found["caption_parsed"] == 1.0
    assert found["caption_count"] == pytest.approx(0.355, abs=0.08)
    with pytest.raises(ValueError, match="1 captions said but 400 scenes"):
        compositional.captions(CAPTIONS[:1], HELDOUT)


# ---- editing

EDITS = {
    "recolour": scene(("disc", "cyan", "small", 0), BAR),
    "remove": scene(BAR),
    "add": scene(DISC, ("pillar", "green", "large", 1), BAR),
    "move": scene(("disc", "red", "small", 2), BAR),
}


@pytest.mark.parametrize("wanted", EDITS.values(), ids=EDITS)
def test_an_edit_changes_what_it_should_and_only_that(wanted):
    before = scene(DISC, BAR)

    def judged(after):
        captions = [[phrase(s.objects, 3)] for s in (before, wanted)]
        return tuple(values(compositional.editing(drawn([after]), *captions)).values())

    assert judged(wanted) == (1.0, 1.0, 1.0)
    assert judged(before) == (0.0, 0.0, 1.0)  # a copy
    also = Scene(tuple(o._replace(size="small") if o.shape == "bar" else o for o in wanted.objects), 0)
    assert judged(also) == (0.0, 1.0, 0.0)


def test_what_is_no_picture_is_wrong_in_everything_whatever_it_looks_like():
    before, asked = scene(DISC, BAR), scene(BAR)
    both = drawn([asked, asked])
    found = compositional.editing(both, [before, before], [asked, asked], np.array([True, False]))
    assert values(found) == {"edit_all_correct": 0.5, "edit_changed": 0.5, "edit_kept": 0.5}
    found = compositional.pictures(both[:1], [phrase(asked.objects, 0)], np.array([False]))
    assert len(found) == 5 and not any(values(found).values())
    assert compositional.valid("edit", np.array([True, False, True, False])) == {
        "edit_valid": {
            "value": 0.5,
            "n": 4,
            "low": pytest.approx(0.15, abs=1e-2),
            "high": pytest.approx(0.85, abs=1e-2),
        }
    }


def test_instructions_say_what_should_be_seen():
    told = [phrase(scene(DISC, BAR).objects, 0)] * 2
    wanted = compositional.edited(told, ["make the red disc large", "remove the bar"])
    assert wanted == [{("disc", "red", "large", 0), BAR}, {DISC}]
    with pytest.raises(UserError, match="instruction 2 of 2, 'remove the pillar' of 'a small red disc.*scenes_edits"):
        compositional.edited(told, ["remove the bar", "remove the pillar"])
    with pytest.raises(UserError, match="caption 1 of 1"):
        compositional.edited([""], ["remove the bar"])


def test_an_edit_of_every_cell_has_nothing_to_keep_and_one_of_none_nothing_to_change():
    full, moved = scene(DISC, BAR), scene(("bar", "cyan", "small", 1), ("frame", "green", "large", 2))
    assert set(compositional.editing(drawn([moved]), [full], [moved])) == {"edit_all_correct", "edit_changed"}
    assert set(compositional.editing(drawn([full]), [full], [full])) == {"edit_all_correct", "edit_kept"}
    with pytest.raises(ValueError, match="2 scenes before"):
        compositional.editing(drawn([full]), [full, full], [full])


# ---- results


def test_results_are_flat_json_and_a_table():
    figures = compositional.pictures(drawn(HELDOUT[:40]), CAPTIONS[:40])
    figures |= compositional.captions(CAPTIONS[:40], HELDOUT[:40])
    results = json.loads(json.dumps(compositional.flat(figures)))
    assert results["t2i_all_correct"] == 1.0 and results["t2i_all_correct_n"] == 40
    assert results["t2i_all_correct_low"] == pytest.approx(0.9124, abs=1e-4) and results["t2i_all_correct_high"] == 1.0
    assert len(results) == 4 * len(figures) and not any(isinstance(v, dict | list) for v in results.values())
    table = compositional.table({"step": 5, "scenes_count": 0.5, **results})
    assert "| all correct | 100.0% (91.2% to 100.0%) | 40 |" in table.splitlines()
    assert table.count("| attribute binding |") == 1 and table.count("| parsed |") == 1
    assert "Edited" not in table and "scenes" not in table and "step" not in table
    assert compositional.table({"step": 5}) == ""


def test_held_out_scenes_are_what_is_asked_here():
    assert all(scenes.is_heldout(s.keys) for s in HELDOUT)
