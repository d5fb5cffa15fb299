"""Losses between decoded images and originals: each term is what it says, and each side moves only what is its own."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import lpips
from ddt_jax.nn import params as declared
from ddt_jax.tokenizers.image_loss import ImageLoss

DISCRIMINATOR = settings.Discriminator(width=8, layers=2, norm_groups=4)
GAN = settings.ImageLoss(
    lpips_weight=0.0, lpips_weight_late=0.0, adversarial_weight=0.5, r1_weight=2.0, discriminator=DISCRIMINATOR
)
PIXEL = replace(GAN, adversarial_weight=0.0, adversarial_weight_late=0.0)
GENERATOR, ADVERSARY = ("pixel", "adversarial"), ("discriminator", "r1")


def images(size=16):
    return 0.5 * jax.random.normal(jax.random.key(1), (2, 3, size, size, 3))


def make(config=GAN, size=16):
    loss = ImageLoss(config, size)
    boxed, extra = jax.jit(loss.init)(jax.random.key(0))
    return loss, *declared.split(boxed), extra


@pytest.mark.smoke
@pytest.mark.parametrize("name", [*GENERATOR, *ADVERSARY])
def test_each_side_moves_only_what_is_its_own(name):
    loss, params, _, extra = make()
    fake, real = images()
    grad = jax.jit(jax.grad(lambda p, f: loss.terms(p, extra, f, real)[0][name], (0, 1)))
    by_params, by_fake = grad(params, fake)
    moved = {
        "discriminator": max(float(jnp.abs(g).max()) for g in jax.tree.leaves(by_params)),
        "decoded": float(jnp.abs(by_fake).max()),
    }
    assert (moved["discriminator"] == 0) == (name in GENERATOR), moved
    assert (moved["decoded"] == 0) == (name in ADVERSARY), moved


def test_terms_are_hinge_losses_by_hand():
    loss, params, _, extra = make()
    fake, real = images()
    sums, counts = loss.terms(params, extra, fake, real)
    judge = lambda x: np.asarray(loss._adversary.apply({"params": params["discriminator"]}, x))  # noqa: E731
    on_fake, on_real = judge(fake), judge(real)
    hinge = 0.5 * (np.maximum(0, 1 - on_real).mean((1, 2)) + np.maximum(0, 1 + on_fake).mean((1, 2)))
    np.testing.assert_allclose(sums["discriminator"], hinge.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["adversarial"], -on_fake.mean((1, 2)).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["pixel"], np.square(fake - real).mean((1, 2, 3)).sum(), rtol=1e-6)
    absolute, *_ = make(replace(PIXEL, pixel="l1"))
    np.testing.assert_allclose(
        absolute.terms({}, {}, fake, real)[0]["pixel"], np.abs(fake - real).mean((1, 2, 3)).sum(), rtol=1e-6
    )
    assert set(counts) == set(sums) and all(n == 3 for n in counts.values())


def test_r1_is_the_squared_slope_at_originals():
    loss, params, _, extra = make()
    fake, real = images()
    found = loss.terms(params, extra, fake, real)[0]["r1"]
    judge = lambda x: loss._adversary.apply({"params": params["discriminator"]}, x[None]).mean()  # noqa: E731
    slope = jax.jit(jax.grad(judge))
    np.testing.assert_allclose(found, sum(float(jnp.square(slope(x)).sum()) for x in real), rtol=1e-4)
    step = 1e-2 * slope(real[0])  # a step along the slope rises by its squared length
    rise = judge(real[0] + step) - judge(real[0] - step)
    np.testing.assert_allclose(rise / 2e-2, jnp.square(slope(real[0])).sum(), rtol=1e-2)


def test_the_published_schedule_switches_at_its_step():
    loss = ImageLoss(replace(settings.ImageLoss(), lpips_backbone_file="a", lpips_heads_file="b"), 32)
    at = lambda step: {n: w(jnp.int32(step)) if callable(w) else w for n, w in loss.loss_weights.items()}  # noqa: E731
    before, after = at(29_999), at(30_000)
    np.testing.assert_allclose([before["lpips"], before["adversarial"], before["discriminator"]], [0.1, 0, 0])
    np.testing.assert_allclose([after["lpips"], after["adversarial"], after["discriminator"]], [0.5, 0.5, 1])
    assert before["pixel"] == after["pixel"] == 1 and "r1" not in before


def test_terms_without_weight_cost_nothing():
    loss, params, _, extra = make(PIXEL)
    assert (params, extra, loss.loss_weights) == ({}, {}, {"pixel": 1.0})
    assert set(loss.terms({}, {}, *images())[0]) == {"pixel"}


def test_a_wanted_lpips_without_files_is_said_loudly():
    loss, _, _, extra = make(replace(PIXEL, lpips_weight_late=0.5))
    assert extra == {} and "lpips" not in loss.loss_weights
    assert len(loss.notes) == 1 and loss.notes[0].startswith("WITHOUT LPIPS: ")
    assert make(PIXEL)[0].notes == ()


@pytest.mark.parametrize(
    ("config", "size", "message"),
    [
        (replace(PIXEL, lpips_heads_file="a"), 32, "go together"),
        (
            replace(PIXEL, lpips_weight=1.0, lpips_backbone_file="a", lpips_heads_file="b", lpips_backbone="alexnet"),
            16,
            "needs images of 31 pixels",
        ),
        (GAN, 18, "discriminator.layers=2 do not halve data.image_size=18"),
        (replace(GAN, discriminator=replace(DISCRIMINATOR, norm_groups=5)), 16, "norm_groups=5 does not divide"),
    ],
)
def test_settings_at_odds_are_refused(config, size, message):
    with pytest.raises(UserError, match=message) as error:
        ImageLoss(config, size)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_lpips_is_the_distance_of_frozen_weights():
    config = replace(PIXEL, lpips_weight=1.0, lpips_backbone="alexnet", lpips_backbone_file="a", lpips_heads_file="b")
    loss, _, _, blank = make(config, 32)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(blank)), "weights that were never read would go unnoticed"
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda x: jnp.asarray(0.05 * np.abs(rng.normal(size=x.shape)), x.dtype), blank)
    fake, real = images(32)
    sums, _ = loss.terms({}, weights, fake, real)
    expected = lpips.distance(weights["lpips"], fake, real, backbone="alexnet")
    assert expected.min() > 0
    np.testing.assert_allclose(sums["lpips"], expected.sum(), rtol=1e-5)
    grad = jax.jit(jax.grad(lambda e, f: loss.terms({}, e, f, real)[0]["lpips"], (0, 1)))
    by_weights, by_fake = grad(weights, fake)
    assert all((g == 0).all() for g in jax.tree.leaves(by_weights)) and jnp.abs(by_fake).max() > 0


@pytest.mark.parametrize("backbone", ["vgg16", "alexnet"])
def test_abstract_weights_are_those_of_a_file(backbone):
    shapes = lpips.abstract(backbone)
    # As PyTorch lays them out, under torchvision's and LPIPS's names.
    index = {"vgg16": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28], "alexnet": [0, 3, 6, 8, 10]}[backbone]
    features = {}
    for i, conv in zip(index, shapes["features"], strict=True):
        h, w, n, out = conv["kernel"].shape
        features[f"features.{i}.weight"] = np.zeros((out, n, h, w), np.float32)
        features[f"features.{i}.bias"] = np.zeros((out,), np.float32)
    heads = {f"lin{i}.model.1.weight": np.zeros((1, *s.shape, 1, 1), np.float32) for i, s in enumerate(shapes["heads"])}
    read = lpips.from_torch(backbone, features, heads)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), read) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
