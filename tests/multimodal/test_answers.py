from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import documents, generate, sequence
from ddt_jax.multimodal.answers import Answerer, Call
from ddt_jax.multimodal.documents import Image
from ddt_jax.multimodal.model import Multimodal
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn import spans
from ddt_jax.nn.params import split

FORM = ImageForm("codes", 5)
VOCABULARY = Vocabulary.extend(40, 16)
GREEDY = settings.Sampling(tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def model():
    sizes = settings.Transformer(vocab_size=VOCABULARY.size, width=32, depth=2, heads=2, kv_heads=1, mlp_width=64)
    image = settings.CodeImages(num_tokens=FORM.rows, codebook_size=16)
    return Multimodal(settings.Multimodal(transformer=sizes, image=image))


@pytest.fixture(scope="module")
def params(model):
    # Larger than at initialisation, so that the likeliest token is clearly so.
    return jax.tree.map(lambda x: 5 * x, split(model.init(jax.random.key(3))[0])[0])


@pytest.fixture(scope="module")
def answerer(model, params):
    return Answerer(model, params, {}, VOCABULARY, FORM, context=64, batch=4)


def prompts(lengths):
    return [documents.text_to_image(np.arange(n) % 40, Image()) for n in lengths]


@pytest.fixture(scope="module")
def logits(model, params):
    """ids → logits of each of them, from the whole sequence at once, without a cache."""
    n = 32

    @jax.jit
    def run(ids):
        positions = jnp.arange(n, dtype=jnp.int32)[None]
        return model.module.apply({"params": params}, ids, positions, spans.causal(n), method="everything")[0]

    return lambda ids: np.asarray(run(np.array([ids + [0] * (n - len(ids))], np.int32)))[: len(ids)]


def test_pictures_are_the_likeliest_codes_one_after_another(answerer, logits):
    given = prompts([3, 20, 1, 9, 7])
    codes = answerer.images(given, GREEDY, range(5))
    assert codes.shape == (5, 5)
    for document, found in zip(given, codes, strict=True):
        ids = sequence.lay_out_prompt(document, VOCABULARY, FORM, force_image=True).tokens.tolist()
        for code in found:
            assert code == logits(ids)[-1, VOCABULARY.codes_start :].argmax()
            ids.append(VOCABULARY.codes_start + int(code))


def test_guidance_moves_away_from_what_comes_without_a_caption(answerer, logits):
    (document,) = prompts([4])
    codes = answerer.images([document], replace(GREEDY, guidance=3.0), [0])[0]
    ids = sequence.lay_out_prompt(document, VOCABULARY, FORM, force_image=True).tokens.tolist()
    empty = [VOCABULARY["BOS"], VOCABULARY["BOV"]]
    for code in codes:
        with_text, without = (logits(x)[-1, VOCABULARY.codes_start :] for x in (ids, empty))
        assert code == (without + 3 * (with_text - without)).argmax()
        ids.append(VOCABULARY.codes_start + int(code))
        empty.append(VOCABULARY.codes_start + int(code))


def test_an_answer_depends_on_prompt_and_seed_alone(answerer):
    drawn = replace(GREEDY, temperature=1.0)
    given = prompts([3, 6, 2, 4, 5])
    together = answerer.images(given, drawn, [7, 8, 9, 7, 8])
    np.testing.assert_array_equal(answerer.images(given[4:], drawn, [8])[0], together[4])
    assert (answerer.images(given[4:], drawn, [9])[0] != together[4]).any()


def test_free_images_are_the_likeliest_tokens_of_all(answerer, logits):
    (document,) = prompts([4])
    (call,) = answerer.image_calls([document], GREEDY, [0], free=True)
    drawn = np.asarray(call.run().tokens_BN)
    ids = sequence.lay_out_prompt(document, VOCABULARY, FORM, force_image=True).tokens.tolist()
    for token in drawn[0]:
        assert token == logits(ids)[-1].argmax()
        ids.append(int(token))
    assert drawn.shape[1] == FORM.rows + 1


def test_a_free_image_is_exactly_its_codes_and_then_the_end(answerer, monkeypatch):
    code, end = VOCABULARY.codes_start, VOCABULARY["EOV"]
    whole = [code, code + 15, code + 3, code + 3, code + 1]
    rows = {
        "right": [*whole, end],
        "one code too many": [*whole, code],
        "text behind it": [*whole, 7],
        "ends early": [*whole[:4], end, end],
        "text inside": [*whole[:2], 7, *whole[3:], end],
        "EOS": [VOCABULARY["EOS"]] * 6,
        "right again": [*whole[::-1], end],
    }
    parts = iter(np.array([*rows.values(), [*whole, end]], np.int32).reshape(2, 4, 6))
    monkeypatch.setattr(answerer, "_call", lambda *a: Call(lambda: generate.Generated(next(parts), None), ()))
    codes = answerer.images(prompts([3] * 7), GREEDY, range(7), free=True)
    found = dict(zip(rows, codes.tolist(), strict=True))
    assert found.pop("right") == [0, 15, 3, 3, 1] and found.pop("right again") == [1, 3, 3, 15, 0]
    assert set(map(tuple, found.values())) == {(-1,) * 5}


def test_texts_end_and_hold_text_only(answerer):
    given = [documents.image_to_text([], Image(np.arange(5))), documents.image_to_text([], Image(np.arange(5)[::-1]))]
    texts = answerer.texts(given, replace(GREEDY, tokens=12), [0, 1], lambda ids: ids.tolist())
    assert len(texts) == 2 and all(set(ids) <= set(range(40)) for ids in texts)


def test_how_long_a_text_may_be_is_a_matter_of_its_own_prompt(answerer):
    def asked(n):
        return documents.chat([("USER", [documents.Text(np.arange(n) % 40)]), ("ASSISTANT", [documents.Text([])])])

    def say(*given):
        return answerer.texts(given, replace(GREEDY, tokens=40), range(len(given)), lambda ids: ids.tolist())

    (alone,) = say(asked(3))
    beside, long = say(asked(3), asked(50))
    room = 64 - len(sequence.lay_out_prompt(asked(50), VOCABULARY, FORM))
    assert alone == beside and len(long) <= room < len(alone)  # nothing here has learned to end


def test_texts_and_images_in_turns_are_those_that_a_row_holds(answerer, monkeypatch):
    first, end = VOCABULARY.codes_start, VOCABULARY["EOV"]
    codes = [first + n for n in (3, 1, 4, 1, 5)]
    rows = [
        [7, 8, VOCABULARY["BOV"], *codes, end, 9, VOCABULARY["BOV"], *codes[::-1], end, VOCABULARY["EOS"]],
        [7, VOCABULARY["BOV"], *codes, end, VOCABULARY["BOV"], *codes[:3]],  # and there was no more room
        [VOCABULARY["EOS"]],
    ]
    lengths = np.array([*map(len, rows), 1], np.int32)
    ids = np.array([row + [VOCABULARY["PAD"]] * (20 - len(row)) for row in [*rows, rows[2]]], np.int32)
    monkeypatch.setattr(answerer, "_call", lambda *a: Call(lambda: generate.Generated(ids, lengths), ()))
    told = answerer.both(prompts([3] * 3), GREEDY, range(3), lambda text: f"{text.tolist()}")
    assert [[part if isinstance(part, str) else part.tolist() for part in parts] for parts in told] == [
        ["[7, 8]", [3, 1, 4, 1, 5], "[9]", [5, 1, 4, 1, 3]],
        ["[7]", [3, 1, 4, 1, 5]],
        [],
    ]


def test_an_answer_may_begin_with_an_image_and_is_as_long_as_one_at_least(answerer):
    given = prompts([3, 9])
    told = answerer.both(given, replace(GREEDY, tokens=1), range(2), str, force_image=True)
    drawn = answerer.images(given, GREEDY, range(2))
    assert len(told) == 2
    for parts, codes in zip(told, drawn, strict=True):
        assert len(parts) == 1
        np.testing.assert_array_equal(parts[0], codes)


def test_a_few_prompts_do_not_cost_a_whole_batch(answerer):
    rows = [
        [len(call.arguments[3]) for call in answerer.image_calls(prompts([3] * n), GREEDY, range(n))]
        for n in (1, 2, 3, 4, 6)
    ]
    assert rows == [[2], [2], [4], [4], [4, 4]]


def test_the_kernel_that_takes_no_single_query_does_not_answer(model, params, answerer):
    splash = Multimodal(replace(model.config, transformer=replace(model.config.transformer, attention="splash")))
    other = Answerer(splash, params, {}, VOCABULARY, FORM, context=64, batch=4)
    given = prompts([3, 9])
    np.testing.assert_array_equal(other.images(given, GREEDY, [0, 1]), answerer.images(given, GREEDY, [0, 1]))


def test_what_does_not_fit_is_one_line(answerer):
    with pytest.raises(UserError, match="leaves no room for an answer"):
        answerer.images(prompts([60]), GREEDY, [0])
    with pytest.raises(UserError, match="is not an image code"):
        answerer.texts([documents.image_to_text([], Image(np.full(5, 99)))], GREEDY, [0], str)
    with pytest.raises(UserError, match="tokens=0"):
        answerer.texts(prompts([2]), replace(GREEDY, tokens=0), [0], str)
