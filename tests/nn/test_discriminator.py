"""The discriminator of patches: what one judgement sees, and what it does not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.nn import params as declared
from ddt_jax.nn.discriminator import Discriminator


def make(image_size=32, **config):
    net = Discriminator(settings.Discriminator(**{"width": 8, "layers": 2, "norm_groups": 4, **config}))
    images = jax.random.normal(jax.random.key(1), (3, image_size, image_size, 3))
    params, _ = declared.split(net.init(jax.random.key(0), images)["params"])
    return net, params, images


@pytest.mark.parametrize(("size", "layers"), [(16, 3), (32, 2), (16, 4)])
def test_one_judgement_per_place_from_16_pixels_up(size, layers):
    net, params, images = make(size, layers=layers)
    places = size // 2**layers
    assert net.apply({"params": params}, images).shape == (3, places, places)


def test_an_image_is_judged_without_the_others():
    net, params, images = make()
    together = net.apply({"params": params}, images)
    alone = jnp.concatenate([net.apply({"params": params}, image[None]) for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)  # sums over another number of rows


def test_a_judgement_sees_a_patch_only():
    # 4 x 4 kernels: 1 place of the last two layers reads 7 of 8 x 8, those 7 read 16 and then 34 pixels.
    net, params, images = make(128, norm_groups=0)
    slope = jax.grad(lambda x: net.apply({"params": params}, x)[0, 16, 16])(images)[0]
    rows = np.flatnonzero(np.abs(slope).sum((1, 2)))
    assert rows.max() - rows.min() + 1 == 34
    assert rows.min() < 64 < rows.max()  # place 16 of 32 lies in the middle


def test_judgements_of_a_bfloat16_network_are_float32():
    net, params, images = make()
    half = Discriminator(net.config, jnp.bfloat16)
    judged = half.apply({"params": params}, images)
    assert judged.dtype == jnp.float32
    np.testing.assert_allclose(judged, net.apply({"params": params}, images), atol=0.1)
