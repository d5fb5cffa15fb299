"""The train step: the same numbers on every mesh and for every split into micro-batches; bad steps leave no trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from ddt_jax import experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.errors import UserError
from ddt_jax.training.tokenizer_step import STOP

SPLIT = PartitionSpec("fsdp", "tensor")
LINEAR = settings.LinearTokenizer(quantizer=settings.Quantizer(normalize_input="none", codebook_size=64))
DDT = settings.DDTTokenizer(
    width=32, heads=2, num_tokens=8, encoder_depth=1, decoder_depth=1, quantizer=settings.Quantizer(codebook_size=64)
)
SELFTOK = settings.SelftokTokenizer(
    num_tokens=8,
    encoder=settings.SelftokEncoder(depth=2, image_width=16, image_heads=2, width=32, heads=2, position_grid=8),
    decoder=settings.SelftokDecoder(depth=2, width=32, heads=2, position_grid=8),
    quantizer=settings.Quantizer(
        codebook_size=64,
        normalize_input="none",
        diversity=1.0,
        entropy_groups=4,
        revive_below=0.2,
        revive_from="perplexity",
        revive_count="threshold",
        init="when_varied",
        init_variance=1e-4,  # reached within the test
    ),
    schedule=settings.Schedule(kind="uniform", direction="selftok"),
    codec=settings.VAECodec(
        preset="custom",
        sizes=settings.Autoencoder(
            block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_groups=4, scaling_factor=1.0
        ),
        random_weights=True,
    ),
)
# Judged by pixels and, from its fourth step on, by a discriminator, with noise of its own for each example.
VAE = settings.VAE(
    sizes=settings.Autoencoder(block_out_channels=(8, 8), layers_per_block=1, latent_channels=2, norm_groups=4),
    image_loss=settings.ImageLoss(
        lpips_weight=0.0,
        lpips_weight_late=0.0,
        late_from=3,
        r1_weight=1.0,
        discriminator=settings.Discriminator(width=8, layers=2, norm_groups=4),
    ),
)
STEPS, JUDGED_STEPS = 20, 8


def make(model=LINEAR, mesh=settings.Mesh(), devices=None, **train):  # noqa: B008 - frozen
    train = {"batch_size": 16, "steps": STEPS, **train}
    return experiment.build(
        settings.Experiment(
            model=model,
            mesh=mesh,
            data=settings.Data(image_size=16),
            train=settings.Train(**train),
            optimizer=settings.Optimizer(warmup=3),
        ),
        devices,
    )


def batch_of(step, stop=0):
    image = np.random.default_rng(step).integers(0, 256, (16, 16, 16, 3)).astype(np.uint8)
    return {"image": image, "slot": np.arange(16, dtype=np.int32), STOP: np.full(16, stop, np.int32)}


def begun(built):
    """The first state, on the host, where no step consumes it."""
    return jax.tree.map(np.array, built.init())


def curve(built, steps=STEPS, begin=None):
    """Losses and the last state. begin: of `begun`, laid out over this mesh; None: it is made there, which compiles
    a program for each mesh.
    """
    losses = []
    with jax.set_mesh(built.mesh):
        state = built.init() if begin is None else jax.device_put(begin, built.shardings)
        for step in range(steps):
            state, metrics = built.step(state, meshes.put_batch(batch_of(step), built.mesh))
            losses.append(float(metrics["loss"]))
    return np.array(losses), state


@pytest.fixture(scope="module")
def reference():
    return curve(make(devices=jax.devices()[:1]))


MESHES = {
    "fsdp 8": settings.Mesh(fsdp=8),
    "fsdp 4 x tensor 2": settings.Mesh(fsdp=4, tensor=2),
    "data 2 x fsdp 4": settings.Mesh(data=2, fsdp=4),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_every_mesh_gives_the_single_device_curve(mesh, reference):
    losses, state = curve(make(mesh=mesh))
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.extra), jax.tree.leaves(reference[1].extra), strict=True):
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), rtol=1e-4, atol=1e-5)


@functools.cache
def single_ddt(coupling):
    built = make(dataclasses.replace(DDT, coupling=coupling), devices=jax.devices()[:1])
    begin = begun(built)
    return curve(built, begin=begin)[0], begin


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("coupling", ["cross", "joint"])
def test_every_mesh_gives_the_single_device_curve_of_ddt(mesh, coupling):
    alone, begin = single_ddt(coupling)
    losses, _ = curve(
        make(dataclasses.replace(DDT, coupling=coupling), mesh), begin=begin if mesh.tensor == 1 else None
    )
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


@pytest.mark.slow
def test_the_published_networks_on_latents_give_the_single_device_curve():
    built = make(SELFTOK, devices=jax.devices()[:1])
    begin = begun(built)
    single, alone = curve(built, steps=10, begin=begin)
    losses, state = curve(make(SELFTOK, settings.Mesh(data=2, fsdp=4)), steps=10, begin=begin)
    np.testing.assert_allclose(losses, single, rtol=1e-5)
    assert losses[-1] < losses[0]
    assert state.extra["codebook"]["initialized"], "codes were never taken from the data: their losses went untested"
    for a, b in zip(jax.tree.leaves(state.extra["codec"]), jax.tree.leaves(alone.extra["codec"]), strict=True):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))  # frozen: no sum over devices touched it


@pytest.fixture(scope="module")
def judged():
    built = make(VAE, devices=jax.devices()[:1])
    begin = begun(built)
    return *curve(built, steps=JUDGED_STEPS, begin=begin), begin


def same_judged_curve(built, judged, begin=None):
    losses, state = curve(built, steps=JUDGED_STEPS, begin=begin)
    np.testing.assert_allclose(losses, judged[0], rtol=1e-4)  # Adam's first steps divide rounding by rounding
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(judged[1].params), strict=True):
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), atol=1e-3)


@pytest.mark.slow
def test_a_mesh_gives_the_single_device_curve_of_adversaries(judged):
    same_judged_curve(make(VAE, settings.Mesh(fsdp=4, tensor=2)), judged)


@pytest.mark.slow
def test_micro_batches_of_adversaries_add_up_to_the_whole(judged):
    same_judged_curve(make(VAE, settings.Mesh(fsdp=2, data=4), accumulate=2), judged, begin=judged[2])


@pytest.mark.slow
def test_weights_of_the_loss_and_the_discriminator_follow_the_step():
    built = make(VAE, devices=jax.devices()[:1])
    with jax.set_mesh(built.mesh):
        state = built.init()
        for step in range(5):
            before = jax.device_get(state.params["discriminator"])
            state, metrics = built.step(state, batch_of(step))
            m = {name: float(value) for name, value in metrics.items()}
            late = step >= 3
            weights = {"pixel": 1, "adversarial": 0.5 * late, "discriminator": late, "r1": late, "kl": 1e-6}
            np.testing.assert_allclose(m["loss"], sum(w * m[n] for n, w in weights.items()), rtol=1e-5)
            assert m["grad_norm"] > 0 and (m["grad_norm_discriminator"] > 0) == late, step
            after = jax.device_get(state.params["discriminator"])
            moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
            assert any(moved) == late, step


def test_the_norm_of_one_side_is_not_that_of_both():
    from ddt_jax.training.tokenizer_step import _norms

    tree = {"encoder": {"w": jnp.full((4,), 3.0)}, "discriminator": jnp.full((4,), 8.0)}
    assert _norms("grad_norm", tree) == {"grad_norm": 6.0, "grad_norm_discriminator": 16.0}
    assert _norms("grad_norm", tree["encoder"]) == {"grad_norm": 6.0}


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_add_up_to_the_whole(accumulate, reference):
    losses, state = curve(make(devices=jax.devices()[:1], accumulate=accumulate))
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.extra), jax.tree.leaves(reference[1].extra), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_micro_batches_on_a_mesh(reference):
    losses, _ = curve(make(mesh=settings.Mesh(fsdp=4, tensor=2), accumulate=2))
    np.testing.assert_allclose(losses, reference[0], rtol=1e-5)


def test_two_runs_on_one_mesh_are_bit_identical():
    built = make(mesh=settings.Mesh(fsdp=4, tensor=2))
    (a, state_a), (b, state_b) = curve(built), curve(built)
    np.testing.assert_array_equal(a, b)
    for x, y in zip(jax.tree.leaves(state_a), jax.tree.leaves(state_b), strict=True):
        np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y))


def test_accumulation_is_refused_for_batch_norm():
    model = settings.LinearTokenizer(quantizer=settings.Quantizer(normalize_input="batch"))
    with pytest.raises(UserError, match="train.accumulate=2 would change encoder batch norm"):
        make(model, accumulate=2)


class _Poisoned:
    """A model whose loss is not finite when the first image is black, also in its statistics, and large at gray 1."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def loss_fn(self, params, extra, batch, rng):
        brightest = batch["image"][0].max()
        bad = jnp.where(brightest == 0, jnp.nan, jnp.where(brightest == 1, 30.0, 1.0))
        return self._model.loss_fn(jax.tree.map(lambda p: p * bad, params), extra, batch, rng)


@pytest.mark.parametrize("when", [0, 3])
def test_a_bad_step_changes_nothing_but_the_counters(when):
    from ddt_jax.training import optimizer as optimizers
    from ddt_jax.training.tokenizer_step import make_step

    built = make(devices=jax.devices()[:1])
    s = built.settings
    tx = optimizers.make_optimizer(s.optimizer, STEPS, built.declarations)
    step = jax.jit(
        make_step(_Poisoned(built.model), tx, optimizers.learning_rate(s.optimizer, STEPS), accumulate=1, ema=0.99)
    )
    state = built.init()
    for i in range(when):
        state, _ = step(state, batch_of(i))
    bad = batch_of(when)
    bad["image"][0] = 0
    after, metrics = step(state, bad)
    assert metrics["bad_step"] == 1 and not np.isfinite(metrics["loss"])
    for name in ("params", "opt_state", "ema", "extra", "rng"):
        for x, y in zip(jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(after, name)), strict=True):
            np.testing.assert_array_equal(x, y)
    assert int(after.step) == when + 1 and after.bad_steps.tolist() == [1, 1]
    after, metrics = step(after, batch_of(when + 1))
    assert np.isfinite(metrics["loss"]) and after.bad_steps.tolist() == [1, 0]


def test_guards_skip_spikes_and_shorten_updates_and_nothing_bad_gets_into_their_windows():
    from ddt_jax.training import optimizer as optimizers
    from ddt_jax.training.tokenizer_step import make_step

    limits = {"spike_skip": 8.0, "clip_update": 1.0}
    s = dataclasses.replace(
        make(devices=jax.devices()[:1]).settings, optimizer=settings.Optimizer(warmup=1, guard_window=4, **limits)
    )
    built = experiment.build(s, jax.devices()[:1])
    tx, rate = optimizers.make_optimizer(s.optimizer, STEPS, built.declarations), optimizers.learning_rate
    step = jax.jit(make_step(_Poisoned(built.model), tx, rate(s.optimizer, STEPS), accumulate=1, ema=0.99, **limits))
    state, kept = built.init(), []
    for i, gray in enumerate([0, None, None, None, None, 1, 0, None, None]):
        batch = batch_of(i)
        if gray is not None:
            batch["image"][0] = gray
        after, metrics = step(state, batch)
        before, now = state.opt_state, after.opt_state
        assert (metrics["bad_step"], metrics["spike"]) == (gray is not None, gray == 1), i
        same = jax.tree.map(lambda a, b: bool((a == b).all()), (state.params, before.inner), (after.params, now.inner))
        assert all(jax.tree.leaves(same)) == (gray is not None)
        assert int(now.steps.count - before.steps.count) == (gray != 0) and np.isfinite(now.steps.values_RW).all()
        assert int(now.updates.count - before.updates.count) == (gray is None)
        if gray == 1:  # it has entered as the limit, far below itself
            assert now.steps.values_RW[0].max() < 0.5 * metrics["loss"]
        if gray is None:
            kept.append(float(metrics["update_kept"]))
            moved = optax.tree.norm(jax.tree.map(jnp.subtract, after.params, state.params))
            np.testing.assert_allclose(moved, kept[-1] * metrics["update_norm"], rtol=1e-4)
        state = after
    assert kept[0] == 1 and min(kept) < 1


def test_stop_of_any_row_reaches_the_metrics():
    built = make(mesh=settings.Mesh(fsdp=8))
    with jax.set_mesh(built.mesh):
        batch = batch_of(0)
        batch[STOP][13] = 1
        _, metrics = built.step(built.init(), meshes.put_batch(batch, built.mesh))
    assert metrics[STOP] == 1


def test_every_array_of_the_state_is_where_the_rules_say():
    built = make(DDT, settings.Mesh(fsdp=4, tensor=2))
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): s.spec
        for path, s in jax.tree_util.tree_leaves_with_path(built.shardings)
    }
    kernel = "decoder/blocks/block_0/mlp/up/kernel"
    assert specs[f"params/{kernel}"] == SPLIT
    assert specs[f"ema/{kernel}"] == SPLIT
    moments = [name for name in specs if name.startswith("opt_state") and name.endswith(kernel)]
    assert moments and all(specs[m] == SPLIT for m in moments)
