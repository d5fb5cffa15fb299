"""Forward pass, loss and gradients equal those of a network written in PyTorch from the paper, in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.tokenizers.acdit import ACDiT
from tests.tokenizers.acdit_reference import Reference

pytestmark = pytest.mark.slow

DEPTH, WIDTH, HEADS, SIDE, CLASSES, B = 2, 32, 2, 4, 5, 2


def ours(tensors):
    """Arrays of the reference, by its names, in the place and layout of our parameters: weights, or their gradients."""
    a = {name: np.asarray(value.detach() if hasattr(value, "detach") else value) for name, value in tensors.items()}
    e = WIDTH // HEADS

    def dense(name):
        return {"kernel": a[f"{name}.w"].T, "bias": a[f"{name}.b"]}

    def modulation(name, parts):
        kernel = a[f"{name}.w"].T.reshape(WIDTH, parts, WIDTH)
        return {"modulate": {"kernel": kernel, "bias": a[f"{name}.b"].reshape(parts, WIDTH)}}

    def block(i):
        kernel = np.stack([a[f"{i}.{n}.w"].T.reshape(WIDTH, HEADS, e) for n in "qkv"], axis=2)
        bias = np.stack([a[f"{i}.{n}.b"].reshape(HEADS, e) for n in "qkv"], axis=1)
        norms = np.stack([a[f"{i}.q_norm"], a[f"{i}.k_norm"]])[:, None, None, None]
        proj = dense(f"{i}.proj")
        return {
            "attention_norm": {"scale": a[f"{i}.norm1"]},
            "mlp_norm": {"scale": a[f"{i}.norm2"]},
            "project": {"heads": {"kernel": kernel, "bias": bias}, "qk_norm": {"scale": norms}},
            "output": {"merge": proj | {"kernel": proj["kernel"].reshape(HEADS, e, WIDTH)}},
            "mlp": {"up": dense(f"{i}.fc1"), "down": dense(f"{i}.fc2")},
            "adaln": modulation(f"{i}.ada", 6),
        }

    return {
        "into": {"kernel": a["x"].T},
        "time": {"up": dense("t0"), "down": dense("t2")},
        "label": a["y"],
        "stack": {f"block_{i}": block(i) for i in range(DEPTH)},
        "norm": {"scale": a["norm"]},
        "adaln": modulation("ada", 2),
        "out": dense("out"),
    }


@pytest.mark.parametrize(("size", "rope"), [(4, "nd"), (4, "released"), (1, "nd"), (16, "nd")])
def test_forward_loss_and_gradients_are_those_of_the_reference(oracle, size, rope):
    torch = oracle("torch")
    values = 3
    theirs = Reference(
        torch, depth=DEPTH, width=WIDTH, heads=HEADS, values=values, classes=CLASSES, side=SIDE, size=size, kind=rope
    )
    rng = np.random.default_rng(1)
    n = SIDE * SIDE // size
    clean, noise = rng.normal(size=(2, B, SIDE * SIDE, values))
    step, label = rng.integers(0, 1000, (B, n)), np.array([2, CLASSES])
    given = [torch.from_numpy(x) for x in (clean, noise, step.astype(np.float64), label)]
    predicted = theirs(given[0], given[1], given[2], given[3]).detach().numpy()
    loss = theirs.loss(*given)
    loss.backward()

    with jax.enable_x64(True):
        config = settings.ACDiT(
            depth=DEPTH, width=WIDTH, heads=HEADS, block_size=size, classes=CLASSES, rope=rope, scan_layers=False,
            codec=settings.IdentityCodec(), patch_size=1,
        )  # fmt: skip
        model = ACDiT(config, SIDE, B)
        params = jax.tree.map(jnp.asarray, ours(theirs.w))
        t = (step + 1) / 1000  # step n of the reference is our n + 1

        found = jax.jit(model.network.apply)({"params": params}, clean, noise, t, label)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, predicted, atol=1e-9 * np.abs(predicted).max(), rtol=0)

        # The loss by the model's own code, from what it draws.
        model.draw = lambda *a, **k: (jnp.asarray(clean), jnp.asarray(noise), jnp.asarray(t), jnp.asarray(label), None)
        batch = {"slot": np.arange(B, dtype=np.int32)}

        def value(params):
            sums, counts, _ = model.loss_fn(params, {}, batch, jax.random.key(0))
            return sums["diffusion"] / counts["diffusion"]

        total, gradients = jax.jit(jax.value_and_grad(value))(params)
        np.testing.assert_allclose(total, loss.item(), rtol=1e-9)
        expected = ours({name: value.grad for name, value in theirs.w.items()})
        assert jax.tree.structure(expected) == jax.tree.structure(gradients)
        most = max(np.abs(x).max() for x in jax.tree.leaves(expected))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9 * most, rtol=1e-7, err_msg=jax.tree_util.keystr(path))
            assert np.abs(b).max() > 0, path


def test_the_reference_itself_tells_the_variants_apart(oracle):
    """Else the test above would not see which of them ours is."""
    torch = oracle("torch")
    sizes = {"depth": 1, "width": WIDTH, "heads": HEADS, "values": 3, "classes": CLASSES, "side": SIDE, "size": 4}
    clean, noise = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, SIDE * SIDE, 3)))
    out = [Reference(torch, **sizes, kind=k)(clean, noise, torch.full((1, 4), 9.0).double(), torch.tensor([0])) for k in
           ("nd", "released")]  # fmt: skip
    assert (out[0] - out[1]).abs().max() > 0.01
