"""Moving scenes: pure functions of the index, disjoint splits, captions and clips that are read back exactly."""

import hashlib
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_jax.data import moving_scenes, moving_scenes_verifier, shapes
from ddt_jax.data.base import open_source
from ddt_jax.data.moving_scenes import DIRECTIONS, MOTIONS, NUM_PHRASINGS, PERIOD, SPEEDS, MovingScene, axis_of
from ddt_jax.data.moving_scenes_verifier import judge, read_moving_scene, score
from ddt_jax.data.shapes import COLOURS, JITTERS, SHAPES, SIZES
from ddt_jax.errors import UserError

FIELDS = {"count", "identity", "direction", "speed", "all_correct"}


@st.composite
def some_scenes(draw):
    """Any scene that there can be."""
    axis, lanes = draw(st.integers(0, 1)), draw(st.sampled_from([(0,), (1,), (0, 1)]))
    directions = [d for d in DIRECTIONS if axis_of(d) == axis]
    parts = (SHAPES, COLOURS, SIZES, directions, SPEEDS)
    movers = []
    for lane in lanes:
        key = [draw(st.sampled_from(part)) for part in parts]
        movers.append(moving_scenes.Mover(*key, lane, draw(st.integers(0, PERIOD - 1)), draw(st.sampled_from(JITTERS))))
    return MovingScene(tuple(movers), draw(st.integers(0, shapes.NUM_BACKGROUNDS - 1)))


@given(some_scenes(), st.integers(2, 5), st.integers(0, PERIOD))
@settings(max_examples=20, deadline=None)
def test_frames_are_read_back_exactly(scene, frames, first):
    """Start included: the first frame that is shown is the reader's frame 0."""
    clip = moving_scenes.render(scene, range(first, first + frames))
    (read,) = read_moving_scene(clip[None])
    assert read.clean and read.keys == scene.keys
    for found, o in zip(read.objects, scene.objects, strict=True):
        assert found.at(0) == o.at(first) and found.offset == o.offset
    assert all(right[0] for right in score(clip[None], [scene]).values())


@given(some_scenes(), st.integers(0, NUM_PHRASINGS - 1), st.randoms())
def test_captions_say_everything_and_are_parsed_back(scene, phrasing, random):
    objects = list(scene.objects)
    random.shuffle(objects)
    text = moving_scenes.phrase(objects, phrasing)
    assert moving_scenes.parse_caption(f" {text.upper()}.") == scene.keys
    assert moving_scenes.parse_caption(f"{text} x") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a small red disc moves slowly to the left along the left side",  # a lane of the other axis
        "two objects: small red disc slowly up along the left side",
        "a large red bar moves slowly up along the left side and a small red disc moves slowly up along the left side",
        "one object: small red disc slowly up along the left side, small red disc slowly to the left along the top",
    ],
)
def test_a_text_that_says_no_scene_is_not_understood(text):
    assert moving_scenes.parse_caption(text) is None


def test_scenes_and_captions_never_change():
    found = {}
    for split in moving_scenes.SPLITS:
        source = open_source(f"moving_scenes:{split}", clips=True)
        text = repr([(source.scene(i), source[i]["caption"], source[i]["label"]) for i in range(100)])
        found[split] = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert found == {"train": "d9b1bc3354e310f0", "heldout": "b65df746624c4752"}


def test_splits_share_no_combination_and_a_tenth_is_held_out():
    for split in moving_scenes.SPLITS:
        keys = [moving_scenes.sample_scene(split, i).keys for i in range(400)]
        assert {moving_scenes.is_heldout(k) for k in keys} == {split == "heldout"}
    every = itertools.product(SHAPES, COLOURS, SIZES, DIRECTIONS, SPEEDS, (0, 1))
    share = np.mean([moving_scenes.is_heldout([k]) for k in every])
    assert abs(share - 0.1) < 5 * np.sqrt(0.09 / 768)


def test_labels_are_the_directions_by_lane():
    assert len(MOTIONS) == 12 and MOTIONS[:4] == tuple((d,) for d in DIRECTIONS)
    source = open_source("moving_scenes:train", clips=True)
    for i in range(40):
        record = source[i]
        directions = tuple(o.direction for o in record["meta"]["scene"].objects)
        assert MOTIONS[record["label"]] == directions
        assert source.label_names[record["label"]] == " and ".join(directions)
    assert len({source[i]["label"] for i in range(100)}) == 12


def test_clips_begin_anew_after_a_period_and_move_as_said():
    scene = moving_scenes.sample_scene("train", 3)
    frames = moving_scenes.render(scene, [0, 1, PERIOD, PERIOD + 1], 64)
    np.testing.assert_array_equal(frames[:2], frames[2:])
    mover = moving_scenes.Mover("disc", "red", "small", "up", "quickly", 1, start=1)
    assert [mover.at(t) for t in (0, 1, 2)] == [(1, 24), (31, 24), (29, 24)]
    source = pickle.loads(pickle.dumps(open_source("moving_scenes:train", image_size=64, clips=True)))
    clip = source[3]["video"]
    assert len(clip) == PERIOD
    np.testing.assert_array_equal(np.stack(clip.read([0, 1], None)), frames[:2])


def test_what_is_wrong_is_not_right():
    scenes = [moving_scenes.sample_scene("train", i) for i in range(8)]
    clips = np.stack([moving_scenes.render(s, range(4)) for s in scenes])
    assert set(score(clips, scenes)) == FIELDS
    backwards = {name: right.mean() for name, right in score(clips[:, ::-1], scenes).items()}
    assert backwards == {"count": 1, "identity": 1, "speed": 1, "direction": 0, "all_correct": 0}
    still = score(np.repeat(clips[:, :1], 8, axis=1), scenes)
    assert not still["all_correct"].any()
    red_and_blue = clips[..., ::-1]
    assert score(red_and_blue, scenes)["direction"].mean() > 0.8
    assert score(red_and_blue, scenes)["identity"].mean() < 0.5
    noise = np.random.default_rng(0).normal(size=clips.shape) * 20
    noisy = np.clip(clips + noise, 0, 255).astype(np.uint8)
    assert score(noisy, scenes)["all_correct"].all()
    spoiled = clips.copy()
    spoiled[:, 2, :16, :16] = 128  # one frame, a quarter of it
    assert not score(spoiled, scenes)["all_correct"].any()
    captions = [moving_scenes.phrase(s.objects, 0) for s in scenes]
    assert judge(clips, captions)["all_correct"].all()
    assert not any(right.any() for right in judge(clips[:1], ["a cat"]).values())


def test_what_is_no_clip_is_refused():
    with pytest.raises(ValueError, match="T at least 2"):
        read_moving_scene(np.zeros((1, 1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="1 clips but 2 scenes"):
        score(np.zeros((1, 2, 32, 32, 3), np.uint8), [None, None])
    with pytest.raises(UserError, match="cannot be drawn at 48 px"):
        open_source("moving_scenes:train", image_size=48, clips=True)
    with pytest.raises(UserError, match="moving_scenes:train holds clips; set data.frames"):
        open_source("moving_scenes:train")
    assert moving_scenes_verifier.read_moving_scene(np.zeros((0, 2, 32, 32, 3), np.uint8)) == []
