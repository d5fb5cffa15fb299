"""Random erasing and mixup against their definitions in NumPy, and against the distributions they name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax.nn import augment

B, SIDE = 64, 16


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def test_a_rectangle_is_one_and_has_the_area_and_aspect_it_was_drawn_with():
    n, height, width = 4000, 40, 60
    found = np.asarray(jax.jit(jax.vmap(lambda key: augment.rectangle(key, height, width)))(keys(n)))
    rows, columns = found.any(2), found.any(1)
    np.testing.assert_array_equal(found, rows[:, :, None] & columns[:, None, :])
    for part in (rows, columns):  # in one piece
        assert (np.abs(np.diff(np.pad(part.astype(int), ((0, 0), (1, 1))), axis=1)).sum(1) == 2).all()
    h, w = rows.sum(1), columns.sum(1)
    area, log_aspect = h * w / (height * width), np.log(h / w)
    assert area.min() > 0.01 and area.max() < 0.36  # rounding moves small ones
    whole = (h < height) & (w < width)  # of the others a part is cut off
    assert whole.mean() > 0.8
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.01 and abs(log_aspect[whole].mean()) < 0.1
    assert np.abs(log_aspect).max() < -np.log(0.3) + 0.25
    for part, length in ((rows, h), (columns, w)):  # it lies anywhere it fits
        start, room = part.argmax(1), part.shape[1] - length
        assert (start <= room).all() and abs((start / np.maximum(room, 1))[room > 3].mean() - 0.5) < 0.03


@pytest.mark.parametrize("frames", [(), (3,)], ids=["images", "clips"])
def test_as_many_images_as_asked_for_lose_a_rectangle_and_nothing_else(frames):
    x = np.zeros((800, *frames, SIDE, SIDE, 2), np.float32) + 7
    found = np.asarray(jax.jit(lambda x, keys: augment.erased(x, keys, 0.25))(x, keys(800)))
    changed = found != 7
    hit = changed.reshape(800, -1).any(1)
    assert abs(hit.mean() - 0.25) < 0.06  # 4 standard errors
    where = changed.reshape(800, -1, SIDE, SIDE, 2)
    assert (where == where[:, :1, :, :, :1]).all()  # in the same place in all frames and channels
    noise = found[changed]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert augment.erased(x, None, 0.0) is x


def test_a_row_depends_on_its_own_key_alone():
    x = np.random.default_rng(0).normal(size=(B, SIDE, SIDE, 2)).astype(np.float32)
    whole = augment.erased(x, keys(B), 0.5)
    np.testing.assert_array_equal(augment.erased(x[9:12], keys(B)[9:12], 0.5), whole[9:12])


def test_mixup_mixes_a_row_and_its_target_with_the_one_before_in_the_same_parts():
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(B, 4, 4, 2)).astype(np.float32), rng.integers(0, 5, B)
    label[[3, 20]] = -1
    target = np.where(label[:, None] >= 0, np.eye(5)[label], 0).astype(np.float32)
    mixed, mixed_target = map(np.asarray, augment.mixed(x, target, keys(B), 0.8))
    own = np.asarray(jax.vmap(lambda key: jax.random.beta(key, 0.8, 0.8))(keys(B)))
    for i in range(B):
        part = 1.0 if -1 in (label[i], label[i - 1]) else own[i]
        np.testing.assert_allclose(mixed[i], part * x[i] + (1 - part) * x[i - 1], atol=1e-6)
        np.testing.assert_allclose(mixed_target[i], part * target[i] + (1 - part) * target[i - 1], atol=1e-6)
    assert (mixed_target.sum(1) > 0).sum() == B - 2
    assert augment.mixed(x, target, None, 0.0)[0] is x


@pytest.mark.parametrize("alpha", [0.2, 0.8])
def test_the_parts_are_of_a_beta_distribution(alpha):
    n = 4000
    x = jnp.arange(n, dtype=jnp.float32)[:, None, None, None] % 2  # every row meets the other kind
    target = jax.nn.one_hot(jnp.arange(n) % 2, 2)
    _, found = jax.jit(lambda x, t, k: augment.mixed(x, t, k, alpha))(x, target, keys(n))
    own = np.asarray(found)[np.arange(n), np.arange(n) % 2]
    assert abs(own.mean() - 0.5) < 0.03
    assert abs(own.var() - 1 / (4 * (2 * alpha + 1))) < 0.012  # of Beta(a, a)
