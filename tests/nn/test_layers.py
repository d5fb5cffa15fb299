"""Layers against NumPy, and what their parameters declare."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax.nn import blocks, embeddings, layers, params


def build(module, *args):
    values, declarations = params.split(jax.jit(module.init)(jax.random.key(0), *args)["params"])
    return values, declarations


def test_dense_contracts_the_trailing_dimensions():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    module = layers.Dense((6, 7), (None, "embed", "heads", "head_dim"), inputs=2)
    values, declarations = build(module, x)
    bias = np.arange(42, dtype=np.float32).reshape(6, 7)
    got = module.apply({"params": values | {"bias": bias}}, x)
    np.testing.assert_allclose(got, np.einsum("abcd,cdef->abef", x, values["kernel"]) + bias, atol=1e-4)
    assert declarations["kernel"].axes == (None, "embed", "heads", "head_dim") and declarations["kernel"].decay
    assert declarations["bias"].axes == ("heads", "head_dim") and not declarations["bias"].decay


def test_dense_starts_with_unit_gain():
    x = np.random.default_rng(0).normal(size=(64, 8, 32)).astype(np.float32)
    module = layers.Dense((128,), (None, "embed", "mlp"), inputs=2)
    assert abs(float(jnp.std(module.apply({"params": build(module, x)[0]}, x))) - 1) < 0.1


def test_norms_equal_numpy_and_stay_in_the_type_of_the_input():
    x = np.random.default_rng(0).normal(2, 3, size=(4, 16)).astype(np.float32)
    layer, rms = layers.LayerNorm(), layers.RMSNorm()
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer.apply({"params": build(layer, x)[0]}, x), expected, atol=1e-5)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(rms.apply({"params": build(rms, x)[0]}, x), expected, atol=1e-5)
    half = jnp.asarray(x, jnp.bfloat16)
    assert layer.apply({"params": build(layer, x)[0]}, half).dtype == jnp.bfloat16


def test_bfloat16_layers_keep_float32_parameters():
    module = layers.MLP(8, dtype=layers.compute_dtype("bfloat16"))
    x = jnp.ones((1, 2, 4))
    values, _ = build(module, x)
    assert {v.dtype for v in jax.tree.leaves(values)} == {jnp.dtype("float32")}
    assert module.apply({"params": values}, x).dtype == jnp.bfloat16
    assert layers.compute_dtype("float32") is None


def test_each_of_q_k_v_is_its_own_matrix_for_muon():
    module = blocks.HeadProjection("qkv", heads=2, qk_norm=False)
    _, declarations = build(module, jnp.ones((1, 3, 8)))
    kernel = declarations["heads"]["kernel"]
    reads, writes = kernel.matrix
    shape = (8, 2, 3, 4)  # width, heads, q k v, head dimension
    assert [shape[i] for i in reads] == [8] and [shape[i] for i in writes] == [2, 4]


def test_head_projection_gives_heads_their_own_slices():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    module = blocks.HeadProjection("qkv", heads=2, qk_norm=False)
    values, _ = build(module, x)
    got = module.apply({"params": values}, x)
    for i, part in enumerate(got):
        kernel = np.asarray(values["heads"]["kernel"])[:, :, i]
        np.testing.assert_allclose(part, np.einsum("bsd,dhe->bhse", x, kernel), atol=1e-5)


def test_qk_norm_touches_q_and_k_alone():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    module = blocks.HeadProjection("qkv", heads=2, qk_norm=True)
    values, _ = build(module, x)
    q, k, v = module.apply({"params": values}, 10 * x)
    for part, scale in ((q, 1), (k, 1)):
        np.testing.assert_allclose(np.square(part).mean(-1), scale, rtol=1e-3)
    assert np.abs(np.square(v).mean(-1) - 1).min() > 0.1


def test_sinusoids_start_with_cosines():
    got = np.asarray(embeddings.sinusoidal(jnp.array([0.0, 3.0]), 6))
    frequency = 10_000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(got[1], np.r_[np.cos(3 * frequency), np.sin(3 * frequency)], atol=1e-6)
    assert embeddings.sinusoidal(jnp.array([1]), 5).shape == (1, 5)


def test_time_embedding_tells_noise_levels_apart():
    module = embeddings.TimeEmbedding(16)
    t = jnp.linspace(0, 1, 5)
    out = module.apply({"params": build(module, t)[0]}, t)
    distance = np.linalg.norm(out[:, None] - out[None], axis=-1)
    assert distance[~np.eye(5, dtype=bool)].min() > 0.1


def test_every_layer_declares_all_its_parameters():
    class All(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = layers.MLP(8)(layers.LayerNorm()(x))
            return x + embeddings.learned(self, "table", x.shape[-2], x.shape[-1])

    _, declarations = build(All(), jnp.ones((1, 2, 4)))
    assert all(isinstance(d, params.Declaration) for d in jax.tree.leaves(declarations))
