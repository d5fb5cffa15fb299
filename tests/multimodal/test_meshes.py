"""The loss of a multimodal run does not depend on the mesh, nor on how a step is cut into parts."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.training import corpus

STEPS = 12
SIZES = settings.Transformer(vocab_size=0, width=32, depth=2, heads=4, kv_heads=2, mlp_width=64, loss_chunk=64)


@pytest.fixture(scope="module")
def start(scenes_codes, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.model"
    path.write_bytes(text.data)
    formats = settings.Formats(text_to_image=1.0, image_to_text=1.0)
    parts = (settings.CodesFolder(folder=scenes_codes.folder, formats=formats),)
    s = settings.Experiment(
        model=settings.Multimodal(transformer=SIZES),
        sequences=settings.Sequences(sources=parts, text=str(path), context=128, vocab_multiple=8),
        optimizer=settings.Optimizer(warmup=2),
        train=settings.Train(batch_size=16, steps=STEPS),
    )
    return corpus.resolve(s)


def begun(s, devices):
    """The first state, on the host, where no step consumes it."""
    return jax.tree.map(np.array, experiment.build(s, devices).init())


def curve(s, found, devices, begin=None):
    """Losses. begin: of `begun`, laid out over this mesh; None: it is made there, which compiles a program."""
    built = experiment.build(s, devices)
    loader = corpus.open_rows(s, found, s.sequences.sources)
    losses = []
    with jax.set_mesh(built.mesh):
        state = built.init() if begin is None else jax.device_put(begin, built.shardings)
        for step in range(STEPS):
            batch = loader.batch_at(step)
            batch = meshes.put_batch({name: batch[name] for name in built.model.inputs}, built.mesh)
            state, metrics = built.step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def alone(start):
    begin = begun(start[0], jax.devices()[:1])
    losses = curve(*start, jax.devices()[:1], begin)
    assert losses[-1] < 0.9 * losses[0]
    return losses, begin


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        settings.Mesh(),
        settings.Mesh(fsdp=4, tensor=2),
        settings.Mesh(data=2, fsdp=4),
        settings.Mesh(fsdp=1, context=8),
        settings.Mesh(fsdp=2, tensor=2, context=2),
    ],
    ids=["fsdp 8", "fsdp 4 x tensor 2", "data 2 x fsdp 4", "context 8", "fsdp 2 x tensor 2 x context 2"],
)
def test_every_mesh_gives_the_curve_of_one_device(start, alone, mesh):
    (s, found), (losses, begin) = start, alone
    found = curve(replace(s, mesh=mesh), found, jax.devices(), begin if mesh.tensor == 1 else None)
    np.testing.assert_allclose(found, losses, rtol=1e-5)


@pytest.mark.slow
def test_parts_of_a_step_give_the_curve_of_the_whole(start, alone):
    (s, found), (losses, begin) = start, alone
    s = replace(s, train=replace(s.train, accumulate=4))
    np.testing.assert_allclose(curve(s, found, jax.devices()[:1], begin), losses, rtol=1e-5)
