from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from ddt_jax import settings
from ddt_jax.multimodal import code_embedding, documents, sequence
from ddt_jax.multimodal.answers import Answerer
from ddt_jax.multimodal.code_embedding import PARAMS, VECTORS, Places
from ddt_jax.multimodal.documents import Image
from ddt_jax.multimodal.model import Multimodal
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn import spans
from ddt_jax.nn.params import split

FORM = ImageForm("codes", 5)
VOCABULARY = Vocabulary.extend(40, 16)
GREEDY = settings.Sampling(tokens=6, temperature=0.0)


def make(tied=False, whole_prompts=False, **options):
    sizes = settings.Transformer(
        vocab_size=VOCABULARY.size, width=32, depth=2, heads=2, kv_heads=1, mlp_width=64, tied_head=tied
    )
    image = settings.CodeImages(num_tokens=FORM.rows, codebook_size=16, code_width=3, **options)
    return Multimodal(settings.Multimodal(transformer=sizes, image=image, whole_prompts=whole_prompts))


def state(model, seed=3):
    # Without the optimizations of a program that runs often.
    init = jax.jit(lambda: split(model.init(jax.random.key(seed)))[0])
    params, extra = init()
    # Larger than at initialisation, so that the likeliest token is clearly so.
    params = jax.tree.map(lambda x: 5 * np.asarray(x), params)
    if VECTORS in extra:
        vectors = np.random.default_rng(0).normal(size=(16, 3))
        extra = {VECTORS: jnp.asarray(np.pad(vectors, ((VOCABULARY.size - 16, 0), (0, 0))), jnp.float32)}
    return params, extra


def rows(tokens_BS):
    """A batch in which every position but the last is followed by a target."""
    tokens_BS = jnp.asarray(tokens_BS, jnp.int32)
    b, s = tokens_BS.shape
    count = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (b, s))
    return {"tokens": tokens_BS, "position": count, "start": jnp.zeros((b, s), jnp.int32), "rows": count[:, :-1]}


def logits_of(model, params, extra, tokens_1S, given_1S=None):
    """Of every position of whole sequences, by products of matrices that nobody has joined."""
    length, places = tokens_1S.shape[1], model.places(params, extra)
    visible = spans.causal(length) if given_1S is None else spans.bidirectional(given_1S)

    def everything(module):
        x, place = module.embed(tokens_1S), places.of(tokens_1S)
        for k in range(FORM.rows):
            added = jnp.broadcast_to(places.table_KD[k], x.shape)
            for other in range(FORM.rows if places.input_KLCD is not None else 0):
                ahead = other - k  # how many positions further on the other code stands
                at = jnp.clip(jnp.arange(length) + ahead, 0, length - 1)
                there = place[:, at] == other + 1
                sees = ahead <= 0 if given_1S is None else (ahead <= 0) | (given_1S > 0)
                seen = extra[VECTORS][tokens_1S[:, at]] @ params[PARAMS]["input"][k, other]
                added = added + jnp.where((there & sees)[..., None], seen, 0)
            x = x + jnp.where((place == k + 1)[..., None], added, 0)
        h = module(x, rows(tokens_1S)["position"], visible)[0]
        logits = module.logits(h)
        for k in range(FORM.rows if places.output_KCD is not None else 0):
            more = h @ params[PARAMS]["output"][k].T @ extra[VECTORS].T
            logits = logits + jnp.where((jnp.minimum(place, FORM.rows - 1) == k)[..., None], more, 0)
        return logits

    return model.module.apply({"params": model.all_params(params, extra)}, method=everything)


@examples(deadline=None)  # the first of a shape is compiled
@given(st.lists(st.booleans(), min_size=12, max_size=12), st.sampled_from([0, 1, 5, 12]))
def test_places_count_codes_in_a_row_at_once_or_one_by_one(is_code, cut):
    places, tokens = Places(np.zeros((4, 2)), 100), np.where(is_code, 105, 7)[None]
    expected, place = [], 0
    for code in is_code:
        place = place + 1 if code else 0
        expected.append(place)
    assert places.of(tokens).tolist() == [expected]
    first = places.of(tokens[:, :cut])
    before = first[:, -1] if first.size else 0
    assert np.concatenate([first, places.of(tokens[:, cut:], before)], axis=1).tolist() == [expected]


def test_each_code_of_an_image_has_its_own_embedding_and_text_has_none():
    places = Places(jnp.array([[1.0], [2.0], [3.0]]), 10)
    tokens = jnp.array([[1, 10, 11, 12, 13, 2, 15, 3]])
    added = places.add(jnp.zeros((1, 8, 1)), tokens, places.of(tokens))
    assert added[0, :, 0].tolist() == [0, 1, 2, 3, 0, 0, 1, 0]  # there is no fourth place


@pytest.mark.parametrize("whole", [False, True])
def test_a_code_sees_the_codes_of_its_own_image_and_later_ones_only_where_the_image_is_given(whole):
    model = make(code_vectors=True, code_places=True)
    params, extra = state(model)
    places, first = model.places(params, extra), VOCABULARY.codes_start
    image = np.array([VOCABULARY["BOV"], *range(first, first + FORM.rows), VOCABULARY["EOV"]])
    tokens = np.concatenate([[VOCABULARY["BOS"]], image, [5], image, image[:3]])[None].astype(np.int32)
    given = np.where((np.arange(tokens.shape[1]) > 8) & whole, 17, 0)[None]  # from the second image on
    added = jax.jit(lambda tokens: places.add(jnp.zeros((*tokens.shape, 32)), tokens, places.of(tokens), given))

    starts = {2: False, 10: whole, 17: whole}
    for at in (3, 11, 18):  # the second code of each image
        other = tokens.copy()
        other[0, at] += 7
        moved = np.flatnonzero(np.any(np.asarray(added(tokens)) != np.asarray(added(other)), axis=-1))
        start = at - 1
        end = min(start + FORM.rows, tokens.shape[1])
        assert moved.tolist() == list(range(start if starts[start] else at, end))


@pytest.fixture(scope="module")
def one_by_one():
    """(rows at once, rows cut after some tokens and gone on with): [1, 32] ids, and how many → what is added."""
    model = make(code_vectors=True, code_places=True)
    params, extra = state(model)
    places = model.places(params, extra)
    whole = jax.jit(lambda tokens: places.add(jnp.zeros((*tokens.shape, 32)), tokens, places.of(tokens)))
    ended = jax.jit(lambda tokens: places.written(tokens, places.of(tokens), jnp.float32))
    following = jax.jit(lambda token, written: places.add_next(jnp.zeros((1, 1, 32)), token, written))

    def cut_after(tokens, count):
        written, found = ended(np.roll(tokens, -count, axis=1)), []  # what is not yet there stands in front, as text
        for at in range(count, tokens.shape[1]):
            x, written = following(tokens[:, at : at + 1], written)
            found.append(x[0, 0])
        return found

    return whole, cut_after


@examples(deadline=None, max_examples=20)
@given(st.lists(st.booleans(), min_size=1, max_size=4), st.integers(1, 31))
def test_rows_one_token_at_a_time_are_the_whole_row(one_by_one, images, count):
    whole, cut_after = one_by_one
    first = VOCABULARY.codes_start + 3
    image = [VOCABULARY["BOV"], *range(first, first + FORM.rows), VOCABULARY["EOV"]]
    tokens = sum((image if is_image else [3, 4] for is_image in images), [])
    tokens = np.array([[5] * (32 - len(tokens)) + tokens], np.int32)
    np.testing.assert_allclose(cut_after(tokens, count), whole(tokens)[0, count:], atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_codes_that_are_alike_begin_alike_and_text_is_left_alone(tied):
    model = make(tied, code_vectors=True)
    params, extra = state(model)
    plain = model.all_params(params, extra)
    assert set(plain) == set(params) - {PARAMS}
    for name, part in (("embed", "input"),) if tied else (("embed", "input"), ("head", "output")):
        added = plain[name] - params[name]
        np.testing.assert_allclose(added, extra[VECTORS] @ params[PARAMS][part], atol=1e-6)
        assert not added[: VOCABULARY.codes_start].any() and added[VOCABULARY.codes_start :].any()


def test_gradients_reach_the_maps_and_not_the_vectors():
    model = make(code_vectors=True, code_places=True)
    params, extra = state(model)
    batch = rows(np.random.default_rng(1).integers(0, VOCABULARY.size, (2, 12))) | {"slot": jnp.arange(2)}
    loss = lambda params: model.loss_fn(params, extra, batch, jax.random.key(0))[0]["next_token"]  # noqa: E731
    for name, gradient in jax.jit(jax.grad(loss))(params)[PARAMS].items():
        assert jnp.abs(gradient).max() > 0, name


def test_the_loss_is_that_of_the_logits_of_each_place():
    model = make(code_vectors=True, code_places=True)
    params, extra = state(model)
    tokens = np.random.default_rng(1).integers(VOCABULARY.codes_start - 4, VOCABULARY.size, (2, 12))
    batch = rows(tokens) | {"slot": jnp.arange(2)}
    sums, counts, _ = jax.jit(model.loss_fn)(params, extra, batch, jax.random.key(0))
    logits = jax.jit(lambda tokens: logits_of(model, params, extra, tokens))(jnp.asarray(tokens))
    likely = jax.nn.log_softmax(logits)[:, :-1]
    expected = -jnp.take_along_axis(likely, tokens[:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(sums["next_token"] / counts["next_token"], expected, rtol=1e-5)


@pytest.mark.parametrize("whole_prompts", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_is_generated_is_what_the_whole_sequence_makes_likeliest(guidance, whole_prompts):
    model = make(code_vectors=True, code_places=True, whole_prompts=whole_prompts)
    params, extra = state(model)
    answerer = Answerer(model, params, extra, VOCABULARY, FORM, context=64, batch=3)
    asked = [documents.text_to_image(np.arange(n), Image()) for n in (3, 9, 1)]
    # An image before the one that is asked for: places begin anew.
    asked[2] = documents.interleaved([Image(np.arange(5)), *asked[2].segments[1:2], Image()])
    asked[2] = replace(asked[2], segments=tuple(replace(s, answer=i == 3) for i, s in enumerate(asked[2].segments)))
    codes = answerer.images(asked, replace(GREEDY, guidance=guidance), range(3))

    length, empty = 32, [VOCABULARY["BOS"], VOCABULARY["BOV"]]
    run = jax.jit(lambda tokens_1S, given_1S: logits_of(model, params, extra, tokens_1S, given_1S)[0])

    def logits(ids):
        # What is given is all in front of the last BOV: the answer's.
        prompt = len(ids) - 1 - ids[::-1].index(VOCABULARY["BOV"])
        given = np.where(np.arange(length) < prompt, prompt, 0)[None] * whole_prompts
        return run(jnp.array([ids + [0] * (length - len(ids))]), given)[len(ids) - 1, VOCABULARY.codes_start :]

    for document, found in zip(asked, codes, strict=True):
        ids = sequence.lay_out_prompt(document, VOCABULARY, FORM, force_image=True).tokens.tolist()
        for n, code in enumerate(found):
            done = [VOCABULARY.codes_start + int(c) for c in found[:n]]
            with_text, without = logits(ids + done), logits(empty + done)
            assert code == (without + guidance * (with_text - without)).argmax()


def test_what_is_not_asked_for_costs_nothing():
    params, extra = jax.eval_shape(make().init, jax.random.key(0))
    assert PARAMS not in params and not extra
    assert code_embedding.places({}, {}, 3) is None
