"""A step over blocks does not depend on the mesh, nor on how it is cut into parts."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import experiment, settings
from ddt_jax import mesh as meshes

STEPS, ROWS, SIZE = 4, 16, 8
SETTINGS = settings.Experiment(
    model=settings.ACDiT(
        depth=2, width=32, heads=4, patch_size=2, block_size=4, classes=5, codec=settings.IdentityCodec()
    ),
    data=settings.Data(image_size=SIZE),
    optimizer=settings.Optimizer(warmup=2),
    train=settings.Train(batch_size=ROWS, steps=STEPS),
)


def batch_of(step):
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (ROWS, SIZE, SIZE, 3)).astype(np.uint8)
    label = rng.integers(-1, 5, ROWS).astype(np.int32)
    return {"image": images, "label": label, "slot": np.arange(ROWS, dtype=np.int32)}


def curve(s, devices, begin=None):
    """Metrics of each step. begin: a first state on the host, laid out over this mesh; None: it is made there."""
    built = experiment.build(s, devices)
    found = []
    with jax.set_mesh(built.mesh):
        state = built.init() if begin is None else jax.device_put(begin, built.shardings)
        for step in range(STEPS):
            state, metrics = built.step(state, meshes.put_batch(batch_of(step), built.mesh))
            found.append([float(metrics[name]) for name in ("loss", "mse_t50", "grad_norm")])
    return np.array(found)


@pytest.fixture(scope="module")
def alone():
    begin = jax.tree.map(np.array, experiment.build(SETTINGS, jax.devices()[:1]).init())
    found = curve(SETTINGS, jax.devices()[:1], begin)
    assert found[0, 0] == pytest.approx(1, abs=0.1)  # a fresh network predicts no noise
    return found, begin


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "parts"),
    [(settings.Mesh(fsdp=4, tensor=2), 1), (settings.Mesh(data=2, fsdp=4), 2)],
    ids=["fsdp 4 x tensor 2", "data 2 x fsdp 4, in 2 parts"],
)
def test_every_mesh_gives_the_curve_of_one_device(alone, mesh, parts):
    s = replace(SETTINGS, mesh=mesh, train=replace(SETTINGS.train, accumulate=parts))
    wanted, begin = alone
    np.testing.assert_allclose(curve(s, jax.devices(), begin if mesh.tensor == 1 else None), wanted, rtol=1e-5)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_every_parameter_lies_on_the_mesh_by_a_rule(scan):
    model = replace(SETTINGS.model, scan_layers=scan)
    built = experiment.build(replace(SETTINGS, model=model, mesh=settings.Mesh(fsdp=4, tensor=2)), jax.devices())
    assert not built.fallbacks
    split = [x for x in jax.tree.leaves(built.shardings.params) if any(x.spec)]
    assert len(split) > 0.5 * len(jax.tree.leaves(built.shardings.params))
