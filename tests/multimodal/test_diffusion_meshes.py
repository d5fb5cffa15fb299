"""The mixed step of text and noised images does not depend on the mesh, nor on how it is cut into parts."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.multimodal import documents, sequence
from ddt_jax.multimodal.documents import Image, Text
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.training import feed

STEPS, ROWS = 5, 16
V = Vocabulary.extend(30, 0, multiple=8)
SIZES = settings.Transformer(vocab_size=V.size, width=32, depth=2, heads=4, kv_heads=2, mlp_width=64, loss_chunk=64)
SETTINGS = settings.Experiment(
    model=settings.Multimodal(transformer=SIZES, image=settings.DiffusionImages(patch_size=4)),
    data=settings.Data(image_size=8),
    sequences=settings.Sequences(context=40, images=4, targets=20),
    optimizer=settings.Optimizer(warmup=2),
    train=settings.Train(batch_size=ROWS, steps=STEPS),
)
UNET = settings.DiffusionImages(patch_size=4, coder=settings.UNetCoder(width=32, blocks=1))


def batch_of(step, form):
    """Rows with 0 to 3 images, so that parts of a batch have different numbers of targets and images."""
    rng = np.random.default_rng(step)
    made = []
    for _ in range(ROWS):
        text = rng.integers(0, 30, rng.integers(1, 6))
        image = [Image(rng.integers(0, 256, form.shape).astype(np.uint8)) for _ in range(3)]
        kinds = (
            documents.text_to_image(text, image[0]),
            documents.image_to_text(text, image[0]),
            documents.text_only(text),
            documents.interleaved([image[0], Text(text), image[1], image[2]]),
            documents.editing([image[0]], text, image[1]),
        )
        layout = sequence.lay_out(kinds[rng.integers(len(kinds))], V, form)
        row = sequence.pack_row([layout], 56 if form.kind == "blockwise" else 40, 4, V["PAD"], form)
        made.append(row | {"rows": sequence.target_rows(row["target"], 20)})
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    return batch | {"slot": np.arange(ROWS, dtype=np.int32)}


def begun(s, devices):
    """The first state, on the host, where no step consumes it."""
    return jax.tree.map(np.array, experiment.build(s, devices).init())


def curve(s, devices, begin=None):
    """Metrics of each step. begin: of `begun`, laid out over this mesh; None: it is made there, which compiles a
    program for each mesh.
    """
    built = experiment.build(s, devices)
    found = []
    with jax.set_mesh(built.mesh):
        state = built.init() if begin is None else jax.device_put(begin, built.shardings)
        for step in range(STEPS):
            batch = batch_of(step, built.model.form)
            batch = meshes.put_batch({name: batch[name] for name in built.model.inputs}, built.mesh)
            state, metrics = built.step(state, batch)
            found.append([float(metrics[name]) for name in ("loss", "next_token", "diffusion", "grad_norm")])
    return np.array(found)


@pytest.fixture(scope="module")
def alone():
    begin = begun(SETTINGS, jax.devices()[:1])
    found = curve(SETTINGS, jax.devices()[:1], begin)
    np.testing.assert_allclose(found[:, 0], found[:, 1] + 5 * found[:, 2], rtol=1e-5)
    assert found[0, 2] == pytest.approx(1, abs=0.05)  # a fresh coder predicts no noise
    return found, begin


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [settings.Mesh(fsdp=4, tensor=2), settings.Mesh(data=2, fsdp=4)],
    ids=["fsdp 4 x tensor 2", "data 2 x fsdp 4"],
)
def test_every_mesh_gives_the_curve_of_one_device(alone, mesh):
    wanted, begin = alone
    found = curve(replace(SETTINGS, mesh=mesh), jax.devices(), begin if mesh.tensor == 1 else None)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
def test_a_unet_gives_the_curve_of_one_device():
    s = replace(SETTINGS, model=replace(SETTINGS.model, image=UNET))
    begin = begun(s, jax.devices()[:1])
    alone = curve(s, jax.devices()[:1], begin)
    found = curve(replace(s, mesh=settings.Mesh(fsdp=4, tensor=2)), jax.devices(), begin)
    np.testing.assert_allclose(found, alone, rtol=1e-5)


@pytest.mark.slow
def test_images_in_blocks_give_the_curve_of_one_device():
    image = settings.DiffusionImages(patch_size=4, block_size=1)
    model, sequences = replace(SETTINGS.model, image=image), replace(SETTINGS.sequences, context=56)
    s = replace(SETTINGS, model=model, sequences=sequences)
    alone = curve(s, jax.devices()[:1])
    np.testing.assert_allclose(curve(replace(s, mesh=settings.Mesh(fsdp=4, tensor=2)), jax.devices()), alone, rtol=1e-5)


@pytest.mark.slow
def test_parts_of_a_step_give_the_curve_of_the_whole(alone):
    s = replace(SETTINGS, train=replace(SETTINGS.train, accumulate=4))
    np.testing.assert_allclose(curve(s, jax.devices()[:1], alone[1]), alone[0], rtol=1e-5)


def test_shapes_for_compiling_ahead_are_those_of_a_batch():
    model = experiment.make_model(SETTINGS)
    batch = batch_of(0, model.form)
    shapes = feed.batch_shapes(SETTINGS, model)
    assert set(shapes) == set(model.inputs)
    for name in model.inputs:
        assert (batch[name].shape, batch[name].dtype) == shapes[name], name


@pytest.mark.parametrize("image", [SETTINGS.model.image, UNET], ids=["linear", "unet"])
def test_every_parameter_lies_on_the_mesh_by_a_rule(image):
    s = replace(SETTINGS, model=replace(SETTINGS.model, image=image), mesh=settings.Mesh(fsdp=4, tensor=2))
    assert not experiment.build(s, jax.devices()).fallbacks
