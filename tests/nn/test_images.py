import jax.numpy as jnp
import numpy as np

from ddt_jax.nn.images import patchify, to_float, to_uint8, unpatchify


def test_patches_are_windows_in_raster_order():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = np.asarray(patchify(jnp.asarray(x), 2))
    assert patches.shape == (2, 6, 12)
    np.testing.assert_array_equal(patches[1, 4].reshape(2, 2, 3), x[1, 2:4, 2:4])
    np.testing.assert_array_equal(unpatchify(jnp.asarray(patches), 2, 4), x)


def test_bytes_come_back_and_floats_pass():
    image = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(jnp.asarray(image))), image)
    assert (float(to_float(jnp.asarray(image))[0]), float(to_float(jnp.asarray(image))[-1])) == (-1, 1)
    np.testing.assert_array_equal(to_float(jnp.float32([0.3])), np.float32([0.3]))
