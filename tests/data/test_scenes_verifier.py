"""The judge of scenes: right on clean, blurred and noisy pictures, never about a scene that differs in one thing."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_jax.data import scenes, scenes_verifier, shapes
from ddt_jax.data.scenes import Obj, Scene
from ddt_jax.data.scenes_verifier import judge, read_scene, score
from ddt_jax.data.shapes import COLOURS, JITTERS, SHAPES, SIZES

FIELDS = {"all_correct", "count", "presence", "colour", "position", "shape", "size"}

OBJECTS = st.builds(
    Obj,
    st.sampled_from(SHAPES),
    st.sampled_from(COLOURS),
    st.sampled_from(SIZES),
    st.integers(0, 3),
    st.sampled_from(JITTERS),
    st.sampled_from(JITTERS),
)
BACKGROUND = st.integers(0, shapes.NUM_BACKGROUNDS - 1)


def some_scenes(min_size=1):
    objects = st.lists(OBJECTS, min_size=min_size, max_size=3, unique_by=lambda o: o.cell)
    return st.builds(lambda o, b: Scene(tuple(sorted(o, key=lambda x: x.cell)), b), objects, BACKGROUND)


def to_bytes(picture):
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def blurred(images, sigma):
    """Gaussian blur, edges repeated."""
    reach = int(np.ceil(4 * sigma))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    side = images.shape[1]
    wide = np.pad(images.astype(np.float32), ((0, 0), (reach, reach), (reach, reach), (0, 0)), "edge")
    tall = sum(t * wide[:, i : i + side] for i, t in enumerate(taps))
    return sum(t * tall[:, :, i : i + side] for i, t in enumerate(taps))


def noisy(images, sigma, seed=0):
    noise = np.random.default_rng(seed).standard_normal(images.shape, dtype=np.float32)
    return to_bytes(images + 255 * sigma * noise)


def one(image, scene):
    """The score of a single picture as plain booleans."""
    return {name: bool(right[0]) for name, right in score(image[None], [scene]).items()}


@pytest.fixture(scope="module", params=[32, 64])
def drawn(request):
    """5,000 scenes of both splits and their pictures at 32 and at 64 px."""
    batch = [scenes.sample_scene(split, i) for split in scenes.SPLITS for i in range(2500)]
    return batch, np.stack([scenes.render(s, request.param) for s in batch])


# ---- what it must read


def test_clean_renders_are_read_exactly(drawn):
    batch, images = drawn
    result = score(images, batch)
    assert set(result) == FIELDS
    assert all(right.shape == (5000,) and right.dtype == bool for right in result.values())
    assert {name: right.mean() >= 0.999 for name, right in result.items()} == dict.fromkeys(FIELDS, True)


def test_objects_with_their_jitter_are_read_back(drawn):
    batch, images = (part[::10] for part in drawn)
    read = read_scene(images)
    assert np.mean([r.objects == s.objects for r, s in zip(read, batch, strict=True)]) >= 0.995
    assert all(r.keys == s.keys and r.count == len(s.objects) and r.clean for r, s in zip(read, batch, strict=True))


@pytest.mark.parametrize(("sigma", "floor"), [(0.05, 0.99), (0.08, 0.95)])
def test_noise_does_not_disturb_it(drawn, sigma, floor):
    batch, images = (part[::8] for part in drawn)
    assert score(noisy(images, sigma), batch)["all_correct"].mean() >= floor


@pytest.mark.parametrize(("sigma", "floor"), [(0.6, 0.99), (1.0, 0.95)])
def test_blur_does_not_disturb_it(drawn, sigma, floor):
    batch, images = (part[::8] for part in drawn)
    soft = to_bytes(blurred(images, sigma * images.shape[1] / 32))
    assert score(soft, batch)["all_correct"].mean() >= floor


def test_coarse_8_bit_values_do_not_disturb_it(drawn):
    batch, images = (part[::10] for part in drawn)
    for rounded in (images // 16 * 16 + 8, np.clip(images.astype(int) + 1, 0, 255).astype(np.uint8)):
        assert score(rounded, batch)["all_correct"].mean() >= 0.99


def test_a_background_of_another_tint_and_slope_is_found(drawn):
    """The background is not captioned, so a picture may have one that is a little off."""
    batch, images = (part[::10] for part in drawn)
    ramp = np.linspace(-12, 12, images.shape[1])[:, None, None] + np.array([8, -8, 8])
    for slope in (ramp, ramp.transpose(1, 0, 2)):
        for_ground = np.stack([(scenes.render(s, images.shape[1]) == ground(s, images)).all(-1) for s in batch])
        shifted = to_bytes(images + slope * for_ground[..., None])
        assert score(shifted, batch)["all_correct"].mean() >= 0.98
        # Found, not merely tolerated: the median would be 0.07 if the known background were kept.
        assert np.median([r.block_error for r in read_scene(shifted)]) < 0.015


def ground(scene, images):
    return scenes.render(Scene((), scene.background), images.shape[1])


@pytest.mark.parametrize("kind", list(itertools.product(SHAPES, COLOURS)))
def test_three_large_objects_of_one_kind_are_not_taken_for_the_background(kind):
    batch = [
        Scene(tuple(Obj(*kind, "large", c) for c in range(4) if c != empty), background)
        for empty in range(4)
        for background in range(shapes.NUM_BACKGROUNDS)
    ]
    read = read_scene(np.stack([scenes.render(s) for s in batch]))
    assert [r.keys for r in read] == [s.keys for s in batch]
    assert max(r.block_error for r in read) < 0.02


# ---- what it must refuse


def test_noise_images_are_never_right_and_attributes_are_at_chance(drawn):
    batch, images = (part[::10] for part in drawn)
    uniform = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    for pictures in (uniform, noisy(np.full_like(images, 127), 0.3)):
        result = score(pictures, batch)
        assert not result["all_correct"].any()
        assert result["colour"].mean() < 0.1 and result["presence"].mean() < 0.1


def test_shuffled_captions_are_right_only_where_they_say_the_same(drawn):
    batch, images = (part[::4] for part in drawn)
    order = np.random.default_rng(1).permutation(len(batch))
    asked = [batch[i] for i in order]
    right = score(images, asked)["all_correct"]
    assert right.tolist() == [a.keys == b.keys for a, b in zip(asked, batch, strict=True)]
    assert right.mean() < 0.005


def changes(o):
    """Every object that differs from `o` in exactly one captioned attribute (the cell aside)."""
    for name, options in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        for value in options:
            if value != getattr(o, name):
                yield name, o._replace(**{name: value})


@settings(deadline=None, max_examples=40)
@given(some_scenes(), st.data())
def test_one_attribute_of_one_object_changed_is_wrong_in_that_attribute_alone(scene, data):
    at = data.draw(st.integers(0, len(scene.objects) - 1))
    for name, other in changes(scene.objects[at]):
        drawn_scene = Scene((*scene.objects[:at], other, *scene.objects[at + 1 :]), scene.background)
        result = one(scenes.render(drawn_scene), scene)
        assert not result["all_correct"]
        attributes = {k: result[k] for k in ("shape", "colour", "size")}
        assert attributes == {"shape": True, "colour": True, "size": True} | {name: False}
        assert result["position"] and result["count"]


@settings(deadline=None, max_examples=40)
@given(some_scenes(), OBJECTS)
def test_an_object_removed_or_added_is_wrong(scene, other):
    picture = scenes.render(scene)
    for at in range(len(scene.objects)):
        fewer = Scene(scene.objects[:at] + scene.objects[at + 1 :], scene.background)
        missing = one(scenes.render(fewer), scene)
        assert not any(missing[k] for k in ("all_correct", "count", "position", "presence", "shape", "colour", "size"))
        if fewer.objects:
            extra = one(picture, fewer)
            assert not any(extra[k] for k in ("all_correct", "count", "position"))
            assert all(extra[k] for k in ("presence", "shape", "colour", "size"))
    taken = {o.cell for o in scene.objects}
    for cell in set(range(4)) - taken:
        crowded = Scene((*scene.objects, other._replace(cell=cell)), scene.background)
        assert not one(scenes.render(crowded), scene)["all_correct"]


@settings(deadline=None, max_examples=40)
@given(some_scenes(min_size=2))
def test_two_objects_that_swap_colours_or_places_are_wrong(scene):
    a, b, *rest = scene.objects
    if a.colour != b.colour:
        swapped = Scene((a._replace(colour=b.colour), b._replace(colour=a.colour), *rest), scene.background)
        result = one(scenes.render(swapped), scene)
        assert (result["all_correct"], result["colour"], result["shape"], result["position"]) == (
            False,
            False,
            True,
            True,
        )
    if a.key[:3] != b.key[:3]:
        swapped = Scene((a._replace(cell=b.cell), b._replace(cell=a.cell), *rest), scene.background)
        result = one(scenes.render(swapped), scene)
        assert (result["all_correct"], result["presence"], result["position"]) == (False, True, True)


def test_an_object_in_the_wrong_cell_is_present_but_not_in_position():
    scene = Scene((Obj("disc", "red", "large", 0),), 0)
    moved = Scene((Obj("disc", "red", "large", 3),), 0)
    result = one(scenes.render(moved), scene)
    assert (result["presence"], result["count"], result["position"], result["all_correct"]) == (
        True,
        True,
        False,
        False,
    )


def test_presence_counts_objects_of_a_kind():
    two = Scene((Obj("disc", "red", "large", 0), Obj("disc", "red", "small", 1)), 0)
    single = Scene((Obj("disc", "red", "large", 0),), 0)
    assert not one(scenes.render(single), two)["presence"]
    assert one(scenes.render(two), single)["presence"]


@pytest.mark.parametrize("half", ["top", "bottom", "left", "right"])
def test_half_an_object_is_not_fully_right(drawn, half):
    batch, images = (part[::20] for part in drawn)
    damaged = images.copy()
    unit = images.shape[1] // 32
    for picture, scene in zip(damaged, batch, strict=True):
        o = scene.objects[0]
        middle = {
            "y": (16 * (o.cell // 2) + 8 + o.dy) * unit,
            "x": (16 * (o.cell % 2) + 8 + o.dx) * unit,
        }
        rows = slice(16 * unit * (o.cell // 2), 16 * unit * (o.cell // 2 + 1))
        columns = slice(16 * unit * (o.cell % 2), 16 * unit * (o.cell % 2 + 1))
        if half in ("top", "bottom"):
            rows = slice(rows.start, middle["y"]) if half == "top" else slice(middle["y"], rows.stop)
        else:
            columns = slice(columns.start, middle["x"]) if half == "left" else slice(middle["x"], columns.stop)
        picture[rows, columns] = ground(scene, images)[rows, columns]
    # A small bar cut along its length still reads as a bar: 2 px of 4 are left where the contrast is weakest.
    assert score(damaged, batch)["all_correct"].mean() < 0.05


def test_a_foreign_patch_on_the_empty_ground_is_not_fully_right(drawn):
    batch, images = (part[::20] for part in drawn)
    damaged = images.copy()
    unit = images.shape[1] // 32
    for picture, scene in zip(damaged, batch, strict=True):
        cell = min(set(range(4)) - {o.cell for o in scene.objects})
        top, left = 16 * unit * (cell // 2), 16 * unit * (cell % 2)
        away = 255 if ground(scene, images).mean() < 128 else 0
        picture[top : top + 5 * unit, left : left + 5 * unit] = away
    assert score(damaged, batch)["all_correct"].mean() < 0.02


# ---- the parts


def test_the_expanded_fit_equals_brute_force():
    rng = np.random.default_rng(3)
    x_NPC, ground_NPC = rng.random((2, 3, 256, 3), dtype=np.float32)
    best_N, error_N, empty_N = scenes_verifier._fit_cells(x_NPC, ground_NPC)
    masks = shapes.alpha_masks(32).reshape(-1, 256, 1)
    for n in range(3):
        brute = np.array(
            [
                [
                    ((x_NPC[n] - ground_NPC[n] * (1 - a) - a * rgb / 255).astype(np.float64) ** 2).sum()
                    for rgb in shapes.COLOUR_RGB
                ]
                for a in masks
            ]
        )
        assert best_N[n] == brute.argmin()
        np.testing.assert_allclose(error_N[n], brute.min(), rtol=1e-4)  # float32 sums of 768 terms
        np.testing.assert_allclose(empty_N[n], ((x_NPC[n] - ground_NPC[n]) ** 2).sum(), rtol=1e-5)


def test_a_picture_is_read_alike_alone_and_in_any_batch():
    batch = [scenes.sample_scene("train", i) for i in range(300)]  # more than one chunk
    images = noisy(np.stack([scenes.render(s) for s in batch]), 0.05)
    together = read_scene(images)
    for i in (0, 255, 256, 299):
        alone = read_scene(images[i : i + 1])[0]
        assert alone.objects == together[i].objects
        # Matrix products sum in another order for another batch size.
        assert alone.cell_mse == pytest.approx(together[i].cell_mse, rel=1e-4)


def test_captions_are_judged_as_their_scenes():
    batch = [scenes.sample_scene("heldout", i) for i in range(60)]
    images = np.stack([scenes.render(s) for s in batch])
    captions = [scenes.caption_of(s, scenes.Stream(i)) for i, s in enumerate(batch)]
    assert judge(images, captions)["all_correct"].all()
    captions[7] = "a shiny red disc somewhere"
    result = judge(images, captions)
    assert not any(right[7] for right in result.values())
    assert result["all_correct"].sum() == 59


def test_scenes_may_be_given_as_sets_of_keys_or_none():
    scene = scenes.sample_scene("train", 5)
    images = np.stack([scenes.render(scene)] * 3)
    assert score(images, [scene, scene.keys, None])["all_correct"].tolist() == [True, True, False]


def test_an_empty_picture_reads_as_no_objects_and_an_empty_batch_as_nothing():
    read = read_scene(scenes.render(Scene((), 4))[None])[0]
    assert read.objects == () and read.clean
    assert read_scene(np.zeros((0, 32, 32, 3), np.uint8)) == []
    assert score(np.zeros((0, 32, 32, 3), np.uint8), [])["all_correct"].shape == (0,)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 32, 32, 3)),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((1, 48, 48, 3), np.uint8),
        np.zeros((1, 32, 64, 3), np.uint8),
    ],
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        read_scene(images)


def test_a_missing_scene_is_refused():
    with pytest.raises(ValueError, match="2 images but 1 scenes"):
        score(np.zeros((2, 32, 32, 3), np.uint8), [None])


def test_a_core_reads_five_hundred_images_a_second(drawn):
    batch, images = (part[:512] for part in drawn)
    rates = []
    for _ in range(3):
        start = time.process_time()  # counts all threads of this process, so it is the figure of one core
        score(images, batch)
        rates.append(len(batch) / (time.process_time() - start))
    assert np.median(rates) >= 500, rates
