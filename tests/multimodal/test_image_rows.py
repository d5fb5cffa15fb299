"""Rows of images among those of text against loops over positions and the layout's own spans, on random layouts."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax.multimodal import documents, sequence
from ddt_jax.multimodal.documents import Image, Text
from ddt_jax.multimodal.image_rows import ImageRows
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn.attention import visible

V = Vocabulary.extend(50, 0)
FORM = ImageForm("diffusion", 4, shape=(2,))
S, IMAGES = 40, 5


def random_row(rng):
    """Documents of every kind until the row is full."""
    layouts = []
    while True:
        text, image = rng.integers(0, 50, rng.integers(0, 5)), Image(rng.normal(size=2))
        kinds = (
            documents.text_to_image(text, image),
            documents.image_to_text(text, image),
            documents.text_only(text),
            documents.interleaved([image, image, Text(text), image]),
            documents.editing([image], text, image),
        )
        new = [*layouts, sequence.lay_out(kinds[rng.integers(len(kinds))], V, FORM)]
        if sum(map(len, new)) > S or sum(len(x.slots) for x in new) > IMAGES:
            return sequence.pack_row(layouts, S, IMAGES, V["PAD"], FORM)
        layouts = new


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    made = [random_row(rng) for _ in range(60)]
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    assert {int((row["image_start"] >= 0).sum()) for row in made} >= {1, 3, 5}
    return made, batch


@pytest.mark.parametrize("whole_prompts", [False, True])
def test_spans_are_those_of_the_layout(rows, whole_prompts):
    made, batch = rows
    given = jnp.asarray(batch["given"]) if whole_prompts else None
    found = ImageRows(jnp.asarray(batch["image_start"]), FORM.rows).visible(jnp.asarray(batch["start"]), given)
    for i, row in enumerate(made):
        start, end, _, _ = sequence.visible_spans(row, FORM, whole_prompts=whole_prompts)
        np.testing.assert_array_equal(found.start[i], start)
        np.testing.assert_array_equal(found.end[i], end)
    if not whole_prompts:
        assert found.reach == FORM.rows - 1


def test_mask_is_that_of_the_paper(rows):
    """k <= q, or in the same image; and of the same document (§3)."""
    made, batch = rows
    mask = np.asarray(visible(ImageRows(jnp.asarray(batch["image_start"]), 4).visible(jnp.asarray(batch["start"])), S))
    for seen, row in zip(mask, made, strict=True):
        image_of = np.full(S, -1)
        for number, at in enumerate(row["image_start"]):
            if at >= 0:
                image_of[at : at + 4] = number
        for q in range(S):
            for k in range(S):
                same = row["document"][q] == row["document"][k] and row["document"][q] >= 0
                expected = same and (k <= q or (image_of[q] == image_of[k] >= 0))
                assert seen[q, k] == (expected or (q == k))


def test_patches_go_to_their_places_and_come_back(rows):
    made, batch = rows
    rng = np.random.default_rng(1)
    x, patches = rng.normal(size=(60, S, 3)), rng.normal(size=(60, IMAGES, 4, 3))
    images = ImageRows(jnp.asarray(batch["image_start"]), 4)
    put = np.asarray(images.put(jnp.asarray(x), jnp.asarray(patches)))
    expected = x.astype(np.float32).copy()
    for b, row in enumerate(made):
        for i, at in enumerate(row["image_start"]):
            if at >= 0:
                expected[b, at : at + 4] = patches[b, i]
    np.testing.assert_array_equal(put, expected)
    is_pad = batch["tokens"] == V["PAD"]
    np.testing.assert_array_equal((put != x.astype(np.float32)).any(-1), is_pad & (batch["document"] >= 0))
    taken = np.asarray(images.take(jnp.asarray(put)))
    used = batch["image_start"] >= 0
    np.testing.assert_array_equal(taken[used], patches.astype(np.float32)[used])


def test_an_image_at_the_very_end_of_a_row_fits():
    images = ImageRows(jnp.array([[2, -1]]), 4)
    put = images.put(jnp.zeros((1, 6, 1)), jnp.ones((1, 2, 4, 1)))
    np.testing.assert_array_equal(put[0, :, 0], [0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(images.take(put)[0, 0, :, 0], np.ones(4))
