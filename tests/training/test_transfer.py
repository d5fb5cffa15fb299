"""With `optimizer.transfer_from`, weights begin and move so that activations do the same at every width."""

import functools
import importlib
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import experiment, settings
from ddt_jax.errors import UserError
from ddt_jax.nn.params import Declaration
from ddt_jax.training import transfer
from ddt_jax.training.optimizer import make_optimizer, table

ROOT = Path(__file__).resolve().parents[2]
SQUARE = Declaration(axes=("embed", "mlp"), group="matrix", matrix=((-2,), (-1,)))
TABLE = Declaration(axes=("vocab", "embed"), decay=False)
PLAIN = settings.Optimizer(lr=1.0, warmup=0, schedule="constant", clip_norm=0.0, weight_decay=0.0)


@pytest.fixture
def coordinates(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("coordinate_check")


def backbone(width, transfer_from, **optimizer):
    """Heads are 8 wide, codes have vectors."""
    sizes = {"depth": 1, "heads": width // 8, "kv_heads": width // 8, "mlp_width": 3 * width, "scan_layers": False}
    transformer = settings.Transformer(vocab_size=20, width=width, **sizes)
    codes = {"num_tokens": 2, "codebook_size": 8, "code_vectors": True, "code_places": True, "code_width": 3}
    model = settings.Multimodal(transformer=transformer, image=settings.CodeImages(**codes))
    return experiment_of(model, transfer_from, **optimizer)


def tokenizer(width, transfer_from, **optimizer):
    model = settings.DDTTokenizer(width=width, heads=width // 8, num_tokens=2, encoder_depth=1, decoder_depth=1)
    return experiment_of(model, transfer_from, **optimizer)


def experiment_of(model, transfer_from, **optimizer):
    how = settings.Optimizer(transfer_from=transfer_from, **optimizer)
    return settings.Experiment(model=model, optimizer=how, train=settings.Train(batch_size=8))


@functools.cache
def build(make, width, transfer_from, name="muon"):
    return experiment.build(make(width, transfer_from, name=name), jax.devices()[:1])


def scales(built):
    """Path → (factor on updates, on the first value)."""
    leaves = jax.tree_util.tree_leaves_with_path(built.declarations)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (d.update_scale, d.initial_scale) for path, d in leaves
    }


# At four times the width. A table, a gain or a bias reads no width; Muon's update of a map between widths is to shrink
# by the root of 4, Adam's by 4; what leads out of the width also begins smaller, by 4 or, where 1 / √fan-in has done a
# half of it, by the root.
EXPECTED = {
    backbone: {
        "embed": (1, 1),
        "head": (1 / 4, 1 / 4),
        "norm/scale": (1, 1),
        "blocks/block_0/query/kernel": (1 / 2, 1),
        "blocks/block_0/output/kernel": (1 / 2, 1),
        "blocks/block_0/up/kernel": (1 / 2, 1),
        "blocks/block_0/down/kernel": (1 / 2, 1),
        "codes/input": (1, 1),
        "codes/output": (1 / 4, 1 / 4),
        "codes/places": (1, 1),
    },
    tokenizer: {
        "encoder/embed/kernel": (1, 1),
        "encoder/embed/bias": (1, 1),
        "encoder/queries": (1, 1),
        "encoder/blocks/block_0/project/heads/kernel": (1 / 2, 1),
        "encoder/to_code/kernel": (1 / 4, 1 / 2),
        "encoder/to_code/bias": (1, 1),
        "encoder/mix/kernel": (1 / 4, 1 / 2),
        "decoder/mix/kernel": (1, 1),
        "decoder/token_up/kernel": (1, 1),
        "decoder/token_down/kernel": (1 / 4, 1),
        "decoder/time/up/kernel": (1 / 4, 1),
        "decoder/blocks/block_0/adaln/modulate/kernel": (1 / 4, 1),
        "decoder/final/kernel": (1 / 4, 1 / 2),
    },
}


@pytest.mark.parametrize("make", [backbone, tokenizer])
def test_each_kind_of_parameter_has_the_factors_of_the_rules(make):
    found = scales(build(make, 64, 16))
    for name, expected in EXPECTED[make].items():
        assert found[name] == pytest.approx(expected, rel=1e-12), name


def test_adamw_on_matrices_is_scaled_by_what_they_read():
    found = scales(build(backbone, 64, 16, "adamw"))
    assert found["blocks/block_0/down/kernel"] == found["blocks/block_0/query/kernel"] == (1 / 4, 1)


@pytest.mark.parametrize("make", [backbone, tokenizer])
def test_at_the_width_itself_nothing_is_scaled(make):
    assert set(scales(build(make, 64, 64)).values()) == {(1, 1)}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_updates_have_the_spectral_norm_that_the_condition_asks_for(name):
    """√(fan-out / fan-in) times the same at all widths, of a matrix of rank one for Adam and of any for Muon."""
    s, found = replace(PLAIN, name=name), {}
    for n in (8, 128):
        params = {"w": jnp.zeros((n, 3 * n))}
        declared = transfer.scaled({"w": SQUARE}, params, {"w": jnp.zeros((8, 24))}, s)
        sign = lambda key, size: jnp.sign(jax.random.normal(jax.random.key(key), (size,)))  # noqa: E731
        grads = {"w": jnp.outer(sign(0, n), sign(1, 3 * n))}
        if name == "muon":
            grads = {"w": jax.random.normal(jax.random.key(2), (n, 3 * n))}
        tx = make_optimizer(s, 10, declared)
        update = np.asarray(jax.jit(tx.update)(grads, tx.init(params), params)[0]["w"])
        found[n] = np.linalg.norm(update, 2) / math.sqrt(3)
    # Newton-Schulz brings singular values to within [0.68, 1.13]; without transfer the ratio is 4 or 16.
    assert found[128] / found[8] == pytest.approx(1, rel=0.25 if name == "muon" else 1e-3)


def test_decay_keeps_its_rate():
    """The same share of a weight goes in a step at every width."""
    s = replace(PLAIN, name="adamw", weight_decay=0.25)
    narrow, params = {"w": jnp.ones((4, 4)), "e": jnp.ones((2, 4))}, {"w": jnp.ones((64, 64)), "e": jnp.ones((2, 64))}
    declared = transfer.scaled({"w": SQUARE, "e": TABLE}, params, narrow, s)
    tx, nothing = make_optimizer(s, 10, declared), jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(tx.update)(nothing, tx.init(params), params)[0]
    np.testing.assert_allclose(updates["w"], -0.25, rtol=1e-6)
    assert (updates["e"] == 0).all()


def test_first_values_are_scaled_as_it_is_declared():
    built = experiment.build(experiment_of(settings.LinearTokenizer(), 0), jax.devices()[:1])
    at = [replace(d, initial_scale=1 / (2 + i)) for i, d in enumerate(jax.tree.leaves(built.declarations))]
    scaled = replace(built, declarations=jax.tree.unflatten(jax.tree.structure(built.declarations), at))
    plain = jax.tree.leaves(built.init().params)
    for i, (value, other) in enumerate(zip(jax.tree.leaves(scaled.init().params), plain, strict=True)):
        np.testing.assert_allclose(value, np.asarray(other) / (2 + i), rtol=1e-6)
    assert any(np.asarray(value).any() for value in plain)


def test_a_checkpoint_is_laid_out_as_without_transfer():
    plain, scaled = (build(backbone, 64, base).abstract for base in (0, 16))
    assert jax.tree.structure(plain) == jax.tree.structure(scaled)


def test_the_table_of_parameters_says_the_factors():
    built = build(backbone, 64, 16)
    text = table(built.abstract.params, built.declarations, built.shardings.params, built.settings.optimizer)
    rows = {line.split()[0]: line.split() for line in text.splitlines()}
    assert rows["parameter"] == ["parameter", "shape", "optimizer", "decay", "rate", "start", "sharding"]
    assert rows["head"][2:6] == ["adamw", "0.01", "x0.25", "x0.25"]
    assert rows["blocks/block_*/up/kernel"][2:6] == ["muon", "0.01", "x0.5", "x1"]
    assert rows["embed"][2:6] == ["adamw", "0", "x1", "x1"]


def grows(found, name, coordinates):
    """Exponents of (inner state by maps between widths, output by maps out of the width)."""
    state, output = ("last hidden state", "logits") if found["kind"] == "backbone" else STATE
    powers = found[name]["exponents"]
    return powers[f"{state} by {coordinates.INNER}"], powers[f"{output} by {coordinates.OUT}"]


STATE = ("decoder's last state", "prediction")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "optimizer", "too_far", "most"),
    [("backbone", "adamw", (1, 1), 0.35), ("tokenizer", "muon", (0.5, 1), 0.5)],
)
def test_activations_move_alike_at_every_width_with_transfer_and_further_without(
    coordinates, kind, optimizer, too_far, most
):
    """The coordinate check of muP: exponents of the change in the first steps from width 32 to 128."""
    found = coordinates.check(kind, optimizer, widths=(32, 128))
    for on, off, power in zip(grows(found, "on", coordinates), grows(found, "off", coordinates), too_far, strict=True):
        assert abs(on) < 0.3, found["on"]["exponents"]
        assert off > 0.5 * power, "the check sees nothing: without transfer this is to grow"
    # Nothing at all grows: what is not aligned with what was learned may fall behind, by 1 / √width.
    assert max(found["on"]["exponents"].values()) < most < max(found["off"]["exponents"].values())


def of_transformer(**changes):
    s = backbone(64, 16)
    return replace(s, model=replace(s.model, transformer=replace(s.model.transformer, **changes)))


REFUSED = {
    "tied_head=True": of_transformer(tied_head=True),
    "lora.rank=2": of_transformer(lora=settings.LoRA(rank=2)),
    "heads=2 at width 64 would be 0.5 at width 16": of_transformer(heads=2),
    "kv_heads=2 at width 64": of_transformer(kv_heads=2),
    "init_from=runs/other": replace(backbone(64, 16), init_from="runs/other"),
    "kind='linear'; it is for multimodal and ddt": experiment_of(settings.LinearTokenizer(), 16),
    "transfer_from=-1 is no width": backbone(64, -1),
    "coder.kind='unet'": experiment_of(
        settings.Multimodal(image=settings.DiffusionImages(coder=settings.UNetCoder(width=32))), 16
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_the_rules_do_not_hold_for_is_refused_in_a_line(said):
    with pytest.raises(UserError) as error:
        transfer.narrowed(REFUSED[said])
    assert said in str(error.value) and "\n" not in str(error.value)
