"""CIDEr-D against values by hand, and against the program of its authors."""

import math

import numpy as np
import pytest

from ddt_jax.evaluation.cider import cider_d, words

SAID = ["a cat sits on the mat .", "two dogs run", "red red red bus", "nothing of that", "train"]
PEOPLE = [
    ["A cat sat on the mat.", "there is a cat on a mat"],
    ["two dogs run over the grass", "dogs run", "a dog and another dog"],
    ["a red bus stands in the red street", "the bus is red"],
    ["a bowl of fruit"],
    ["train", "a train on the rails"],
]


def scored(said, people):
    return cider_d([words(s) for s in said], [[words(s) for s in of_image] for of_image in people])


def test_captions_that_are_a_reference_have_ten():
    said = ["a cat sits on the mat", "two dogs run over grass"]
    np.testing.assert_allclose(scored(said, [[s] for s in said]), 10)
    np.testing.assert_allclose(scored(said, [[s, "b c d e f"] for s in said]), 5)


def test_it_is_the_formula_by_hand():
    """Two images, so log(2 / 1) weighs what one of them has, and what both have is worth nothing."""
    got = scored(["a b", "x y z"], [["a b b c"], ["x y"]])
    # First: 1-grams a, b | a, b twice, c: clipped dot 1 + 1 x 2, norms sqrt 2, sqrt 6; 2-grams ab | ab, bb, bc.
    first = ((1 + 2) / math.sqrt(2 * 6) + 1 / math.sqrt(1 * 3)) / 4 * math.exp(-4 / 72)
    second = (2 / math.sqrt(3 * 2) + 1 / math.sqrt(2 * 1)) / 4 * math.exp(-1 / 72)
    np.testing.assert_allclose(got, [10 * first, 10 * second], rtol=1e-12)


def test_what_is_said_too_often_counts_once():
    people = [["red bus"], ["a b"]]
    once, often = scored(["red bus", "a"], people)[0], scored(["red red red bus", "a"], people)[0]
    # 1-grams red three times, bus: clipped dot 1 + 1; 2-grams red red twice, red bus.
    expected = ((1 + 1) / math.sqrt(10 * 2) + 1 / math.sqrt(5)) / 4 * math.exp(-4 / 72)
    assert once == pytest.approx(5) and often == pytest.approx(10 * expected)  # two words have no 3-grams


def test_words_are_those_of_the_penn_treebank():
    said = " ".join(words("A man's dog isn't here; it can't, and cannot, (yet)!"))
    assert said == "a man 's dog is n't here it ca n't and can not yet"
    assert words('black-and-white "T.V." & 50% off...') == ["black-and-white", "t.v", "&", "50", "%", "off"]


def test_an_image_needs_references():
    with pytest.raises(ValueError, match="2 captions, 2 images, 1 with references"):
        cider_d([["a"], ["b"]], [[["a"]], []])


@pytest.mark.slow
def test_it_is_what_the_authors_program_says(oracle):
    scorer = oracle("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    for said, people in zip(SAID, PEOPLE, strict=True):
        scorer += (" ".join(words(said)), [" ".join(words(s)) for s in people])
    mean, each = scorer.compute_score()
    got = scored(SAID, PEOPLE)
    assert got[0] > 1 and got[3] < got[0] and len(set(got)) == 5
    np.testing.assert_allclose(got, each, rtol=1e-12)
    assert got.mean() == pytest.approx(mean)
