"""The published codebook against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax.nn import quantize_l2

B, K, D, V = 4, 3, 5, 7


def drawn():
    rng = np.random.default_rng(0)
    return rng.normal(size=(V, D)).astype(np.float32), rng.normal(size=(B, K, D)).astype(np.float32)


def test_the_nearest_code_and_of_equal_ones_the_first():
    codes, z = drawn()
    codes[5] = codes[2]
    z[0, 0] = codes[2]
    distance = ((z[:, :, None] - codes) ** 2).sum(-1)
    found = quantize_l2.encode(codes, z)
    np.testing.assert_array_equal(found, distance.argmin(-1))
    assert found[0, 0] == 2
    longest = 3 * codes  # by angle alone the length would not count
    np.testing.assert_array_equal(quantize_l2.encode(longest, z), ((z[:, :, None] - longest) ** 2).sum(-1).argmin(-1))


def test_gradients_pass_straight_through_and_the_loss_splits_as_published():
    codes, z = drawn()
    chosen = codes[np.asarray(quantize_l2.encode(codes, z))]
    quantized, _, loss = quantize_l2.quantize(codes, z)
    np.testing.assert_allclose(quantized, chosen, atol=1e-6)
    np.testing.assert_allclose(loss, 1.25 * (z - chosen) ** 2, rtol=1e-5)
    weight = np.random.default_rng(1).normal(size=z.shape).astype(np.float32)
    through = jax.grad(lambda c, z: jnp.sum(weight * quantize_l2.quantize(c, z)[0]), argnums=(0, 1))(codes, z)
    np.testing.assert_array_equal(through[0], 0)
    np.testing.assert_array_equal(through[1], weight)
    to_codes, to_z = jax.grad(lambda c, z: jnp.mean(quantize_l2.quantize(c, z)[2]), argnums=(0, 1))(codes, z)
    np.testing.assert_allclose(to_z, 2 * (z - chosen) / z.size, rtol=1e-5)
    expected = np.zeros_like(codes)
    np.add.at(expected, np.asarray(quantize_l2.encode(codes, z)), 0.25 * 2 * (chosen - z) / z.size)
    np.testing.assert_allclose(to_codes, expected, atol=1e-6)
