"""Generation equals the full forward token by token, whatever else is in the batch, and draws what it may."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.multimodal import backbone
from ddt_jax.multimodal.generate import Prompts, WholeImages, generate, sample
from ddt_jax.nn import params, spans

TINY = settings.Transformer(vocab_size=24, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, scan_layers=False)
GREEDY = settings.Sampling(tokens=6, temperature=0.0)
PROMPTS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [5, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([5, 3, 1], np.int32)


@pytest.fixture(scope="module")
def values():
    shapes = params.split(jax.eval_shape(lambda: backbone.init(TINY, jax.random.key(0))))[0]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes)


def run(values, s=GREEDY, prompts=PROMPTS, lengths=LENGTHS, seeds=(0, 1, 2), c=TINY, **how):
    made = jax.jit(lambda v, p, n, seeds: generate(c, v, Prompts(p, n), seeds, s, **how))
    return jax.tree.map(np.asarray, made(values, prompts, lengths, jnp.asarray(seeds)))


LONGEST = 12


@jax.jit
def all_logits(values, ids):
    positions = np.arange(LONGEST, dtype=np.int32)[None]
    model = backbone.Backbone(TINY)
    return model.apply({"params": values}, ids, positions, spans.causal(LONGEST), method="everything")[0]


def next_logits(values, ids):
    """Of the whole sequence, without a cache. What fills it up lies behind and is not seen."""
    return np.asarray(all_logits(values, np.array([[*ids, *[0] * (LONGEST - len(ids))]], np.int32))[len(ids) - 1])


def test_greedy_tokens_are_those_of_the_full_forward(values):
    out = run(values)
    for prompt, length, tokens in zip(PROMPTS, LENGTHS, out.tokens_BN, strict=True):
        ids = list(prompt[:length])
        for token in tokens:
            assert token == np.argmax(next_logits(values, ids))
            ids.append(token)
    np.testing.assert_array_equal(out.lengths_B, 6)


def test_a_row_does_not_depend_on_its_batch(values):
    s = replace(GREEDY, temperature=1.0, top_k=9, top_p=0.95, min_p=0.01)
    together = run(values, s)
    alone = run(values, s, PROMPTS[1:2, :3], LENGTHS[1:2], (1,))
    np.testing.assert_array_equal(alone.tokens_BN[0], together.tokens_BN[1])
    assert (run(values, s, seeds=(5, 6, 7)).tokens_BN != together.tokens_BN).any()


def test_stop_ends_a_row_and_the_others_go_on(values):
    free = run(values).tokens_BN
    stop = int(free[0, 2])
    out = run(values, stop=(stop,), pad=23)
    for row, expected, length in zip(out.tokens_BN, free, out.lengths_B, strict=True):
        ends = np.flatnonzero(expected == stop)
        assert length == (ends[0] + 1 if len(ends) else 6)
        np.testing.assert_array_equal(row[:length], expected[:length])
        np.testing.assert_array_equal(row[length:], 23)


@pytest.mark.parametrize("shared", [False, True])
def test_guidance_combines_both_prompts_at_every_token(values, shared):
    g = 2.5
    other = np.array([[7, 8]] if shared else [[7, 8], [8, 0], [7, 1]], np.int32)
    lengths = np.array([2] if shared else [2, 1, 2], np.int32)
    out = run(values, replace(GREEDY, guidance=g), unconditional=Prompts(other, lengths))
    for i, tokens in enumerate(out.tokens_BN):
        j = 0 if shared else i
        given, empty = list(PROMPTS[i, : LENGTHS[i]]), list(other[j, : lengths[j]])
        for token in tokens:
            with_, without = next_logits(values, given), next_logits(values, empty)
            assert token == np.argmax(without + g * (with_ - without))
            given.append(token)
            empty.append(token)
    with pytest.raises(ValueError, match="unconditional"):
        run(values, replace(GREEDY, guidance=g))


def test_images_are_whole_and_codes_come_nowhere_else(values):
    """Ids: 0..15 text, 16 begin, 17 end, 18..23 codes. The prompts: before an image, in one, in text."""
    rule = WholeImages(vocab_size=24, begin=16, end=17, first_code=18, num_codes=6, codes=3)
    prompts = np.array([[3, 16, 0, 0], [16, 20, 0, 0], [16, 19, 19, 19]], np.int32)
    lengths = np.array([2, 2, 4], np.int32)
    s = settings.Sampling(tokens=40, temperature=3.0)
    out = run(values, s, prompts, lengths, constraint=rule)
    began = 0
    for prompt, length, tokens in zip(prompts, lengths, out.tokens_BN, strict=True):
        ids, images = [*prompt[:length], *tokens], 0
        while 16 in ids:
            text, ids = ids[: ids.index(16)], ids[ids.index(16) + 1 :]
            assert max(text, default=0) < 16
            image, ids = ids[:4], ids[4:]
            assert all(18 <= code < 24 for code in image[:3]) and image[3:] in ([], [17])
            images += 1
        assert max(ids, default=0) < 16
        began += images - 1
    assert began > 0  # images that the model began itself


def brute_force(logits, s):
    """Probabilities after the filters, by sorting lists."""
    p = np.exp(logits / s.temperature - np.max(logits / s.temperature))
    p /= p.sum()
    order = list(np.argsort(-p))
    if s.top_k:
        order = order[: s.top_k]
    p = np.array([x if i in order else 0 for i, x in enumerate(p)]) / p[order].sum()
    kept, mass = [], 0.0
    for i in order:
        if mass >= s.top_p:
            break
        kept.append(i)
        mass += p[i]
    p = np.array([x if i in kept else 0 for i, x in enumerate(p)]) / p[kept].sum()
    p = np.where(p >= s.min_p * p.max(), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "s",
    [
        settings.Sampling(temperature=0.7),
        settings.Sampling(top_k=3),
        settings.Sampling(top_p=0.6),
        settings.Sampling(min_p=0.3),
        settings.Sampling(temperature=1.5, top_k=6, top_p=0.8, min_p=0.2),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_filtered_distribution(s):
    draws = 4000
    logits = np.random.default_rng(0).normal(0, 1.5, 8).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), draws)
    ids = np.asarray(jax.jit(lambda x, k: sample(x, k, s))(np.tile(logits, (draws, 1)), keys))
    p = brute_force(logits, s)
    found = np.bincount(ids, minlength=8) / draws
    assert not found[p == 0].any()
    np.testing.assert_allclose(found, p, atol=4 * np.sqrt(0.25 / draws))  # four standard deviations


def test_one_prompt_alone_is_continued_as_among_others(values):
    s = replace(GREEDY, temperature=1.0)
    together, alone = run(values, s), run(values, s, PROMPTS[1:2], LENGTHS[1:2], seeds=(1,))
    np.testing.assert_array_equal(alone.tokens_BN, together.tokens_BN[1:2])
    assert alone.lengths_B.tolist() == together.lengths_B[1:2].tolist()


@pytest.mark.parametrize("prompts", [1, 3])
def test_the_loop_holds_no_copy_of_the_cache(values, prompts):
    text = (
        jax.jit(lambda v, p, n, seeds: generate(TINY, v, Prompts(p, n), seeds, GREEDY))
        .lower(values, PROMPTS[:prompts], LENGTHS[:prompts], jnp.arange(prompts))
        .compile()
        .as_text()
    )
    slots = PROMPTS.shape[1] + GREEDY.tokens
    cache = rf"f32\[{max(prompts, 2)},2,{slots},4\]"
    assert len(re.findall(rf"{cache}.* dynamic-update-slice\(", text)) >= 4  # keys and values of two layers
    assert not re.search(rf"f32\[(1,)?2,({slots},4|4,{slots})\]\S* copy\(", text)  # nor by another shape
    bodies = re.findall(r"body=%?([\w.-]+)", text)
    for body in bodies:
        inside = re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL).group()
        assert not re.search(rf"{cache}\S* copy\(", inside)
