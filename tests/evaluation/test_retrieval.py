"""Recall against a loop over rankings, and its closed forms."""

import numpy as np
import pytest

from ddt_jax.data.base import BadRecord
from ddt_jax.data.scenes import ScenesSource
from ddt_jax.evaluation import tables
from ddt_jax.evaluation.retrieval import gallery, recall

IMAGES, EACH = 30, 5


def by_loop(similarity, image, k, way):
    """Everything but the right answers is sorted before them where it is as near."""
    hits = []
    rows = similarity if way == "image_to_text" else similarity.T
    for number, row in enumerate(rows):
        right = image == number if way == "image_to_text" else np.arange(IMAGES) == image[number]
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        hits.append(any(right[j] for j in order[:k]))
    return np.mean(hits)


def test_several_captions_an_image_and_ties():
    rng = np.random.default_rng(0)
    image = rng.permutation(np.repeat(np.arange(IMAGES), EACH))
    similarity = rng.normal(size=(IMAGES, IMAGES * EACH)) + 1.5 * (np.arange(IMAGES)[:, None] == image)
    similarity = similarity.round(1)  # ties are frequent
    found = recall(similarity, image)
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert found[way][str(k)] == by_loop(similarity, image, k, way)
    six = [*found["image_to_text"].values(), *found["text_to_image"].values()]
    np.testing.assert_allclose(found["mean"], np.mean(six))
    assert 0.1 < found["text_to_image"]["1"] < found["text_to_image"]["10"] < 1


def test_closed_forms():
    assert recall(np.eye(20))["mean"] == 1
    for nothing in (np.ones((20, 20)), np.full((20, 20), np.nan), np.where(np.eye(20) > 0, np.nan, 0.0)):
        assert recall(nothing)["mean"] == 0
    assert recall(np.ones((4, 4)), at=(4,))["mean"] == 1  # all of four
    shifted = recall(np.roll(np.eye(20), 1, axis=1) * 2 + np.eye(20))  # the right one is second
    assert shifted["image_to_text"] == shifted["text_to_image"] == {"1": 0.0, "5": 1.0, "10": 1.0}
    # An image that nobody has described finds nothing.
    assert recall(np.eye(4)[:, :3], np.arange(3))["image_to_text"]["1"] == 0.75


def test_what_is_no_number_counts_as_nearer():
    similarity = np.eye(3)
    similarity[0, 1] = np.nan
    found = recall(similarity)
    assert found["image_to_text"]["1"] == found["text_to_image"]["1"] == pytest.approx(2 / 3)


class Listed:
    name = "listed"

    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        if self.captions[index] is None:
            raise BadRecord("broken")
        return {"caption": self.captions[index]} if self.captions[index] else {}


def test_no_two_of_a_gallery_say_the_same():
    assert gallery(Listed(["a cat", "A  cat", None, "", "a dog", "a bird"]), 2) == [0, 4]
    source = ScenesSource("heldout")
    chosen = gallery(source, 300)
    keys = [source.scene(i).keys for i in chosen]
    assert len(set(keys)) == len(keys) == 300 < chosen[-1] + 1
    first = {source.scene(i).keys for i in range(chosen[-1] + 1)}
    assert first == set(keys)
    assert gallery(Listed(["", None]), 2) == gallery(Listed([""] * 1000 + ["a cat"]), 2) == []


def test_the_table_has_a_row_for_each_way_of_comparing():
    found = recall(np.eye(20))
    results = {"retrieval_images": 20, "retrieval_chance": 0.05, "retrieval": {"by_embedding": found, "by_code": found}}
    lines = tables.retrieval(results).splitlines()
    assert "| by code | 100.0% / 100.0% / 100.0% | 100.0% / 100.0% / 100.0% | 100.0% |" in lines
    assert "chance at 1 is 5.00%" in lines[0]
