"""Positions of rows over the mesh axis context: the same losses and gradients; only keys and values are gathered."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.errors import UserError
from ddt_jax.multimodal.model import check_context
from ddt_jax.scaling import program

ROWS, POSITIONS, VOCAB, LAYERS, WIDTH, MLP, HEADS, KV_HEADS = 4, 512, 96, 2, 32, 48, 4, 2
SIZES = settings.Transformer(
    vocab_size=VOCAB,
    width=WIDTH,
    depth=LAYERS,
    heads=HEADS,
    kv_heads=KV_HEADS,
    mlp_width=MLP,
    loss_chunk=64,
    z_loss=0.01,
    dropout=0.1,
    remat="full",
)
RUN = settings.Experiment(
    model=settings.Multimodal(transformer=SIZES, image=settings.CodeImages(num_tokens=16, codebook_size=64)),
    sequences=settings.Sequences(context=POSITIONS, targets=300),
    optimizer=settings.Optimizer(name="adamw", lr=0.03, eps=1e-2, warmup=1, schedule="constant"),
    train=settings.Train(batch_size=ROWS, steps=4, ema=0.0),
)


def changed(s, mesh=None, **transformer):
    s = replace(s, model=replace(s.model, transformer=replace(s.model.transformer, **transformer)))
    return s if mesh is None else replace(s, mesh=mesh)


def batch(s, step):
    """Packed documents of uneven lengths, of which some begin in one part of a row and end in another."""
    rng = np.random.default_rng(step)
    begins = np.sort(rng.integers(1, POSITIONS, (ROWS, 3)), axis=1)
    here = np.arange(POSITIONS)
    start = np.where(here >= begins[..., None], begins[..., None], 0).max(axis=1)
    rows = np.full((ROWS, s.sequences.targets), -1)
    for row in rows:
        chosen = np.sort(rng.choice(POSITIONS - 1, rng.integers(200, 300), replace=False))
        row[: len(chosen)] = chosen
    arrays = {
        "tokens": VOCAB * rng.random((ROWS, POSITIONS)) ** 3,
        "position": here - start,
        "start": start,
        "rows": rows,
    }
    if s.model.whole_prompts:  # the first half of each document is a prompt
        end = np.where(here < begins[..., None], begins[..., None], POSITIONS).min(axis=1)
        half = (start + end) // 2
        arrays["given"] = np.where(here < half, half, 0)
    return {name: x.astype(np.int32) for name, x in arrays.items()} | {"slot": np.arange(ROWS, dtype=np.int32)}


def trained(s, devices):
    """(losses, parameters after the last step, and what AdamW has summed of their gradients)."""
    built = experiment.build(s, devices)
    alone = experiment.build(replace(s, mesh=settings.Mesh()), jax.devices()[:1])
    losses = []
    with jax.set_mesh(built.mesh):
        state = jax.device_put(jax.tree.map(np.array, alone.init()), built.shardings)
        for step in range(s.train.steps):
            state, metrics = built.step(state, meshes.put_batch(batch(s, step), built.mesh))
            losses.append([float(metrics[name]) for name in ("loss", "grad_norm", "text_accuracy", "targets_used")])
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    return np.array(losses), jax.tree.map(np.array, (state.params, moments))


WAYS = {
    "dense": changed(RUN, attention="dense"),
    "chunked, whole prompts": replace(
        changed(RUN, attention="chunked", dropout=0.0), model=replace(RUN.model, whole_prompts=True)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradients_are_those_of_one_device(way):
    s = WAYS[way]
    losses, (params, moments) = trained(replace(s, mesh=settings.Mesh(fsdp=1)), jax.devices()[:1])
    assert losses[-1, 0] < losses[0, 0] - 0.01
    for mesh in (settings.Mesh(fsdp=1, context=2), settings.Mesh(fsdp=2, context=2)):
        devices = jax.devices()[: mesh.fsdp * mesh.context]
        found, (found_params, found_moments) = trained(replace(s, mesh=mesh), devices)
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        for got, wanted in zip(found_moments, moments, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
        for got, wanted in zip(*map(jax.tree.leaves, (found_params, params)), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)


def compiled(s):
    size = int(np.prod([getattr(s.mesh, axis) for axis in meshes.AXES]))
    built = experiment.build(s, jax.devices()[:size])
    with jax.set_mesh(built.mesh):
        step = built.step.lower(built.abstract, experiment.abstract_batch(built)).compile()
    return step, program.read(step.as_text(), size), built.mesh


@pytest.fixture(scope="module")
def without_remat():
    return compiled(changed(RUN, settings.Mesh(fsdp=2, context=4), remat="none"))


@pytest.mark.slow
def test_of_activations_only_keys_and_values_are_gathered(without_remat):
    _, work, mesh = without_remat
    over_context = {c: n for c, n in work.collectives.items() if "context" in c.axes(mesh)}
    keys = (ROWS // 2, KV_HEADS, POSITIONS, WIDTH // HEADS)
    kinds = ("all-gather", "reduce-scatter")
    moved = {kind: sum(n for c, n in over_context.items() if c.kind == kind and keys in c.shapes) for kind in kinds}
    # Of each layer keys and values, forwards and again backwards; their gradients are added up once.
    assert moved == {"all-gather": 4 * LAYERS, "reduce-scatter": 2 * LAYERS}
    others = [shape for c in over_context for shape in c.shapes if shape != keys]
    # Numbers of tokens may travel, and gradients do; nothing has positions and a width.
    assert others and not [shape for shape in others if POSITIONS in shape and len(shape) > 2]


@pytest.mark.slow
def test_memory_of_activations_falls_with_the_parts_of_a_row(without_remat):
    whole, _, _ = compiled(changed(RUN, settings.Mesh(fsdp=2), remat="none"))
    temporary = [step.memory_analysis().temp_size_in_bytes for step in (whole, without_remat[0])]
    assert temporary[1] < temporary[0] / 2


@pytest.mark.parametrize(
    ("s", "message"),
    [
        (replace(RUN, sequences=replace(RUN.sequences, context=510)), "sequences.context=510 does not divide over"),
        (
            changed(replace(RUN, sequences=replace(RUN.sequences, context=256)), attention="splash"),
            "attention=splash needs multiples of 128 positions, sequences.context=256 over mesh.context=4 is 64",
        ),
        (
            replace(RUN, model=replace(RUN.model, image=replace(RUN.model.image, code_places=True, code_vectors=True))),
            "would part the codes of an image",
        ),
        (
            replace(RUN, model=replace(RUN.model, image=settings.DiffusionImages())),
            "model.image.kind=diffusion has none",
        ),
        (settings.Experiment(), "splits rows of text and codes, model.kind=ddt has none; set mesh.context=1"),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line(s, message):
    check_context(s, meshes.make_mesh(settings.Mesh(), jax.devices()))
    with pytest.raises(UserError) as error:
        experiment.build(replace(s, mesh=settings.Mesh(context=4)), jax.devices())
    assert message in str(error.value) and "\n" not in str(error.value)
