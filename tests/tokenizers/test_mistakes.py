"""Mistakes that are easily made with these models and cost quality, not an error: each moves a number far.

The mask that leaves out token k(t), the tokens in reversed order and the wrong sign in sampling are in
`test_ddt_sampling.py`; all of them again, against PyTorch, in `test_selftok_parity.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import settings
from ddt_jax.nn import mmdit
from ddt_jax.nn.quantize import VectorQuantizer
from ddt_jax.tokenizers import base, ddt
from tests.tokenizers.test_ddt import PUBLISHED, SIZE, B, Stub, build, make_batch
from tests.tokenizers.test_selftok_networks import TINY, inputs
from tests.tokenizers.test_selftok_networks import build as build_published


def test_a_target_of_the_other_sign():
    """The target is noise - x0: with it a network that knows x0 has no loss, with x0 - noise four times that of 0."""
    tokenizer, extra, batch = base.make_tokenizer(PUBLISHED, SIZE, B), build(PUBLISHED)[2], make_batch()
    x0 = ddt.patchify(base.to_float(jnp.asarray(batch["image"])), 4)

    def loss(factor):
        tokenizer._network = Stub(tokenizer, lambda x, t: factor * (x - x0) / t[:, None, None])
        return float(tokenizer.loss_fn({}, extra, batch, jax.random.key(1))[0]["flow"]) / B

    assert loss(1.0) < 1e-6
    assert loss(0.0) > 0.5
    np.testing.assert_allclose(loss(-1.0), 4 * loss(0.0), rtol=1e-5)


def test_features_and_codes_that_are_not_normalised():
    b, k, d, v = 8, 4, 4, 64
    rng = np.random.default_rng(0)
    z = rng.normal(size=(b, k, d)).astype(np.float32) * rng.uniform(0.1, 10, (b, k, 1)).astype(np.float32)
    codes = rng.normal(size=(v, d)).astype(np.float32)
    unit = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    q = VectorQuantizer(settings.Quantizer(code_dim=d, codebook_size=v, normalize_input="none"), k, b)
    extra = jax.jit(q.init)(jax.random.key(0))
    quantize = jax.jit(lambda codes: q.quantize(extra | {"codes": codes}, z, jnp.arange(b), jax.random.key(1)))

    features = z / np.linalg.norm(z, axis=-1, keepdims=True)
    nearest = np.argmin(np.linalg.norm(features[:, :, None] - unit, axis=-1), axis=-1)
    distance = np.min(np.sum(np.square(features[:, :, None] - unit), axis=-1), axis=-1)
    _, chosen, commitment, stats = quantize(unit)
    np.testing.assert_array_equal(chosen, nearest)
    np.testing.assert_allclose(commitment, distance, atol=1e-5)

    assert np.mean(np.asarray(quantize(codes)[1]) != nearest) > 0.3  # the longest codes win
    raw = np.min(np.sum(np.square(z[:, :, None] - unit), axis=-1), axis=-1)
    assert raw.mean() > 5 * distance.mean()
    after = jax.jit(q.update)(extra | {"codes": unit, "initialized": jnp.bool_(True)}, stats)
    np.testing.assert_allclose(np.linalg.norm(after["codes"], axis=1), 1, atol=1e-6)


def test_tokens_at_places_from_zero(monkeypatch):
    network, values, _ = build_published(TINY)

    def outputs():
        run = jax.jit(lambda method, *args: network.apply({"params": values}, *args, method=method), static_argnums=0)
        return run("encode", inputs()[0]), run("predict", *inputs())

    right = outputs()
    monkeypatch.setattr(mmdit, "token_positions", np.arange)
    for a, b in zip(right, outputs(), strict=True):
        assert np.abs(a - b).max() > 0.05 * np.abs(a).max()
