"""Samples keep their pictures, and the mark beside each is that of the verifier."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from ddt_jax.data.scenes import phrase, render, sample_scene
from ddt_jax.evaluation import samples

SCENES = [sample_scene("heldout", i) for i in range(2)]
PICTURES = np.stack([render(scene, 32) for scene in SCENES])
CAPTIONS = [phrase(scene.objects, 0) for scene in SCENES]


def test_marks_are_kept_beside_picture_and_text():
    found = samples.of(PICTURES, CAPTIONS, [True, False])
    assert [(s.text, s.right) for s in found] == [(CAPTIONS[0], True), (CAPTIONS[1], False)]
    assert [s.right for s in samples.of(PICTURES, CAPTIONS)] == [None, None]
    with pytest.raises(ValueError, match="shorter"):
        samples.of(PICTURES, CAPTIONS, [True])


def test_small_pictures_are_kept_exactly_and_large_ones_small(tmp_path):
    path = samples.write(tmp_path / samples.FILE, {"text_to_image": [samples.Sample(PICTURES[0], "a", None)]})
    (kept,) = json.loads(path.read_text())["text_to_image"]
    assert (kept["text"], kept["right"]) == ("a", None)
    (again,) = samples.read(path)["text_to_image"]
    assert again[1:] == ("a", None) and (again.picture == PICTURES[0]).all()
    head, _, body = kept["picture"].partition(",")
    assert head == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))) == PICTURES[0]).all()
    assert samples.data_uri(np.zeros((256, 256, 3), np.uint8)).startswith("data:image/jpeg")
