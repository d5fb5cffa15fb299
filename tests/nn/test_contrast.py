"""The contrastive losses against NumPy, and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.nn import contrast
from ddt_jax.nn.params import split

B, D = 8, 5


def vectors(seed=0):
    x = np.random.default_rng(seed).normal(size=(2, B, D)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def scale_of(c):
    params, _ = split(contrast.Scale(c).init(jax.random.key(0))["params"])
    return contrast.Scale(c).apply({"params": params})


def test_smoothed_cross_entropy_of_both_directions():
    c = settings.Contrast(temperature=0.2, label_smoothing=0.1)
    image, text = vectors()
    scale, bias = scale_of(c)
    np.testing.assert_allclose((scale, bias), (5, 0), rtol=1e-6)
    found, nearest = contrast.loss(c, image, text, scale, bias)
    logits = image.astype(np.float64) @ text.T / 0.2
    label = 0.9 * np.eye(B) + 0.1 / B

    def cross_entropy(x):
        return -(label * (x - np.log(np.exp(x).sum(1, keepdims=True)))).sum(1)

    np.testing.assert_allclose(found, (cross_entropy(logits) + cross_entropy(logits.T)) / 2, rtol=1e-5)
    np.testing.assert_array_equal(nearest, logits.argmax(1) == np.arange(B))


def test_sigmoid_of_all_pairs():
    c = settings.Contrast(kind="sigmoid", temperature=0.1)
    image, text = vectors()
    found, _ = contrast.loss(c, image, text, *scale_of(c))
    logits = 10 * image.astype(np.float64) @ text.T - 10
    pairs = np.log1p(np.exp(-np.where(np.eye(B) > 0, logits, -logits)))
    np.testing.assert_allclose(found.mean(), pairs.sum() / B, rtol=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_published_gradient_leaves_out_what_is_compared_with(kind):
    image, text = vectors()

    def run(gradient):
        c = settings.Contrast(kind=kind, gradient=gradient)
        mean = lambda i, t: contrast.loss(c, i, t, 3.0, -1.0)[0].mean()  # noqa: E731
        return jax.value_and_grad(mean, argnums=(0, 1))(image, text)

    (both, grads), (published, halves) = run("both"), run("published")
    np.testing.assert_allclose(both, published, rtol=1e-6)
    c = settings.Contrast(kind=kind)
    for side, half in enumerate(halves):
        # By hand: the images' share is that of a loss whose captions, and second direction, are constants.
        def one_way(x, side=side):
            a, b = ((x, text), (image, x))[side]
            logits = 3 * (a @ b.T) - 1
            logits = logits if side == 0 else logits.T
            if kind == "sigmoid":
                return -jnp.sum(jax.nn.log_sigmoid((2 * jnp.eye(B) - 1) * logits)) / B / 2
            log = jax.nn.log_softmax(logits)
            label = (1 - c.label_smoothing) * jnp.eye(B) + c.label_smoothing / B
            return -jnp.sum(label * log) / B / 2

        np.testing.assert_allclose(half, jax.grad(one_way)((image, text)[side]), atol=1e-6)
        assert np.abs(half - grads[side]).max() > 1e-3


def test_a_mesh_compares_with_the_whole_batch():
    image, text = vectors()
    c = settings.Contrast()

    def run(batch):
        return contrast.loss(c, batch["image"], batch["text"], 10.0, 0.0)[0].mean()

    whole = jax.value_and_grad(run)({"image": image, "text": text})
    mesh = meshes.make_mesh(settings.Mesh())
    with jax.set_mesh(mesh):
        spread = jax.jit(jax.value_and_grad(run))(meshes.put_batch({"image": image, "text": text}, mesh))
    assert mesh.size == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, spread)
    part = run({"image": image[:4], "text": text[:4]})
    assert abs(part - whole[0]) > 0.1
