"""Decoding: what the sampler shows, what it costs, previews, and that plausible mistakes would be seen."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.diffusion import time
from ddt_jax.errors import UserError
from ddt_jax.tokenizers import base, ddt
from tests.tokenizers.test_ddt import PUBLISHED, QUICK, SIZE, B, K, Stub, build, make_batch

CODES = np.random.default_rng(0).integers(0, 16, (B, K)).astype(np.int32)
STEPS = 4
GROUPS = replace(QUICK, schedule=settings.Schedule(kind="uniform", groups=2))


def decode(config, codes=CODES, steps=STEPS, **static):
    tokenizer, params, extra = build(config)
    return jax.jit(lambda codes: tokenizer.decode(params, extra, codes, jax.random.key(3), steps=steps, **static))(
        codes
    )


def by_hand(config, codes=CODES, inclusive=True, sign=1.0):
    """Euler over all steps, its mask from k(u) alone: tokens 0..k, k one below the count."""
    tokenizer, params, extra = build(config)
    keys = base.example_keys(jax.random.key(3), jnp.arange(B))
    x = ddt.patchify(jax.vmap(lambda key: jax.random.normal(key, (SIZE, SIZE, 3)))(keys), config.patch_size)
    vectors = tokenizer.quantizer.lookup(extra["codebook"], codes)
    predict = jax.jit(lambda *args: tokenizer._apply(params, "predict", *args))
    u = time.grid(STEPS)
    t = time.shift(u, config.flow.shift)
    for i in range(STEPS):
        k = int(tokenizer.schedule.count(jnp.float32(u[i]), sampling=True)) - 1
        end = jnp.full((B,), k + 1 if inclusive else k)
        v = predict(x, jnp.full((B,), t[i]), vectors, jnp.zeros((B,), jnp.int32), end)
        v = v if config.flow.prediction == "velocity" else (x - v) / t[i]
        x = x - (t[i] - t[i + 1]) * sign * v
    return np.clip(ddt.unpatchify(x, config.patch_size, SIZE), -1, 1)


def test_decoding_is_six_lines_and_each_plausible_mistake_shows():
    image = decode(PUBLISHED)
    np.testing.assert_allclose(image, by_hand(PUBLISHED), atol=1e-4)
    for mistake in ({"inclusive": False}, {"codes": CODES[:, ::-1]}, {"sign": -1.0}):
        assert np.abs(image - by_hand(PUBLISHED, **mistake)).max() > 1e-2, mistake


def test_guidance_at_its_ends_is_one_of_the_predictions_bit_for_bit():
    plain, hidden = decode(PUBLISHED), decode(PUBLISHED, guidance=0.0)
    np.testing.assert_array_equal(decode(PUBLISHED, guidance=1.0), plain)
    np.testing.assert_array_equal(hidden, decode(PUBLISHED, codes=(CODES + 1) % 16, guidance=0.0))
    np.testing.assert_allclose(hidden, decode(PUBLISHED, num_visible=0), atol=1e-6)
    assert np.abs(hidden - plain).max() > 1e-3


def test_a_prefix_of_the_tokens_gives_a_preview_and_the_last_preview_is_the_image():
    tokenizer = build(GROUPS)[0]
    stop = tokenizer.schedule.steps_driven(K // 2, time.grid(STEPS))
    assert stop == STEPS // 2
    preview = decode(GROUPS, stop_after=stop)
    others = CODES.copy()
    others[:, K // 2 :] = (others[:, K // 2 :] + 3) % 16
    np.testing.assert_array_equal(preview, decode(GROUPS, codes=others, stop_after=stop))
    assert np.abs(preview - decode(GROUPS, codes=(CODES + 3) % 16, stop_after=stop)).max() > 1e-3
    np.testing.assert_array_equal(decode(GROUPS, stop_after=STEPS), decode(GROUPS))
    with pytest.raises(UserError, match="stop_after=5 is not between 1 and the 4 steps"):
        decode(GROUPS, stop_after=5)


def _program(value):
    """The jaxpr in a parameter of an equation, or None."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None


def multiplications(jaxpr) -> int:
    """Multiplications in a program's matrix products, those of a loop's body as often as it runs."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[i] for i in contracted], dtype=int)
        assert eqn.primitive.name != "while", "a loop of unknown length"
        inner = sum(multiplications(sub) for sub in map(_program, eqn.params.values()) if sub is not None)
        total += inner * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else inner
    return int(total)


@pytest.mark.parametrize(("extras", "forwards"), [({}, 25), ({"stop_after": 5}, 5), ({"guidance": 2.0}, 50)])
def test_decoding_costs_the_decoder_once_per_step_and_never_the_encoder(extras, forwards):
    tokenizer, params, extra = build(QUICK)
    rows = 64
    codes = jax.ShapeDtypeStruct((rows, K), jnp.int32)
    patches = jnp.zeros((rows, 4, 48))
    none = jnp.zeros((rows,), jnp.int32)
    whole = jax.make_jaxpr(lambda codes: tokenizer.decode(params, extra, codes, jax.random.key(0), steps=25, **extras))(
        codes
    )
    args = (patches, jnp.ones((rows,)), jnp.zeros((rows, K, 4)), none, none)
    one = jax.make_jaxpr(lambda *args: tokenizer._apply(params, "predict", *args))(*args)
    encoder = jax.make_jaxpr(lambda x: tokenizer._apply(params, "encode", x))(patches)
    ratio = multiplications(whole.jaxpr) / multiplications(one.jaxpr)
    assert forwards <= ratio <= forwards * 25.5 / 25
    assert multiplications(encoder.jaxpr) > 0.02 * forwards * multiplications(one.jaxpr) / 25  # would be seen


@pytest.mark.parametrize(("extras", "passes"), [({}, 25), ({"stop_after": 5}, 5), ({"guidance": 2.0}, 50)])
def test_network_is_evaluated_once_per_step_and_the_encoder_never(extras, passes):
    calls = []

    class Counted(Stub):
        def apply(self, variables, *args, method):
            jax.debug.callback(lambda: calls.append(method), ordered=True)
            return super().apply(variables, *args, method=method)

    tokenizer = base.make_tokenizer(QUICK, SIZE, B)
    tokenizer._network = Counted(tokenizer, lambda x, t: x)
    extra = build(QUICK)[2]
    run = jax.jit(lambda codes: tokenizer.decode({}, extra, codes, jax.random.key(0), steps=25, **extras))
    jax.block_until_ready(run(CODES))
    jax.effects_barrier()
    assert calls == ["predict"] * passes


def test_compiled_step_costs_what_one_pass_costs():
    """In FLOPs of the programs that run, everything included. A decoding of one step has no loop, whose body would be
    counted once; 25 steps cost at most 25 times as much, as noise and codec are there once.
    """
    config = replace(QUICK, width=128)  # wide enough for the noise to cost little beside it
    tokenizer, params, extra = build(config)
    rows = 64
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (rows, K)), jnp.int32)
    none, every = jnp.zeros((rows,), jnp.int32), jnp.full((rows,), K, jnp.int32)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    patches = jnp.zeros((rows, 4, 48))
    forward = flops(
        lambda x, c: tokenizer._apply(params, "predict", x, jnp.ones((rows,)), c, none, every),
        patches,
        tokenizer.quantizer.lookup(extra["codebook"], codes),
    )
    step = flops(lambda codes: tokenizer.decode(params, extra, codes, jax.random.key(0), steps=1), codes)
    encoder = flops(lambda x: tokenizer._apply(params, "encode", x), patches)
    assert forward <= step <= 25.5 / 25 * forward < forward + encoder


def test_the_schedule_looks_at_time_before_it_is_shifted():
    seen = {}

    class Recorder(Stub):
        def apply(self, variables, *args, method):
            if method == "predict":
                seen.update(t=args[1], end=args[4])
            return super().apply(variables, *args, method=method)

    for sampler in ("uniform", "logit_normal"):
        for shift in (1.0, 1.878):  # Selftok: below half of a 64x64 latent, and from there on
            flow = replace(PUBLISHED.flow, time=sampler, shift=shift, condition_drop=0.0)
            tokenizer = base.make_tokenizer(replace(PUBLISHED, flow=flow), SIZE, B)
            tokenizer._network = Recorder(tokenizer, lambda x, t: x)
            tokenizer.loss_fn({}, build(PUBLISHED)[2], make_batch(), jax.random.key(1))
            u = seen["t"] / (shift - (shift - 1) * seen["t"])
            np.testing.assert_array_equal(seen["end"], tokenizer.schedule.count(u))


def test_weighted_gradients_leave_the_loss_and_scale_each_tokens_share():
    losses, gradients = [], []
    for weighted in (False, True):
        config = replace(PUBLISHED, token_gradient_weights=weighted)
        tokenizer, params, extra = build(config)
        bias = jnp.zeros((1, K, 4))

        def loss(bias, tokenizer=tokenizer, params=params, extra=extra):
            quantize = tokenizer.quantizer.quantize

            class Shifted:
                """A quantizer whose output is moved, so that the gradient at it can be read."""

                def quantize(self, *args):
                    codes, *rest = quantize(*args)
                    return codes + bias, *rest

                def diversity_terms(self, *args):
                    return {}

            tokenizer.quantizer, kept = Shifted(), tokenizer.quantizer
            try:
                return tokenizer.loss_fn(params, extra, make_batch(), jax.random.key(1))[0]["flow"]
            finally:
                tokenizer.quantizer = kept

        value, gradient = jax.jit(jax.value_and_grad(loss))(bias)
        losses.append(value)
        gradients.append(np.asarray(gradient)[0])
    np.testing.assert_array_equal(*losses)
    weight = build(PUBLISHED)[0].schedule.gradient_weights()
    assert weight[-1] > 1.2 * weight[0]
    np.testing.assert_allclose(gradients[1], gradients[0] * weight[:, None], rtol=1e-4, atol=1e-6)
