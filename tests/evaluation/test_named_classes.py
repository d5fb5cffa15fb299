"""Pictures and captions of classes: what a classifier says is right, and what a caption names."""

import numpy as np
import pytest

from ddt_jax.errors import UserError
from ddt_jax.evaluation import compositional
from ddt_jax.evaluation.named_classes import NamedClasses

NAMES = ("airplane", "cat", "deer")
CAPTIONS = ["a photo of an airplane", "a photo of a cat", "a photo of a deer", "a photo of a cat"]


def pictures_of(*classes):
    """Each of one value, by which `judge` tells its class."""
    return np.stack([np.full((4, 4, 3), number, np.uint8) for number in classes])


@pytest.fixture
def judge():
    return NamedClasses(NAMES, lambda images_BSSC: images_BSSC[:, 0, 0, 0].astype(int))


def test_pictures_are_right_when_the_classifier_names_the_class_that_was_asked_for(judge):
    found = compositional.flat(judge.pictures(pictures_of(0, 1, 1, 1), CAPTIONS))
    assert found["t2i_all_correct"] == 0.75 and found["t2i_all_correct_n"] == 4
    assert found["t2i_all_correct_low"] < 0.75 < found["t2i_all_correct_high"]
    missing = judge.pictures(pictures_of(0, 1, 2, 1), CAPTIONS, np.array([True, False, True, True]))
    assert missing["t2i_all_correct"]["value"] == 0.75  # what is no picture shows nothing
    assert list(judge.real(pictures_of(0, 1, 2, 2), CAPTIONS)) == ["t2i_real_pictures"]
    assert not judge.pictures(np.zeros((0, 4, 4, 3), np.uint8), [])


def test_captions_are_right_when_they_are_that_of_the_class(judge):
    said = [CAPTIONS[0], "a photo of a deer", "a deer", CAPTIONS[3]]
    found = judge.captions(said, CAPTIONS)
    assert found["caption_all_correct"]["value"] == 0.5 and found["caption_parsed"]["value"] == 0.75


def test_what_cannot_be_judged_is_one_line(judge):
    with pytest.raises(UserError, match="caption 2 of 2, 'a red disc', names no class"):
        judge.pictures(pictures_of(0, 1), [CAPTIONS[0], "a red disc"])
    with pytest.raises(UserError, match="two classes of evaluate.classifier are called 'crane'"):
        NamedClasses(("crane", "cat", "crane"), len)
