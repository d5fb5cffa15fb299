"""Recall against a loop over rankings, and its closed forms; a model's against each image and caption by itself."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddt_jax import mesh, settings
from ddt_jax.data import images
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.scenes import ScenesSource
from ddt_jax.errors import UserError
from ddt_jax.evaluation import retrieval, tables
from ddt_jax.evaluation.retrieval import evaluate_retrieval, gallery, recall
from ddt_jax.tokenizers.caption_ids import CaptionIds
from ddt_jax.tokenizers.seed import SEED, Aligner
from tests.evaluation import two_processes

IMAGES, EACH = 30, 5
DATA = settings.Data(image_size=8)
WAYS = ("image_to_text", "text_to_image")
BY = ("by_embedding", "by_code", "by_shuffled_codes")


def by_loop(similarity, image, k, way):
    """Everything but the right answers is sorted before them where it is as near."""
    hits = []
    rows = similarity if way == "image_to_text" else similarity.T
    for number, row in enumerate(rows):
        right = image == number if way == "image_to_text" else np.arange(len(similarity)) == image[number]
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        hits.append(any(right[j] for j in order[:k]))
    return np.mean(hits)


def test_several_captions_an_image_and_ties(monkeypatch):
    monkeypatch.setattr(retrieval, "_ROWS", 7)  # 30 images are looked at in parts
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
    label_names = None
    name = "listed"

    def __init__(self, captions, pictures=()):
        self.captions, self.pictures = captions, pictures

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        if self.captions[index] is None:
            raise BadRecord("broken")
        caption = {"caption": self.captions[index]} if self.captions[index] else {}
        return caption | ({"image": self.pictures[index]} if self.pictures else {})


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
    results |= {"retrieval_texts": 100, "retrieval_split_images": 5000}
    assert tables.retrieval(results).startswith("Retrieval among 20 of 5,000 images and 100 captions; chance")


class Words:
    """A text tokenizer of 20 ids: a letter is one."""

    def encode(self, text):
        return [ord(letter) % 20 for letter in text]


class Colours(Aligner):
    """Knows an image by its colour, a caption by its letters, in whole numbers, so that sums are exact."""

    def __init__(self):
        self.config = SimpleNamespace(num_tokens=3)
        self.num_tokens, self.codebook_size = 3, 16

    def embed_images(self, params, extra, images_BHWC):
        return jnp.round((images_BHWC[:, 0, 0] + 1) * 127.5) @ params["image"]

    def embed_texts(self, params, ids_BL):
        return jnp.sum(jnp.where(ids_BL[..., None] >= 0, params["text"][ids_BL], 0), axis=1)


class Coded(Colours, SEED):
    """A code is a channel in sixteen steps; what codes give depends on their order."""

    def encode(self, params, extra, images_BHWC):
        return (jnp.round((images_BHWC[:, 0, 0] + 1) * 127.5) // 16).astype(jnp.int32)

    def embed_codes(self, params, extra, codes_BN):
        return codes_BN.astype(jnp.float32) @ params["image"]


_RNG = np.random.default_rng(5)
PARAMS = {name: _RNG.integers(-9, 10, (n, 4)).astype(np.float32) for name, n in (("image", 3), ("text", 20))}
CAPTIONS = CaptionIds(Words(), 6)


def splits(root, described):
    """Writes images with so many captions each, as Karpathy's file has them. Returns the source's spec."""
    rng, records = np.random.default_rng(0), []
    root.mkdir(exist_ok=True)
    for number, count in enumerate(described):
        name = f"{number}.png"
        Image.new("RGB", (9, 8), tuple(rng.integers(0, 256, 3).tolist())).save(root / name)
        said = ["".join(rng.choice(list("abcdefghijklmnopqrst"), 5)) for _ in range(count)]
        records.append({"split": "test", "filename": name, "sentences": [{"raw": text} for text in said]})
    (root / "splits.json").write_text(json.dumps({"images": records}))
    return f"karpathy:{root}/splits.json"


def karpathy_source(root):
    """Thirteen images: one of six captions, one of none, one that cannot be read, two of the same five."""
    spec, file = splits(root, [5, 5, 6, 5, 0, 5, 5, 5, 5, 5, 5, 5, 5]), root / "splits.json"
    tree = json.loads(file.read_text())
    tree["images"][9]["sentences"] = tree["images"][3]["sentences"]
    file.write_text(json.dumps(tree))
    (root / "7.png").write_bytes(b"no image")
    return open_source(spec)


def measured(model, source, count=100):
    devices = mesh.make_mesh(settings.Mesh())
    e = settings.Evaluate(images=count, batch_size=8)
    with jax.set_mesh(devices):
        return evaluate_retrieval(model, PARAMS, {}, source, DATA, e, CAPTIONS, mesh=devices)


def by_hand(source, count):
    """(similarities by BY, the image of each caption) of the images that can be read, one by one."""
    vectors, said, image, found = {by: [] for by in BY}, [], [], 0
    for index in range(min(count, len(source))):
        try:
            record = source[index]
            colour = images.prepare(record["image"], DATA)[0, 0].astype(int)
        except BadRecord:
            continue
        codes = colour // 16
        shuffled = codes[np.random.default_rng((0, index)).permutation(3)]
        for by, channels in zip(BY, (colour, codes, shuffled), strict=True):
            vectors[by].append(sum(n * row for n, row in zip(channels, PARAMS["image"], strict=True)))
        for caption in record.get("captions", []):
            said.append(sum(PARAMS["text"][ord(letter) % 20] for letter in caption))
            image.append(found)
        found += 1
    return {by: np.stack(rows) @ np.stack(said).T for by, rows in vectors.items()}, np.array(image)


@pytest.mark.parametrize("count", [100, 5])
def test_all_captions_of_all_images_are_compared(tmp_path, count):
    source = karpathy_source(tmp_path)
    results = measured(Coded(), source, count).results
    similarity, image = by_hand(source, count)
    assert results["retrieval"].keys() == set(BY)
    for by in BY:
        for way in WAYS:
            wanted = {str(k): by_loop(similarity[by], image, k, way) for k in (1, 5, 10)}
            assert results["retrieval"][by][way] == wanted, (by, way)
    counts = [results[f"retrieval_{name}"] for name in ("images", "texts", "split_images")]
    assert counts == ([12, 56, 13] if count == 100 else [5, 21, 13])
    assert results["retrieval_chance"] == 1 / counts[0]
    assert 0 < results["recall_mean_by_embedding"] < 1


def test_what_has_no_codes_is_measured_by_embedding(tmp_path):
    source = karpathy_source(tmp_path)
    found, of_codes = (measured(model, source).results["retrieval"] for model in (Colours(), Coded()))
    assert found == {"by_embedding": of_codes["by_embedding"]}


def test_one_caption_an_image_gives_what_it_gives_without_a_list(tmp_path):
    source = open_source(splits(tmp_path, [1] * 9))
    plain = Listed([source[i]["caption"] for i in range(9)], [source[i]["image"] for i in range(9)])
    of_list, of_one = (measured(Coded(), each).results for each in (source, plain))
    assert of_list == of_one and of_one["retrieval_images"] == 9 and "retrieval_texts" not in of_one


def test_what_cannot_be_compared_is_refused(tmp_path):
    spec = splits(tmp_path, [0, 0, 0, 2])
    with pytest.raises(UserError, match="a record of each caption, images are retrieved; leave out each=caption"):
        measured(Coded(), open_source(f"{spec}?each=caption"))
    with pytest.raises(UserError, match="none of the first 3 images of karpathy:.* has a caption"):
        measured(Coded(), open_source(spec), 3)


_PROCESS = """
import json, sys
from pathlib import Path
import jax

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[3]))  # before anything makes an array
import tests.evaluation.test_retrieval as t

source = t.open_source(f"karpathy:{sys.argv[2]}/splits.json")
print(json.dumps(t.measured(t.Coded(), source).results))
"""


@pytest.mark.slow
def test_two_processes_report_the_figures_of_one(tmp_path):
    source = karpathy_source(tmp_path)
    results = two_processes.results(_PROCESS, str(tmp_path), timeout=240)
    one = measured(Coded(), source).results
    assert results[0] == results[1] and results[0]["retrieval"] == one["retrieval"]
    assert results[0]["retrieval_texts"] == one["retrieval_texts"] == 56
