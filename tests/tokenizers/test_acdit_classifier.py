"""Classes from the clean stream: the loss by formula, what it begins with, and that nothing noised is in it."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.errors import UserError
from ddt_jax.evaluation import classifying, tables
from ddt_jax.nn import augment
from ddt_jax.tokenizers.acdit import ACDiT
from ddt_jax.tokenizers.acdit_classifier import ACDiTClassifier
from ddt_jax.tokenizers.base import example_keys, make_tokenizer
from ddt_jax.training.state import unbox
from tests.tokenizers.acdit_small import SIZE, random_state, small

B, CLASSES = 8, 3
CONFIG = settings.ACDiTClassifier(
    depth=1,
    width=16,
    heads=2,
    patch_size=2,
    block_size=4,
    classes=CLASSES,
    scan_layers=False,
    codec=settings.IdentityCodec(),
)


PLAIN = {"mixup": 0.0, "erase": 0.0}


@functools.cache
def made(**changes):
    model = make_tokenizer(replace(CONFIG, **changes), SIZE, B)
    assert isinstance(model, ACDiTClassifier)
    return model, *random_state(model)


def batch(rows=B, seed=1):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, SIZE, SIZE, 3)).astype(np.uint8)
    label = np.resize(np.array([0, 2, -1, 1, 1], np.int32), rows)
    return {"image": images, "slot": np.arange(rows, dtype=np.int32), "label": label}


@functools.cache
def compiled(model, name):
    return jax.jit(getattr(model, name))


def logits(params, images):
    return np.asarray(compiled(made()[0], "_logits")(params, images), np.float64)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_without_augmentation_the_loss_is_the_cross_entropy_of_rows_with_a_label():
    model, params, extra = made(**PLAIN)
    given = batch()
    sums, counts, _ = compiled(model, "loss_fn")(params, extra, given, jax.random.key(3))
    found, label = log_softmax(logits(params, given["image"] / np.float32(127.5) - 1)), given["label"]
    there = label >= 0
    own, all_ = found[np.arange(B), label], found.mean(1)
    expected = -(0.9 * own + 0.1 * all_)[there].sum()
    assert float(counts["cross_entropy"]) == float(counts["accuracy"]) == there.sum() == 6
    np.testing.assert_allclose(sums["cross_entropy"], expected, rtol=1e-5)
    assert float(sums["accuracy"]) == (found.argmax(1) == label)[there].sum()
    assert model.cross_example_terms == ()


@pytest.mark.slow
def test_what_is_learned_from_is_erased_and_mixed_by_the_keys_of_its_rows():
    model, params, extra = made(erase=0.5)
    given, key = batch(), jax.random.key(3)
    sums, counts, _ = compiled(model, "loss_fn")(params, extra, given, key)
    keys_B3 = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key, given["slot"]))
    images = given["image"] / np.float32(127.5) - 1
    holes = augment.erased(images, keys_B3[:, 1], 0.5)
    assert 0 < (np.asarray(holes) != images).reshape(B, -1).any(1).sum() < B
    smooth = np.where(given["label"][:, None] >= 0, 0.9 * np.eye(CLASSES)[given["label"]] + 0.1 / CLASSES, 0)
    mixed, target = augment.mixed(holes, smooth.astype(np.float32), keys_B3[:, 2], CONFIG.mixup)
    found = log_softmax(logits(params, mixed))
    np.testing.assert_allclose(sums["cross_entropy"], -(np.asarray(target) * found).sum(), rtol=1e-4)
    assert float(counts["cross_entropy"]) == 6


def test_a_fresh_head_says_all_classes_are_alike_and_all_parameters_are_learned():
    model, params, extra = made(**PLAIN)
    given = batch(), jax.random.key(3)
    fresh = unbox(compiled(model, "init")(jax.random.key(0))[0])
    sums, counts, _ = compiled(model, "loss_fn")(fresh, extra, *given)
    assert float(sums["cross_entropy"] / counts["cross_entropy"]) == pytest.approx(np.log(CLASSES), abs=1e-5)
    loss = lambda p: model.loss_fn(p, extra, *given)[0]["cross_entropy"]  # noqa: E731
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.abs(leaf).max() > 0, path


def test_it_begins_with_all_layers_of_an_acdit_and_gives_the_same_rows():
    """Also of one that is told classes and captions: what goes with them is left behind."""
    told = small(caption_bytes=6, caption_depth=1)
    there = ACDiT(told, SIZE, B)
    theirs, _ = random_state(there)
    model, ours, extra = made()
    names = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    shared = {name: shape for name, shape in names(ours).items() if not name.startswith("head/")}
    assert shared.items() <= names(theirs).items()
    left = names(theirs).keys() - shared.keys()
    assert {name.split("/")[0] for name in left if "adaln" not in name} == {"time", "label", "captions", "norm", "out"}
    tokens = np.random.default_rng(0).normal(size=(2, 16, 12)).astype(np.float32)

    def rows(network):
        run = lambda: network.apply({"params": theirs}, tokens, method="clean_rows")  # noqa: E731
        return jax.jit(run)()

    np.testing.assert_array_equal(rows(there.network), rows(model.network))


def test_held_out_images_are_judged_as_they_are():
    model, params, extra = made()
    mesh = meshes.make_mesh(settings.Mesh(), jax.devices()[:1])
    given, batches = batch(11, seed=4), []
    for start in (0, 8):
        index = np.where(start + np.arange(8) < 11, start + np.arange(8), -1).astype(np.int32)
        rows = {
            name: np.resize(given[name][start : start + 8], (8, *given[name].shape[1:])) for name in ("image", "label")
        }
        batches.append(rows | {"index": index, "valid": index >= 0})
    with jax.set_mesh(mesh):
        report = classifying.evaluate_classes(model, params, extra, batches, settings.Evaluate(), mesh=mesh)
    found = log_softmax(logits(params, given["image"] / np.float32(127.5) - 1))
    there = given["label"] >= 0
    right, n = (found.argmax(1) == given["label"])[there].sum(), there.sum()
    r = report.results
    assert r["n"] == n == 9 and r["accuracy"] == right / n and r["accuracy_interval"][0] < r["accuracy"] + 1e-9
    assert r["accuracy_chance"] == np.bincount(given["label"][there]).max() / n
    expected = -found[np.arange(11), given["label"]][there].mean()
    assert r["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert "Classes of 9 images" in tables.evaluation(r | {"left_out": []}) and not report.pictured
    for rows in batches:
        rows["label"] = np.full(8, -1, np.int32)
    with jax.set_mesh(mesh), pytest.raises(UserError, match="no image of data.eval_source has a label"):
        classifying.evaluate_classes(model, params, extra, batches, settings.Evaluate(), mesh=mesh)


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"classes": 1}, B, "model.classes=1, of which there must be 2"),
        ({"mixup": -0.1}, B, "model.mixup=-0.1 must not be negative"),
        ({"erase": 1.1}, B, "model.erase=1.1 lie in"),
        ({"label_smoothing": 1.0}, B, "model.label_smoothing=1.0 in"),
        ({}, 1, "model.mixup=0.8 mixes the images of a batch, train.batch_size is 1"),
        ({"block_size": 2}, B, "model.block_size=2 is no square"),
    ],
)
def test_settings_that_do_not_go_together_are_named(changes, rows, message):
    with pytest.raises(UserError, match=message):
        ACDiTClassifier(replace(CONFIG, **changes), SIZE, rows)


def test_steps_in_parts_are_refused_as_they_would_mix_other_images():
    s = settings.Experiment(
        model=CONFIG, data=settings.Data(image_size=SIZE), train=settings.Train(batch_size=16, accumulate=2)
    )
    with pytest.raises(UserError, match="train.accumulate=2 would change model.mixup"):
        experiment.build(s, jax.devices()[:1])


@pytest.mark.slow
def test_no_mesh_changes_what_is_erased_and_mixed():
    """Eight devices have a row each, so that every row is mixed with one of another device."""
    model, params, extra = made(erase=0.5)
    key, alone = jax.random.key(3), compiled(model, "loss_fn")
    mesh = meshes.make_mesh(settings.Mesh(data=2, fsdp=4), jax.devices())
    with jax.set_mesh(mesh):
        spread = jax.jit(model.loss_fn)(params, extra, meshes.put_batch(batch(), mesh), key)
    for a, b in zip(spread, alone(params, extra, batch(), key), strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), a, b)
