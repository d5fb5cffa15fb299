"""Layouts against written-out expectations and brute force: no function of the layout checks another one here."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_jax.errors import UserError
from ddt_jax.multimodal import documents
from ddt_jax.multimodal.documents import Document, Image, Mark, Text
from ddt_jax.multimodal.sequence import (
    ImageForm,
    lay_out,
    lay_out_prompt,
    pack_row,
    sizes,
    target_rows,
    unpack_row,
    visible_spans,
)
from ddt_jax.multimodal.vocabulary import Vocabulary

V = Vocabulary.extend(50, 30)
CODES = ImageForm("codes", 3)
DIFFUSION = ImageForm("diffusion", 4, shape=(2, 2))
BLOCKWISE = ImageForm("blockwise", 4, block=2, shape=(4,))
FORMS = [CODES, DIFFUSION, BLOCKWISE]


def image(*codes, number=0):
    return Image(np.array(codes), number)


def words(document, form=CODES):
    """The layout as text: predicted tokens are followed by an asterisk."""
    layout = lay_out(document, V, form)
    return " ".join(V.describe([t]) + "*" * bool(m) for t, m in zip(layout.tokens, layout.target, strict=True))


A, B = image(7, 8, 9), image(1, 2, 3, number=1)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (documents.text_to_image([4, 5], A), "BOS 4* 5* BOV* v7* v8* v9* EOV* EOS*"),
        (documents.image_to_text([4, 5], A), "BOS BOV* v7* v8* v9* EOV* 4* 5* EOS*"),
        (documents.text_only([4, 5]), "BOS 4* 5* EOS*"),
        (documents.image_only(A), "BOS BOV* v7* v8* v9* EOV* EOS*"),
        (
            documents.interleaved([Text([4]), A, Text([5]), B]),
            "BOS 4* BOV* v7* v8* v9* EOV* 5* BOV* v1* v2* v3* EOV* EOS*",
        ),
        (
            documents.editing([A], [4, 5], B),
            "BOS USER BOV v7 v8 v9 EOV 4 5 ASSISTANT BOV* v1* v2* v3* EOV* EOS*",
        ),
        (
            documents.question_answering([A], [4], [5, 6]),
            "BOS USER BOV v7 v8 v9 EOV 4 ASSISTANT 5* 6* EOS*",
        ),
        (
            documents.chat(
                [("USER", [Text([4])]), ("ASSISTANT", [Text([5])]), ("USER", [A]), ("ASSISTANT", [Text([6])])]
            ),
            "BOS USER 4 ASSISTANT 5* EOS* USER BOV v7 v8 v9 EOV ASSISTANT 6* EOS*",
        ),
    ],
)
def test_each_kind_of_document_reads_as_the_page_says(document, expected):
    assert words(document) == expected


@pytest.mark.parametrize(
    ("document", "force_image", "expected"),
    [
        (documents.text_to_image([4, 5], A), True, "BOS 4 5 BOV"),
        (documents.text_to_image([4, 5], A), False, "BOS 4 5"),
        (documents.text_to_image([], Image()), True, "BOS BOV"),
        (documents.image_to_text([], A), False, "BOS BOV v7 v8 v9 EOV"),
        (documents.editing([A], [4], Image()), True, "BOS USER BOV v7 v8 v9 EOV 4 ASSISTANT BOV"),
        (documents.text_only([]), False, "BOS"),
        (
            documents.chat(
                [("USER", [Text([4])]), ("ASSISTANT", [Text([5])]), ("USER", [Text([6])]), ("ASSISTANT", [])]
            ),
            False,
            "BOS USER 4 ASSISTANT 5 EOS USER 6 ASSISTANT",
        ),
    ],
)
def test_a_prompt_is_the_document_before_its_last_answer(document, force_image, expected):
    layout = lay_out_prompt(document, V, CODES, force_image=force_image)
    assert V.describe(layout.tokens) == expected and not layout.target.any()


def test_latents_stand_in_place_and_are_not_predicted_as_tokens():
    content = np.arange(4.0).reshape(2, 2)
    document = documents.text_to_image([4], Image(content))
    assert words(document, DIFFUSION) == "BOS 4* BOV* PAD PAD PAD PAD EOV EOS*"
    layout = lay_out(document, V, DIFFUSION)
    assert layout.slots == ((3, 4, 0, True, True, -1),)
    np.testing.assert_array_equal(layout.contents[0], content)


def test_noised_copies_follow_the_document_with_the_positions_of_their_twins():
    document = documents.interleaved([Image(np.zeros(4), 5), Text([4]), Image(np.ones(4), 6)])
    layout = lay_out(document, V, BLOCKWISE)
    body = "BOS BOV* PAD PAD PAD PAD EOV 4* BOV* PAD PAD PAD PAD EOV EOS*"
    assert words(document, BLOCKWISE) == body + " PAD" * 8
    assert layout.slots == ((2, 4, 5, True, True, 15), (9, 4, 6, True, True, 19))
    assert layout.position.tolist() == [*range(15), 2, 3, 4, 5, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (documents.text_to_image([4], Image()), [(True, True)]),
        (documents.image_to_text([4], Image()), [(True, False)]),
        (documents.image_only(Image()), [(True, True)]),
        (documents.editing([Image()], [1], Image()), [(False, False), (True, True)]),
        (documents.question_answering([Image()], [1], [2]), [(False, False)]),
    ],
)
def test_a_row_says_which_images_are_learned_and_which_are_answers(document, expected):
    row = pack_row([lay_out(document, V, DIFFUSION)], 20, 3, V["PAD"], DIFFUSION)
    found = list(zip(row["image_learn"].tolist(), row["image_answer"].tolist(), strict=True))
    assert found == expected + [(False, False)] * (3 - len(expected))


def test_an_image_that_is_only_given_gets_no_noised_copy():
    layout = lay_out(documents.editing([Image(np.zeros(4))], [1], Image(np.ones(4), 1)), V, BLOCKWISE)
    assert [(s.learn, s.copy >= 0) for s in layout.slots] == [(False, False), (True, True)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lay_out(documents.image_only(image(1, 2)), V, CODES), r"an image of \(2,\) codes among images of 3"),
        (lambda: lay_out(documents.image_only(image(1, 2, 30)), V, CODES), "30 is not an image code"),
        (lambda: lay_out(documents.text_only([50]), V, CODES), "50 is not a text id"),
        (lambda: lay_out(Document((Mark("BOX"),)), V, CODES), "BOX is not a special token; did you mean BOS?"),
        (lambda: lay_out(documents.image_only(Image(np.zeros(3))), V, DIFFUSION), r"shape \(3,\) among images of"),
        (lambda: documents.chat([("SYSTEM", [])]), "SYSTEM is not a role"),
        (lambda: documents.chat([("ASSISTANT", [])]), "a turn of ASSISTANT stands where USER is due"),
        (lambda: ImageForm("blockwise", 4, block=3), "blocks of 3 do not divide"),
        (lambda: lay_out_prompt(documents.text_only([1, 2]), V, CODES, context=1), "leaves no room for an answer of 1"),
        (
            lambda: lay_out_prompt(documents.text_to_image([1], A), V, CODES, force_image=True, context=6),
            "a prompt of 3 positions leaves no room for an answer of 4 in a context of 6",
        ),
        (lambda: documents.truncate_text(documents.image_only(A), 1), "images are never cut"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_prompt_that_just_fits_is_taken():
    assert len(lay_out_prompt(documents.text_to_image([1], A), V, CODES, force_image=True, context=7)) == 3


def test_only_text_is_cut_from_its_end():
    document = documents.interleaved([Text([1, 2]), A, Text([3, 4])])
    assert words(documents.truncate_text(document, 3)) == "BOS 1* BOV* v7* v8* v9* EOV* EOS"


def test_nothing_is_learned_of_where_a_text_was_cut():
    """It did not end there; where it did not begin to be cut, its end is learned."""
    assert words(documents.truncate_text(documents.text_only([1, 2, 3]), 1)) == "BOS 1* 2* EOS"
    assert words(documents.truncate_text(documents.text_to_image([1, 2], A), 1)) == "BOS 1* BOV* v7* v8* v9* EOV* EOS*"
    turns = documents.chat([("USER", [Text([1])]), ("ASSISTANT", [Text([2])])] * 2)
    assert words(documents.truncate_text(turns, 1)) == "BOS USER 1 ASSISTANT 2* EOS* USER 1 ASSISTANT EOS"


texts = st.lists(st.integers(0, 49), max_size=5).map(Text)


def parts(form):
    """Texts and images of a form; content is what tells images apart."""
    numbers = st.integers(0, 29)
    if form.kind == "codes":
        content = st.lists(numbers, min_size=form.rows, max_size=form.rows)
    else:
        content = numbers.map(lambda value: np.full(form.shape, value))
    return st.lists(st.one_of(texts, st.builds(Image, content, st.integers(0, 3))), max_size=4)


@st.composite
def rows(draw, form=None):
    form = form or draw(st.sampled_from(FORMS))
    chats = st.lists(st.tuples(parts(form), parts(form)), min_size=1, max_size=2).map(
        lambda turns: documents.chat([turn for u, a in turns for turn in (("USER", u), ("ASSISTANT", a))])
    )
    chosen = draw(st.lists(st.one_of(parts(form).map(documents.interleaved), chats), max_size=4))
    layouts = [lay_out(d, V, form) for d in chosen]
    spare = draw(st.integers(0, 3))
    images = sum(len(layout.slots) for layout in layouts)
    row = pack_row(layouts, sum(map(len, layouts)) + spare, images + draw(st.integers(0, 2)), V["PAD"], form)
    return form, chosen, layouts, row


@settings(deadline=None, max_examples=40)
@given(rows())
def test_unpacking_undoes_packing(case):
    _, _, layouts, row = case
    found = unpack_row(row)
    assert len(found) == len(layouts)
    for one, other in zip(found, layouts, strict=True):
        for name in ("tokens", "target", "position"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert one.slots == other.slots
        np.testing.assert_array_equal(one.contents, other.contents)


@settings(deadline=None, max_examples=40)
@given(rows())
def test_sizes_are_those_of_the_layout(case):
    form, chosen, layouts, _ = case
    found = sizes(np.array([documents.count(d) for d in chosen], int).reshape(-1, 6), form)
    assert found.tolist() == [[len(x), len(x.slots), x.target.sum()] for x in layouts]


@settings(deadline=None, max_examples=40)
@given(rows())
def test_the_loss_counts_exactly_what_is_specified(case):
    """Written anew, token by token, from the rules of the page."""
    form, chosen, _, row = case
    expected = []
    for document in chosen:
        wanted, tail = [], 0
        for segment in document.segments:
            counts = segment.answer or document.learn == "all"
            if isinstance(segment, Image):
                wanted += [counts]  # BOV
                wanted += [counts and form.kind == "codes"] * (form.rows + 1)  # the codes and EOV
                tail += form.rows if counts and form.kind == "blockwise" else 0
            else:
                wanted += [counts] * (len(segment.ids) if isinstance(segment, Text) else 1)
        wanted[0] = False  # nothing predicts BOS
        expected += wanted + [False] * tail
    expected += [False] * (len(row["target"]) - len(expected))
    assert row["target"].tolist() == expected
    rows_ = target_rows(row["target"], len(expected))
    assert rows_[rows_ >= 0].tolist() == [i - 1 for i, counts in enumerate(expected) if counts]


def brute_force_mask(chosen, form, context, whole_prompts):
    """Who sees whom, by asking of each pair of positions what they are."""
    places = []  # (document, clean index in the document, image, block in the image, is a noised copy)
    prompts = {}  # (document, clean index) → number of the prompt that it is in
    for d, document in enumerate(chosen):
        clean, tail = [], []
        for n, segment in enumerate(document.segments):
            length = form.rows + 2 if isinstance(segment, Image) else len(getattr(segment, "ids", [0]))
            answers = sum(s.answer and not (isinstance(s, Text) and not len(s.ids)) for s in document.segments[:n])
            if whole_prompts and not segment.answer:
                prompts |= {(d, len(clean) + i): answers for i in range(length)}
            if isinstance(segment, Image):
                clean.append((d, len(clean), None, None, False))
                for k in range(form.rows):
                    block = k // form.block if form.block else 0
                    if form.kind == "blockwise" and (document.learn == "all" or segment.answer):
                        tail.append((d, len(clean), n, block, True))
                    clean.append((d, len(clean), n, block, False))
                clean.append((d, len(clean), None, None, False))
            else:
                for _ in range(len(segment.ids) if isinstance(segment, Text) else 1):
                    clean.append((d, len(clean), None, None, False))
        places += clean + tail
    mask = np.zeros((context, context), bool)
    for q, (dq, iq, image_q, block_q, noised_q) in enumerate(places):
        for k, (dk, ik, image_k, block_k, noised_k) in enumerate(places):
            same_block = image_q is not None and (image_q, block_q) == (image_k, block_k)
            if dq != dk:
                sees = False
            elif noised_q:
                sees = same_block if noised_k else ik < iq and not same_block
            elif noised_k:
                sees = False
            else:
                asked = prompts.get((dq, iq))
                same_prompt = asked is not None and asked == prompts.get((dk, ik))
                sees = ik <= iq or (form.kind != "codes" and same_block) or same_prompt
            mask[q, k] = sees
    for q in range(len(places), context):
        mask[q, q] = True
    return mask


@settings(deadline=None, max_examples=40)
@given(rows())
def test_spans_are_the_mask_and_no_position_sees_another_document(case):
    form, chosen, _, row = case
    for whole_prompts in (False, True):
        found = visible_spans(row, form, whole_prompts=whole_prompts)
        start, end, start2, end2 = (x[:, None] for x in found)
        keys = np.arange(len(row["tokens"]))[None]
        mask = ((start <= keys) & (keys < end)) | ((start2 <= keys) & (keys < end2))
        np.testing.assert_array_equal(mask, brute_force_mask(chosen, form, len(row["tokens"]), whole_prompts))
        across = row["document"][:, None] != row["document"][None]
        assert not (mask & across).any()
        assert ((end <= start2) | (end2 <= start) | (end2 <= start2)).all(), "the two intervals are disjoint"
        if whole_prompts:  # an answer is never seen by what it answers
            assert not (mask & (row["given"] > 0)[:, None] & (row["given"] == 0)[None] & (keys > keys.T)).any()


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (documents.text_to_image([4, 5], A), [3, 3, 3, 0, 0, 0, 0, 0, 0]),
        (documents.image_to_text([4, 5], A), [6, 6, 6, 6, 6, 6, 0, 0, 0]),
        (documents.image_only(A), [1, 0, 0, 0, 0, 0, 0]),
        (
            documents.chat(
                [("USER", [Text([4])]), ("ASSISTANT", [Text([5])]), ("USER", [Text([6])]), ("ASSISTANT", [Text([7])])]
            ),
            [4, 4, 4, 4, 0, 0, 9, 9, 9, 0, 0],
        ),
    ],
)
def test_what_is_given_ends_where_an_answer_begins(document, expected):
    assert lay_out(document, V, CODES).given.tolist() == expected
    prompt = lay_out_prompt(document, V, CODES, force_image=False)
    assert prompt.given.tolist() == expected[: len(prompt)]  # as it was learned


def test_the_mark_that_asks_for_an_image_is_seen_by_no_caption():
    assert lay_out_prompt(documents.text_to_image([4], A), V, CODES, force_image=True).given.tolist() == [2, 2, 0]


def test_a_row_that_is_too_full_is_a_bug_of_ours():
    layout = lay_out(documents.image_only(A), V, CODES)
    for context, images in ((6, 1), (7, 0)):
        with pytest.raises(ValueError, match="in a row of"):
            pack_row([layout], context, images, 0, CODES)
    with pytest.raises(ValueError, match="capacity 1"):
        target_rows([False, True, True], 1)
