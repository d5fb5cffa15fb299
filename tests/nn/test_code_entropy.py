"""Usage of codes per token position, against NumPy in float64 and, with a whole quantizer, PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import code_entropy
from ddt_jax.nn.quantize import VectorQuantizer, nearest

B, K, D, V, G = 8, 6, 4, 16, 3
RAMP = (0.1, 0.3)
SLOTS = np.arange(B, dtype=np.int32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(seed, *shape):
    return unit(np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def entropy(p):
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


def probability(z, codes):
    return softmax(10 * z.astype(np.float64) @ codes.T.astype(np.float64)).mean(0)


def make(**kwargs):
    defaults = dict(code_dim=D, codebook_size=V, normalize_input="none", diversity=1.0, entropy_groups=G)
    return VectorQuantizer(settings.Quantizer(**(defaults | kwargs)), num_tokens=K, batch_size=B)


def test_diversity_is_the_mean_of_both_entropies_times_the_scheduled_weight():
    p = np.random.default_rng(0).dirichlet(np.full(V, 0.3), K)
    by_hand = (entropy(p).mean() + entropy(p.reshape(G, K // G, V).mean(1)).mean()) / 2
    fraction = np.exp(entropy(p)).mean() / V
    ramp = (fraction - 0.1, fraction + 0.3)
    loss, value, weight = code_entropy.diversity(jnp.asarray(p, jnp.float32), G, ramp)
    np.testing.assert_allclose(value, by_hand, rtol=1e-6)
    np.testing.assert_allclose(weight, 0.5 * 0.75, rtol=1e-5)
    np.testing.assert_allclose(loss, -0.5 * 0.75 * by_hand, rtol=1e-5)
    assert abs(float(value) - entropy(p).mean()) > 0.05  # the groups matter


def test_groups_are_neighbours_and_none_is_empty_where_they_do_not_divide_the_tokens():
    p = np.random.default_rng(0).dirichlet(np.full(V, 0.3), 7)
    value = code_entropy.diversity(jnp.asarray(p, jnp.float32), 3, RAMP)[1]
    grouped = np.stack([p[rows].mean(0) for rows in ([0, 1, 2], [3, 4], [5, 6])])
    np.testing.assert_allclose(value, (entropy(p).mean() + entropy(grouped).mean()) / 2, rtol=1e-6)


def test_weight_is_half_then_linear_then_nothing():
    fractions = np.array([0.0, 0.0999, 0.15, 0.2, 0.25, 0.3, 1.0])
    expected = [0.5, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    np.testing.assert_allclose(code_entropy.ramp_weight(fractions, RAMP), expected, atol=1e-6)


@pytest.mark.parametrize("max_table", [B * V * K, B * V * 2, V * 2, 1])
def test_pieces_give_the_mean_and_gradient_of_the_whole_table(max_table):
    z, codes, weight = draw(0, B, K, D), draw(1, V, D), np.random.default_rng(2).normal(size=(K, V))

    def pieces(z):
        p = code_entropy.mean_probability(z, codes, max_table)
        return jnp.sum(weight * jnp.log(p)), p

    def whole(z):
        p = jax.nn.softmax(10 * z @ codes.T, axis=-1).mean(0)
        return jnp.sum(weight * jnp.log(p)), p

    gradient, p = jax.jit(jax.grad(pieces, has_aux=True))(z)
    np.testing.assert_allclose(p, probability(z, codes), rtol=1e-5)
    # fp32 against fp32 in another order of sums; gradients are of size 1 to 10.
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(whole, has_aux=True))(z)[0], atol=2e-5)
    text = str(jax.make_jaxpr(jax.grad(pieces, has_aux=True))(z))
    assert (max_table == B * V * K) == (f"[{B},{K},{V}]" in text)


def test_codes_that_are_not_of_unit_length_are_noticed():
    z, codes = draw(0, B, K, D), draw(1, V, D)
    longer = codes * np.random.default_rng(2).uniform(0.5, 1.5, (V, 1)).astype(np.float32)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(code_entropy.mean_probability(z, longer), probability(z, codes), rtol=1e-2)


def test_images_over_eight_devices_give_the_same_gradient():
    z, codes = draw(0, B, K, D), draw(1, V, D)

    def loss(z):
        return code_entropy.diversity(code_entropy.mean_probability(z, codes, V), G, (0.9, 1.1))[0]

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    compiled = jax.jit(jax.grad(loss))
    spread = compiled(jax.device_put(z, NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(spread, compiled(z), atol=1e-6)
    assert np.abs(spread).max() > 1e-3


def test_each_device_of_a_mesh_holds_as_large_a_table_as_one_alone():
    z, codes = draw(0, B, K, D), draw(1, V, D)

    def both(z):
        p = code_entropy.mean_probability(z, codes, B // 4 * K * V)
        return p, nearest(z.reshape(B * K, D), codes, B // 4 * K * V, examples=B)

    alone = jax.jit(both)(z)
    assert f"[{B},{K},{V}]" not in str(jax.make_jaxpr(both)(z))
    with jax.set_mesh(meshes.make_mesh(settings.Mesh(data=2, fsdp=2), jax.devices()[:4])):
        text, spread = str(jax.make_jaxpr(both)(z)), jax.jit(both)(meshes.constrain_batch(z))
    assert f"[{B},{K},{V}]" in text and f"[{B * K},{V}]" in text
    np.testing.assert_allclose(spread[0], alone[0], rtol=1e-6)
    np.testing.assert_array_equal(spread[1], alone[1])


def test_running_usage_starts_with_seven_tenths_and_goes_on_with_one_hundredth():
    q = make()
    extra = q.init(jax.random.key(0)) | {"initialized": jnp.bool_(True)}
    usage = np.full((K, V), 1 / V)
    quantize, update = jax.jit(q.quantize), jax.jit(q.update)
    for step in range(3):
        _, codes, _, stats = quantize(extra, draw(step, B, K, D), SLOTS, jax.random.key(step))
        hard = np.eye(V)[np.asarray(codes)].mean(0)
        usage = 0.3 * usage + 0.7 * hard if step == 0 else 0.99 * usage + 0.01 * hard
        extra = update(extra, stats)
        np.testing.assert_allclose(extra["usage"], usage, atol=1e-6)


def test_terms_mix_running_usage_with_the_batch_and_are_off_while_codes_are_random():
    q = make(entropy_ramp=(0.2, 1.0))
    extra, z = q.init(jax.random.key(0)), draw(0, B, K, D)

    @jax.jit
    def terms(extra):
        stats = q.quantize(extra, z, SLOTS, jax.random.key(1))[3]
        return q.diversity_terms(extra, z, stats), stats["usage"]

    before, counts = terms(extra)
    assert float(before["diversity"]) == 0 and float(before["diversity_weight"]) == 0
    after, _ = terms(extra | {"initialized": jnp.bool_(True)})
    hard = 0.3 / V + 0.7 * np.asarray(counts) / B
    p = 0.8 * hard + 0.2 * probability(z, np.asarray(extra["codes"]))
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    value = (entropy(p).mean() + entropy(p.reshape(G, K // G, V).mean(1)).mean()) / 2
    weight = 0.5 * (1.0 - np.exp(entropy(p)).mean() / V) / 0.8
    np.testing.assert_allclose(after["code_entropy"], value, rtol=1e-5)
    np.testing.assert_allclose(after["diversity"], -weight * value, rtol=1e-5)
    assert make(diversity=0.0).diversity_terms(extra, z, {}) == {}


def test_moved_codes_come_from_positions_with_few_codes_as_often_as_published():
    v = 30_000
    config = settings.Quantizer(code_dim=D, codebook_size=v, normalize_input="none", revive_from="perplexity")
    q = VectorQuantizer(config, K, B)
    usage = np.random.default_rng(0).dirichlet(np.full(V, 0.3), K)
    inverse = np.exp(-entropy(usage))
    expected = softmax(10 * inverse / inverse.max())
    got = code_entropy.position_probability(jnp.asarray(usage, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert expected.max() > 3 * expected.min()
    rows = np.asarray(jax.jit(q._weighted_rows)({"usage": jnp.asarray(usage, jnp.float32)}, jax.random.key(0)))
    share = np.bincount(rows % K, minlength=K) / v
    assert np.all(np.abs(share - expected) < 4.5 * np.sqrt(expected / v) + 1e-4)
    images = np.bincount(rows // K, minlength=B) / v
    assert len(images) == B and np.all(np.abs(images - 1 / B) < 4.5 * np.sqrt(1 / B / v))


def test_sums_by_sorting_equal_numpy():
    rng = np.random.default_rng(0)
    rows, segment = rng.normal(size=(200, D)).astype(np.float32), rng.choice([0, 3, 4, 9], 200).astype(np.int32)
    expected = np.zeros((11, D))
    np.add.at(expected, segment, rows)
    got = jax.jit(code_entropy.sorted_segment_sum, static_argnums=2)(rows, segment, 11)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_more_groups_than_tokens_are_refused():
    with pytest.raises(UserError, match="entropy_groups: 64 .* choose 1 to 6"):
        make(entropy_groups=64)
    make(entropy_groups=64, diversity=0.0)
    with pytest.raises(UserError, match="entropy_ramp"):
        make(entropy_ramp=(0.3, 0.1))


def published_step(deterministic, b=384, k=512, v=32_768, d=16):
    """The quantizer's part of a train step at the published batch, and its abstract arguments."""
    config = settings.Quantizer(
        code_dim=d,
        codebook_size=v,
        normalize_input="none",
        diversity=1.0,
        revive_from="perplexity",
        deterministic=deterministic,
    )
    q = VectorQuantizer(config, k, b)

    def loss(z, extra, slot, key):
        _, _, commitment, stats = q.quantize(extra, z, slot, key)
        return jnp.mean(commitment) + q.diversity_terms(extra, z, stats)["diversity"], stats

    def step(z, extra, slot, key):
        (_, stats), gradient = jax.value_and_grad(loss, has_aux=True)(z, extra, slot, key)
        return gradient, q.update(extra, stats)

    key = jax.eval_shape(lambda: jax.random.key(0))
    z, slot = jax.ShapeDtypeStruct((b, k, d), jnp.float32), jax.ShapeDtypeStruct((b,), jnp.int32)
    return step, (z, jax.eval_shape(q.init, key), slot, key)


def sizes_in(jaxpr):
    """Sizes of all that a program computes, loops and inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (x.aval.size for x in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes_in(inner)


@pytest.mark.parametrize("deterministic", [False, True])
def test_published_batch_computes_nothing_as_large_as_tokens_times_codes(deterministic):
    step, arguments = published_step(deterministic)
    program = jax.make_jaxpr(step)(*arguments).jaxpr
    # Tables are cut to 2^24 entries, as many as the usage of codes by position has; the whole has 384 times as many.
    assert max(sizes_in(program)) == 1 << 24
    text = str(program)
    assert "one_hot" not in text and "scatter-add" in text  # counts are a segment reduction


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_published_batch_never_holds_tokens_times_codes(deterministic):
    step, arguments = published_step(deterministic)
    held = jax.jit(step).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    print(f"temporary memory: {held / 1e9:.2f} GB")
    assert held < 0.5e9, held  # 0.32 and 0.35 GB on one device; the whole table has 26 GB


class TorchQuantizer:
    """The released quantizer's training step, written from its description, in float64."""

    def __init__(self, torch, codes, tokens, revive_below):
        self.torch, self.codes = torch, torch.tensor(codes, dtype=torch.float64)
        v = len(codes)
        self.count, self.total = torch.zeros(v).double(), torch.zeros(v, codes.shape[1]).double()
        self.usage, self.started, self.revive_below = torch.full((tokens, v), 1 / v).double(), False, revive_below

    def __call__(self, features, groups):
        """(quantized, commitment, diversity loss, H_tok, H_grp, weight); moves the state, without moving dead codes."""
        torch = self.torch
        z = torch.nn.functional.normalize(features, dim=-1)
        b, k, d = z.shape
        v = len(self.codes)
        cosine = torch.einsum("bkd,vd->bkv", z, self.codes)
        index = cosine.argmax(-1)
        chosen = self.codes[index]
        commitment = torch.nn.functional.mse_loss(z, chosen)
        quantized = z + (chosen - z).detach()
        hard = torch.nn.functional.one_hot(index, v).double()
        decay = 0.99 if self.started else 0.3
        self.usage, self.started = decay * self.usage + (1 - decay) * hard.mean(0), True
        p = 0.8 * self.usage + 0.2 * torch.softmax(10 * cosine, -1).mean(0)
        h_token = torch.special.entr(p).sum(-1)
        h_group = torch.special.entr(p.reshape(groups, k // groups, v).mean(1)).sum(-1).mean()
        fraction = h_token.detach().exp().mean() / v
        weight = 0.5 if fraction < 0.1 else max(0.0, 0.5 * float(0.3 - fraction) / 0.2)
        diversity = -weight * (h_token.mean() + h_group) / 2

        flat, rows = hard.reshape(-1, v), z.detach().reshape(-1, d)
        self.count = 0.99 * self.count + 0.01 * flat.sum(0)
        self.total = 0.99 * self.total + 0.01 * flat.T @ rows
        smooth = (self.count + 1e-5) / (self.count.sum() + v * 1e-5) * self.count.sum()
        self.codes = torch.nn.functional.normalize(self.total / smooth[:, None], dim=-1)
        self.dead = self.count < self.revive_below * b * k / v
        return quantized, commitment, diversity, h_token.mean(), h_group, weight


@pytest.mark.slow
def test_five_training_steps_equal_torch(oracle):
    torch = oracle("torch")
    b, k, d, v = 4, 128, 8, 512
    config = settings.Quantizer(
        code_dim=d, codebook_size=v, decay=0.99, normalize_input="none", diversity=1.0, revive_below=0.0
    )
    q = VectorQuantizer(config, k, b)
    rng = np.random.default_rng(0)
    codes = unit(rng.normal(size=(v, d)))
    theirs = TorchQuantizer(torch, codes, k, 0.2)
    # Some of everything at the start, so that unused codes have a direction; the moving of codes is apart below.
    counts = rng.uniform(0.05, 1, v)
    theirs.count += torch.tensor(counts)
    theirs.total += torch.tensor(counts[:, None] * codes)
    extra = jax.jit(q.init)(jax.random.key(0))
    start = {"codes": codes, "count": counts, "sum": counts[:, None] * codes}
    extra |= {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    extra["initialized"] = jnp.bool_(True)
    weight = rng.normal(size=(b, k, d))

    @jax.jit
    def step(extra, z):
        def loss(z):
            out, _, commitment, stats = q.quantize(extra, z, np.arange(b), jax.random.key(0))
            terms = q.diversity_terms(extra, z, stats)
            parts = {"commitment": jnp.mean(commitment) / d, "diversity": terms["diversity"]}
            parts["through"] = jnp.sum(jnp.asarray(weight, jnp.float32) * out) / np.sqrt(d)
            return parts, (stats, terms)

        gradients, (stats, terms) = jax.jacrev(loss, has_aux=True)(z)
        return gradients, loss(z)[0], terms, q.update(extra, stats)

    weights = []
    for number in range(5):
        # A shared direction keeps perplexity low, so that the weight is whole at first and then a little below.
        z = (rng.normal(size=(b, k, d)) + rng.normal(size=d)).astype(np.float32)
        features = torch.tensor(z, dtype=torch.float64, requires_grad=True)
        out, commitment, diversity, h_token, h_group, w = theirs(features, 64)
        values = {"commitment": commitment, "diversity": diversity, "through": (out * torch.tensor(weight)).sum()}
        gradients, ours, terms, extra = step(extra, z)
        weights.append(w)
        for name, value in values.items():
            expected = torch.autograd.grad(value, features, retain_graph=True)[0].numpy()
            value = float(value.detach())
            error = np.abs(gradients[name] - expected).max() / max(np.abs(expected).max(), 1e-12)
            print(f"step {number} {name}: value {float(ours[name]) - value:.1e}, gradient {error:.1e} of its size")
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6)
            assert error < 2e-5, (number, name)  # fp32 against fp64
        np.testing.assert_allclose(terms["code_entropy"], (h_token + h_group).detach() / 2, rtol=1e-6)
        np.testing.assert_allclose(terms["diversity_weight"], w, atol=1e-5)
        for name, expected in {"count": theirs.count, "sum": theirs.total, "codes": theirs.codes}.items():
            np.testing.assert_allclose(extra[name], expected, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(extra["usage"], theirs.usage, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(extra["codes"], axis=-1), 1, atol=1e-6)
    assert 0 < min(weights) < max(weights) == 0.5, weights
    published = dataclasses.replace(config, revive_below=0.2, revive_count="threshold", revive_from="perplexity")
    moving = VectorQuantizer(published, k, b)
    stats = jax.jit(moving.quantize)(extra, z, np.arange(b), jax.random.key(3))[3]
    theirs(torch.tensor(z, dtype=torch.float64), 64)
    after = jax.jit(moving.update)(extra, stats)
    dead = theirs.dead.numpy()
    assert int(after["revived"]) == dead.sum() and 0 < dead.sum() < v
    np.testing.assert_allclose(np.asarray(after["count"])[dead], 0.2 * b * k / v, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(after["codes"])[dead], np.asarray(stats["candidates"])[dead], atol=1e-6)
    np.testing.assert_allclose(np.asarray(after["codes"])[~dead], theirs.codes.numpy()[~dead], atol=1e-5)
