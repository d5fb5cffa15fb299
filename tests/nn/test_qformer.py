"""The Q-Former against transformers' BLIP-2 with an explicit mask, and what causality means for its rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.interop import blip2
from ddt_jax.nn import blocks, qformer
from ddt_jax.nn.params import split
from ddt_jax.nn.qformer import QFormer

POST = settings.QFormer(depth=4, width=12, heads=3, mlp_width=20, norm="post", norm_epsilon=1e-12)
MEMORY, ROWS, BATCH = 8, 5, 2


def theirs(oracle, seed):
    torch, transformers = oracle("torch"), oracle("transformers")
    torch.manual_seed(seed)
    config = transformers.Blip2QFormerConfig(
        hidden_size=12,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=20,
        encoder_hidden_size=MEMORY,
        cross_attention_frequency=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    model = transformers.Blip2QFormerModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3 + ("ayer" in name and "orm.weight" in name))
    return torch, model


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [5, 16, 32])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_and_gradients_equal_blip2_with_an_explicit_mask(oracle, queries, causal):
    @jax.jit
    def run(params, x, memory, direction):
        model = QFormer(POST, queries, causal)
        out, back = jax.vjp(lambda p: model.apply({"params": p}, memory, queries_BND=x), params)
        return out, back(direction)[0]

    for seed in (0, 1):
        torch, model = theirs(oracle, seed)
        arrays = {f"qformer.{name}": array.numpy() for name, array in model.state_dict().items()}
        params = blip2.from_arrays(arrays | {"query_tokens": np.zeros((1, queries, 12))}, POST, queries, MEMORY)
        x, memory, direction = (
            random(i, BATCH, *shape) for i, shape in enumerate(((queries, 12), (ROWS, MEMORY), (queries, 12)))
        )
        # A 4-D mask is added to the logits: one of zeros and ones would pass in silence and hide nothing.
        mask = torch.full((1, 1, queries, queries), -1e4).triu(1) * causal
        seen = {"encoder_hidden_states": torch.tensor(memory)}
        out = model(torch.tensor(x), attention_mask=mask, **seen).last_hidden_state
        plain = model(torch.tensor(x), **seen).last_hidden_state
        assert (float((out - plain).detach().abs().max()) > 0.1) == causal, "the oracle's mask does not bite"
        (out * torch.tensor(direction)).sum().backward()

        rows, grads = run(params, x, memory, direction)
        np.testing.assert_allclose(rows, out.detach().numpy(), atol=1e-5)
        found = blip2.to_arrays(grads, POST)
        for name, p in model.named_parameters():
            expected = p.grad.numpy()
            # A key's bias moves no softmax: its gradient is rounding, and others' size says how much.
            tolerance = 1e-4 * (1.0 if name.endswith("key.bias") else np.abs(expected).max())
            np.testing.assert_allclose(found[f"qformer.{name}"], expected, atol=tolerance, err_msg=name)


def made(c, queries=6, causal=True):
    model = QFormer(c, queries, causal)
    memory = random(0, BATCH, ROWS, MEMORY)
    params, _ = split(model.init(jax.random.key(0), memory)["params"])
    return model, jax.tree.map(lambda p: p + 0.1 * random(1, *p.shape), params), memory


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_query_moves_itself_and_those_behind_it_alone(norm):
    c = replace(POST, norm=norm, depth=3)
    model, params, memory = made(c)
    x = random(2, 6, 12)

    def rows(causal):
        @jax.jit
        def jacobian(x):
            run = lambda x: QFormer(c, 6, causal).apply({"params": params}, memory[:1], queries_BND=x[None])[0]  # noqa: E731
            return jnp.abs(jax.jacrev(run)(x)).max(axis=(1, 3))  # [row, query]

        return np.asarray(jacobian(x))

    found = rows(True)
    assert np.all(found[np.triu_indices(6, 1)] == 0) and np.all(found[np.tril_indices(6)] > 1e-3)
    assert np.all(rows(False) > 1e-3)


@pytest.mark.slow
def test_the_first_queries_alone_give_the_first_rows():
    model, params, memory = made(POST)
    whole = model.apply({"params": params}, memory)
    learned = params["queries"]
    for k in range(1, 7):
        part = QFormer(POST, k, True).apply({"params": params | {"queries": learned[:k]}}, memory)
        np.testing.assert_allclose(part, whole[:, :k], atol=1e-6)
    both_ways = QFormer(POST, 6, False).apply({"params": params}, memory)
    assert np.abs(both_ways[:, :5] - whole[:, :5]).max() > 0.05


def test_layers_in_groups_and_scanned_are_the_same():
    for depth in (4, 5):
        c = replace(POST, depth=depth)
        model, params, memory = made(c)
        assert ("last_group" in params) == (depth == 5)
        scanned = QFormer(replace(c, scan_layers=True), 6, True)
        out = scanned.apply({"params": blocks.scanned(params)}, memory)
        np.testing.assert_allclose(out, model.apply({"params": params}, memory), atol=1e-6)
    crossing = [layer for group in params["groups"].values() for layer in group if "cross_attention" in group[layer]]
    assert crossing == ["layer_0", "layer_0"] and "cross_attention" in params["last_group"]["layer_0"]


def test_sizes_that_do_not_go_together():
    with pytest.raises(UserError, match="model.qformer.width=12 is not a multiple of model.qformer.heads=5"):
        qformer.check(replace(POST, heads=5), "model.qformer")
    with pytest.raises(UserError, match="model.qformer.cross_every=0 must be at least 1"):
        qformer.check(replace(POST, cross_every=0), "model.qformer")
