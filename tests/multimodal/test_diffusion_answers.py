"""Answers in pictures and text: what they depend on, and what does not fit."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import documents
from ddt_jax.multimodal.diffusion_answers import DiffusionAnswerer
from ddt_jax.multimodal.diffusion_model import PARAMS, DiffusionMultimodal
from ddt_jax.multimodal.documents import Image, Text
from tests.multimodal.test_diffusion_model import ROWS, TRANSFORMER, S, V, compiled, given, make_batch, pictures, state

GREEDY = settings.Sampling(tokens=6, temperature=0.0, guidance=3.0)
FREE = settings.Sampling(tokens=40, guidance=2.0)


@pytest.fixture(scope="module")
def made():
    image = settings.DiffusionImages(patch_size=4, diffusion=settings.DDPM(prediction="velocity", solver_steps=3))
    model = DiffusionMultimodal(settings.Multimodal(transformer=TRANSFORMER, image=image), 8)
    params, extra = state(model, 1)
    coder = params.pop(PARAMS)
    params = jax.tree.map(lambda x: 2 * x, params)  # so that what stands before an image matters to it
    return model, params | {PARAMS: coder}, extra


@pytest.fixture(scope="module")
def answerer(made):
    model, params, extra = made
    return DiffusionAnswerer(model, params, extra, V, model.form, context=S, batch=4)


def prompts(lengths):
    return [documents.text_to_image(np.arange(n) % 30, Image()) for n in lengths]


def test_a_picture_depends_on_its_prompt_and_seed_alone(answerer):
    asked, told = prompts([3, 20, 1, 9, 7]), []
    drawn = answerer.images(asked, GREEDY, [7, 8, 9, 7, 8], told.append)
    assert drawn.shape == (5, 8, 8, 3) and drawn.dtype == np.uint8 and told == [4, 5]
    (alone,) = answerer.images(asked[4:], GREEDY, [8])
    np.testing.assert_allclose(alone.astype(int), drawn[4], atol=1)
    for other in (answerer.images(asked[4:], GREEDY, [9]), answerer.images(prompts([6]), GREEDY, [8])):
        assert np.abs(other[0].astype(int) - drawn[4]).max() > 20
    (plain,) = answerer.images(asked[4:], replace(GREEDY, guidance=1.0), [8])
    assert np.abs(plain.astype(int) - drawn[4]).max() > 20


def test_texts_are_the_likeliest_behind_the_picture_as_it_is(answerer, made):
    """Against the whole forward pass: no other word has a smaller loss."""
    model, params, extra = made
    shown = pictures(np.random.default_rng(0), 3)
    texts = answerer.texts([documents.image_to_text([], p) for p in shown], GREEDY, range(3), list)
    assert all(len(text) <= 6 for text in texts) and max(map(len, texts)) > 1
    for picture, text in zip(shown, texts, strict=True):
        batch = make_batch(model, [[documents.image_to_text(np.append(text[:1], w), picture)] for w in range(30)])
        nll = np.asarray(compiled(model, "score")(params, extra, given(model, batch))[1].nll)
        if len(text) > 1:  # targets: BOV, the first word, the second one, EOS
            assert nll[:, 2].argmin() == text[1]


def test_what_is_written_and_drawn_in_turns_is_what_each_row_makes_alone(answerer):
    asked, seeds = [documents.text_only([])] * 4, [4, 5, 6, 7]
    together = answerer.both(asked, FREE, seeds, list)
    kinds = [["picture" if isinstance(p, np.ndarray) else "text" for p in parts] for parts in together]
    assert len({tuple(k) for k in kinds}) > 1 and any(k.count("picture") > 1 for k in kinds), kinds
    for document, seed, parts in zip(asked, seeds, together, strict=True):
        (alone,) = answerer.both([document], FREE, [seed], list)
        assert len(alone) == len(parts)
        for a, b in zip(alone, parts, strict=True):
            if isinstance(a, np.ndarray):
                np.testing.assert_allclose(a.astype(int), b, atol=1)
            else:
                assert a == b
    assert all(sum(ROWS + 2 if isinstance(p, np.ndarray) else len(p) for p in parts) < S for parts in together)


def test_an_image_can_be_asked_for_where_an_answer_begins(answerer):
    asked = prompts([3, 5])
    forced = answerer.both(asked, FREE, [1, 2], list, force_image=True)
    drawn = answerer.images(asked, FREE, [1, 2])
    for parts, picture in zip(forced, drawn, strict=True):
        np.testing.assert_allclose(parts[0].astype(int), picture, atol=1)


def test_what_does_not_fit_is_one_line(answerer):
    with pytest.raises(UserError, match="leaves no room for an answer"):
        answerer.images(prompts([S - 3]), GREEDY, [0])
    with pytest.raises(UserError, match="tokens=0"):
        answerer.texts(prompts([2]), replace(GREEDY, tokens=0), [0], str)
    with pytest.raises(UserError, match="an image of shape"):
        answerer.texts([documents.image_to_text([], Image(np.zeros((4, 4, 3), np.uint8)))], GREEDY, [0], str)
    assert answerer.images([], GREEDY, []).shape == (0, 8, 8, 3) and answerer.texts([], GREEDY, [], str) == []


def test_three_programs_serve_prompts_of_all_kinds(made):
    model, params, extra = made
    answerer = DiffusionAnswerer(model, params, extra, V, model.form, context=S, batch=2)
    first, second, third = pictures(np.random.default_rng(1), 3)
    for document in (
        documents.text_to_image([1, 2], first),
        documents.question_answering([second], [3], [4]),
        documents.chat([("USER", [Text([5, 1]), third]), ("ASSISTANT", [Text([2])])]),
    ):
        answerer.both([document, document], FREE, [1, 2], list, force_image=True)
    programs = (answerer._prefill, answerer._write, answerer._draw)
    assert [program._cache_size() for program in programs] == [1, 1, 1]
