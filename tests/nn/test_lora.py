"""Low-rank updates: nothing at first, the merged kernel after, and the only thing that is trained."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import backbone
from ddt_jax.nn import decoder, layers, lora, params, spans

PLAIN = settings.Transformer(vocab_size=16, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24)
C = replace(PLAIN, lora=settings.LoRA(rank=3, alpha=6.0, targets=("query", "value", "output", "down")))
IDS = np.array([[3, 1, 4, 1, 5]], np.int32)


def logits(c, values):
    model, positions = backbone.Backbone(c), np.arange(5, dtype=np.int32)[None]
    return jax.jit(lambda v: model.apply({"params": v}, IDS, positions, spans.causal(5), method="everything"))(values)


def fresh(c):
    return params.split(jax.jit(lambda: backbone.init(c, jax.random.key(0)))())[0]


def trained(c):
    """With updates away from their zeros."""
    rng = np.random.default_rng(0)
    updates, others = lora.split(fresh(c))
    return lora.join(jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), updates), others)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_updates_change_nothing_at_first_and_merge_into_kernels(scan):
    c, plain = replace(C, scan_layers=scan), replace(PLAIN, scan_layers=scan)
    start = fresh(c)
    np.testing.assert_array_equal(logits(c, start), logits(plain, lora.split(start)[1]))
    values = trained(c)
    merged = lora.merge(values, c.lora)
    assert jax.tree.structure(merged) == jax.tree.structure(lora.split(values)[1])
    before = logits(c, values)
    np.testing.assert_allclose(logits(plain, merged), before, atol=1e-4)
    assert np.abs(before - logits(plain, lora.split(values)[1])).max() > 1e-2


def test_merged_kernel_is_alpha_over_rank_a_b():
    values = trained(replace(C, scan_layers=False))["blocks"]["block_1"]["output"]
    a, b, kernel = values["lora_a"], values["lora_b"], values["kernel"]
    assert a.shape == (4, 4, 3) and b.shape == (3, 16)
    expected = kernel + 2.0 * np.einsum("her,rd->hed", a, b)
    np.testing.assert_allclose(lora.merge({"output": values}, C.lora)["output"]["kernel"], expected, atol=1e-5)


def test_split_takes_the_updates_of_targets_alone_and_join_puts_them_back():
    values = fresh(C)
    updates, others = lora.split(values)
    block = updates["blocks"]["scanned"]["block"]
    assert updates.keys() == {"blocks"} and block.keys() == set(C.lora.targets)
    assert all(x.keys() == {"lora_a", "lora_b"} for x in block.values())
    jax.tree.map(np.testing.assert_array_equal, lora.join(updates, others), values)
    trained, frozen = lora.split(values, ("embed", "norms"))
    assert trained.keys() == {"blocks", "embed", "norm"} and frozen.keys() == {"blocks", "head"}
    assert trained["blocks"]["scanned"]["block"].keys() == {*C.lora.targets, "attention_norm", "mlp_norm"}
    kernels = {"query", "key", "value", "output", "gate", "up", "down"}
    block = frozen["blocks"]["scanned"]["block"]
    assert block.keys() == kernels and all(x.keys() == {"kernel"} for x in block.values())
    jax.tree.map(np.testing.assert_array_equal, lora.join(trained, frozen), values)


def test_decoding_merges_updates():
    c, values = backbone.for_decoding(C, trained(C))
    assert c.lora.rank == 0 and not c.scan_layers
    np.testing.assert_allclose(logits(c, values), logits(C, trained(C)), atol=1e-4)


def test_updates_that_are_less_than_a_weights_last_bit_count_in_half_precision():
    """Merged after rounding they would vanish: of weights near 1 in bf16 the last bit is 1/128."""
    c = replace(C, dtype="bfloat16", scan_layers=False, depth=1, lora=replace(C.lora, alpha=3.0))  # a factor of 1
    values = trained(c)
    kernel = values["blocks"]["block_0"]["value"]
    rng = np.random.default_rng(0)
    kernel["kernel"] = rng.uniform(1, 2, kernel["kernel"].shape).astype(np.float32)
    kernel["lora_a"], kernel["lora_b"] = (
        np.full(kernel[name].shape, 0.03, np.float32) for name in ("lora_a", "lora_b")
    )
    _, merged = backbone.for_decoding(c, values, computed=True)
    found = merged["blocks"]["block_0"]["value"]["kernel"]
    assert found.dtype == "bfloat16"
    moved = float(np.mean(np.asarray(found, np.float64) - kernel["kernel"]))
    assert abs(moved - 3 * 0.03**2) < 0.0015  # three ranks of 0.03 x 0.03; rounding has no side


def test_an_update_reads_what_it_is_given_and_the_kernel_all_of_the_input():
    rng = np.random.default_rng(0)
    dense = layers.Dense((3,), ("embed", "embed_out"), use_bias=False, lora=settings.LoRA(rank=2, alpha=6.0))
    values = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"kernel": (4, 3), "lora_a": (4, 2), "lora_b": (2, 3)}.items()
    }
    x, seen = rng.normal(size=(2, 5, 4)).astype(np.float32), rng.normal(size=(2, 5, 4)).astype(np.float32)
    wanted = x @ values["kernel"] + 3.0 * seen @ values["lora_a"] @ values["lora_b"]
    np.testing.assert_allclose(dense.apply({"params": values}, x, seen), wanted, atol=1e-5)


def test_dropout_of_updates_leaves_all_else_alone():
    c = replace(C, scan_layers=False, depth=1, lora=replace(C.lora, dropout=0.5))
    model, positions = backbone.Backbone(c), np.arange(5, dtype=np.int32)[None]

    @jax.jit
    def run(values, seed):
        x = model.apply({"params": values}, IDS, method="embed")
        keys = jax.random.key(seed)[None]
        return model.apply({"params": values}, x, positions, spans.causal(5), dropout_keys_B=keys)[0]

    start, values = fresh(c), trained(c)
    np.testing.assert_array_equal(run(start, 1), run(start, 2))  # updates are zero
    np.testing.assert_array_equal(run(values, 1), run(values, 1))
    assert np.abs(run(values, 1) - run(values, 2)).max() > 1e-2
    x = np.arange(1, 2001, dtype=np.float32).reshape(2, 1000)
    left = np.asarray(decoder._without_some(x, jax.random.split(jax.random.key(0), 2), 7, 0.25))
    np.testing.assert_allclose(left[left > 0], x[left > 0] / 0.75, rtol=1e-6)
    assert abs(np.mean(left == 0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000) and ((left == 0)[0] != (left == 0)[1]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dropout": 1.0}, "lora.dropout=1.0 must be"), ({"whole": ("head",)}, "lora.whole has head, which tied_head")],
)
def test_settings_of_updates_that_make_no_sense_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        backbone.check(replace(C, tied_head=True, lora=replace(C.lora, **changes)))
