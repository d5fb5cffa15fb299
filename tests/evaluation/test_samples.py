"""Samples keep their pictures, and the mark beside each is that of the verifier."""

import base64
import io
import json

import numpy as np
from PIL import Image

from ddt_jax.data.scenes import phrase, render, sample_scene
from ddt_jax.evaluation import samples

SCENES = [sample_scene("heldout", i) for i in range(2)]
PICTURES = np.stack([render(scene, 32) for scene in SCENES])
CAPTIONS = [phrase(scene.objects, 0) for scene in SCENES]


def test_marks_are_of_each_pair_by_itself():
    crossed = [CAPTIONS[0], CAPTIONS[0]]
    drawn = samples.drawn(PICTURES, crossed, np.ones(2, bool), verified=True)
    assert [(s.text, s.right) for s in drawn] == [(CAPTIONS[0], True), (CAPTIONS[0], False)]
    assert [s.right for s in samples.drawn(PICTURES, CAPTIONS, np.array([True, False]), verified=True)] == [True, False]
    said = samples.described(PICTURES, [CAPTIONS[0], "no scene"], CAPTIONS, verified=True)
    assert [(s.text, s.right) for s in said] == [(CAPTIONS[0], True), ("no scene", False)]
    assert samples.described(PICTURES, crossed, ["x", "y"], verified=False)[1].right is None


def test_small_pictures_are_kept_exactly_and_large_ones_small(tmp_path):
    path = samples.write(tmp_path / samples.FILE, {"text_to_image": [samples.Sample(PICTURES[0], "a", None)]})
    (kept,) = json.loads(path.read_text())["text_to_image"]
    assert (kept["text"], kept["right"]) == ("a", None)
    head, _, body = kept["picture"].partition(",")
    assert head == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))) == PICTURES[0]).all()
    assert samples.data_uri(np.zeros((256, 256, 3), np.uint8)).startswith("data:image/jpeg")
