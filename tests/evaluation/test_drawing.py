"""The evaluation of a model that draws: its figures against the model's own, and what is drawn of which class."""

import contextlib
import functools
import json

import jax
import numpy as np
import pytest

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.data import moving_scenes
from ddt_jax.data.scenes import ScenesSource
from ddt_jax.evaluation import drawing, tables
from ddt_jax.tokenizers.acdit import ACDiT
from ddt_jax.tokenizers.base import example_keys
from tests.tokenizers.acdit_small import SIZE, random_state, small

CLASSES = 3
SETTINGS = settings.Evaluate(pictures=3, batch_size=8, seed=5)


@functools.cache
def made(classes=CLASSES):
    diffusion = settings.DDPM(schedule="linear", solver="dpmpp_2m", solver_steps=2, clip=1.0, min_snr=5.0)
    model = ACDiT(small(classes=classes, diffusion=diffusion), SIZE, 8)
    return model, random_state(model)[0]


def batches(valid, rows=8):
    """Batches of `rows` images, of which so many are valid; labels -1, 0, 1, 2, -1, ..."""
    rng, start = np.random.default_rng(0), 0
    for n in valid:
        index = np.where(np.arange(rows) < n, start + np.arange(rows), -1).astype(np.int32)
        images = rng.integers(0, 256, (rows, SIZE, SIZE, 3)).astype(np.uint8)
        label = np.where(index >= 0, index % 4 - 1, -1).astype(np.int32)
        yield {"image": images, "valid": index >= 0, "index": index, "label": label}
        start += n


def evaluate(mesh, made_=None, **options):
    model, params = made_ or made()
    with jax.set_mesh(mesh):
        return drawing.evaluate_drawing(model, params, {}, batches([8, 3]), SETTINGS, mesh=mesh, **options)


@pytest.fixture(scope="module")
def report():
    return evaluate(meshes.make_mesh(settings.Mesh(), jax.devices()[:1]), count=5, class_names=("a", "b", "c"))


def test_figures_are_means_over_valid_images(report):
    model, params = made()
    parts = [{name: x[b["valid"]] for name, x in b.items()} for b in batches([8, 3])]
    given = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    key = jax.random.split(jax.random.key(SETTINGS.seed))[0]
    given["slot"] = given["index"]
    del given["valid"]
    errors = jax.jit(model.errors)(params, {}, given, example_keys(key, given["slot"]))
    error, t = map(np.asarray, errors)
    assert error.shape == (11, 4) and report.results["n"] == 11
    found = report.results
    weight = np.asarray(model.process.weight(t))
    assert weight.std() > 0.01
    np.testing.assert_allclose(found["diffusion"], (error * weight).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["mse_by_block"], error.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["mse_t50"], error[(t > 0.25) & (t <= 0.5)].mean(), rtol=1e-5)
    json.dumps(found, allow_nan=False)
    text = tables.evaluation(found)
    assert "Noise predicted on 11 images" in text and f"| 3 | {found['mse_by_block'][3]:.4f} |" in text


def test_pictures_have_the_classes_of_held_out_images(report):
    assert report.results["drawn"] == 5 and report.drawn.shape == (3, SIZE, SIZE, 3) and report.drawn.dtype == np.uint8
    assert report.captions == ("no class", "a", "b")
    assert report.pictured and report.picture().ndim == 3
    model, params = made()
    label = np.array([-1, 0, 1], np.int32)
    keys = example_keys(jax.random.split(jax.random.key(SETTINGS.seed))[1], np.arange(3))
    expected = jax.jit(model.sample)(params, {}, model.labels({"label": label}), keys)
    expected = np.round(np.clip((np.asarray(expected) + 1) * 127.5, 0, 255)).astype(int)
    assert np.abs(report.drawn.astype(int) - expected).max() <= 1  # the last bits of a sum, rounded


def test_features_of_clean_images_are_those_of_valid_rows_and_know_no_label():
    model, params = made()
    mesh = meshes.make_mesh(settings.Mesh(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        features, label = drawing.clean_features(model, params, {}, batches([8, 3]), 0, mesh=mesh)
        other = ({**batch, "label": batch["label"] * 0} for batch in batches([8, 3]))
        again, _ = drawing.clean_features(model, params, {}, other, 0, mesh=mesh)
    assert features.shape == (11, 16) and features.std(0).min() > 0
    np.testing.assert_array_equal(label, [i % 4 - 1 for i in range(11)])
    np.testing.assert_array_equal(features, again)


@pytest.mark.slow
def test_a_mesh_changes_no_figure(report):
    spread = evaluate(meshes.make_mesh(settings.Mesh()), count=5, class_names=("a", "b", "c"))
    for name, value in report.results.items():
        np.testing.assert_allclose(spread.results[name], value, rtol=1e-4, err_msg=name)
    assert np.abs(spread.drawn.astype(int) - report.drawn.astype(int)).max() <= 1


def test_objects_are_counted_by_the_reader_of_scenes():
    source = ScenesSource("heldout", 32)
    records = [source[i] for i in range(12)]
    images, label = np.stack([r["image"] for r in records]), np.array([r["label"] for r in records])
    found = drawing.count_objects(images, label)
    assert found["scenes_count"] == found["scenes_clean"] == 1.0 and found["scenes_count_interval"][0] > 0.7
    assert found["scenes_count_chance"] == np.bincount(label).max() / 12
    assert drawing.count_objects(images, None).keys() == {"scenes_clean", "scenes_clean_interval"}
    wrong = drawing.count_objects(images, np.where(np.arange(12) < 3, label + 1, label))
    assert wrong["scenes_count"] == 0.75 and wrong["scenes_clean"] == 1.0
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    assert drawing.count_objects(noise, label)["scenes_clean"] == 0.0


def test_objects_are_followed_by_the_reader_of_moving_scenes():
    scenes = [moving_scenes.sample_scene("heldout", i) for i in range(6)]
    clips = np.stack([moving_scenes.render(s, range(4)) for s in scenes])
    label = np.array([moving_scenes.label_of(s.objects) for s in scenes])
    found = drawing.follow_objects(clips, label)
    assert found["scenes_direction"] == found["scenes_clean"] == 1.0 and found["scenes_direction_interval"][0] > 0.5
    assert found["scenes_direction_chance"] == np.bincount(label).max() / 6
    assert drawing.follow_objects(clips, None).keys() == {"scenes_clean", "scenes_clean_interval"}
    assert drawing.follow_objects(clips[:, ::-1], label)["scenes_direction"] == 0.0
    texts = [moving_scenes.phrase(s.objects, 1) for s in scenes]
    told = drawing.follow_captions(clips, [*texts[:5], "a cat"])
    assert told["scenes_all_correct"] == told["scenes_direction"] == 5 / 6 and len(told) == 10
    shown = drawing.Report({}, clips, ("a", "b", "c", "d", "e", "f"))
    assert shown.picture().ndim == 3 and shown.moving().shape[0] == 4
    assert drawing.Report({}, clips[:, 0], None).moving() is None


def test_drawing_tells_how_far_it_is():
    told = []

    @contextlib.contextmanager
    def phase():
        yield told.append

    mesh = meshes.make_mesh(settings.Mesh(), jax.devices()[:1])
    assert evaluate(mesh, count=20, drawing=phase()).results["drawn"] == 20
    assert told == ["8 of 20", "16 of 20", "20 of 20"]
