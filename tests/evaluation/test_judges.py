"""Each judge against the figure computed by hand from the same images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.evaluation import frechet, judges
from ddt_jax.evaluation.judge import Seen
from ddt_jax.nn import inception, lpips
from tests.nn.test_lpips import weights as lpips_weights

MESH = meshes.make_mesh(settings.Mesh(), jax.devices()[:1])


def seen(n=6, size=32, valid=None, seed=0, codes=None):
    """A batch whose reconstruction is darker."""
    image = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    decoded = (image * 0.8).astype(np.uint8)
    valid = np.ones(n, bool) if valid is None else np.array(valid, bool)
    codes = np.zeros((n, 3), np.int32) if codes is None else codes
    on_device = (jnp.asarray(image), jnp.asarray(decoded))
    return Seen(image, decoded, on_device, np.asarray, codes, 100 + np.arange(n), valid)


def test_lpips_is_that_of_the_8_bit_images():
    params, batch = lpips.from_torch("alexnet", *lpips_weights("alexnet")), seen(2)
    judge = judges.LPIPS(params, "alexnet", MESH)
    found = judge.see(batch)["lpips"]
    a, b = (x.astype(np.float32) / 127.5 - 1 for x in (batch.image_BHWC, batch.decoded_BHWC))
    expected = jax.jit(functools.partial(lpips.distance, backbone="alexnet"))(params, a, b)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.min() > 0 and judge.results() == {}


@pytest.fixture
def brightness(monkeypatch):
    """Stands for Inception's features: a mean colour. It counts how often it was traced for each number of rows."""
    monkeypatch.setattr(inception, "FEATURES", 3)
    monkeypatch.setattr(inception, "features", lambda params, x: x.mean((1, 2)) * params["scale"])
    return {"scale": np.float32(2)}


def test_rfid_is_the_distance_between_features_of_valid_images(brightness):
    kept, batches = [], [seen(seed=1), seen(valid=[1, 0, 1, 1, 1, 0], seed=2), seen(valid=[0] * 6, seed=3)]
    judge = judges.RFID(brightness, MESH, None, kept.append)
    assert all(judge.see(batch) == {} for batch in batches)
    results = judge.results()
    sets = [
        frechet.Moments.of(np.concatenate([2 * getattr(b, name)[b.valid_B].mean((1, 2)) for b in batches]))
        for name in ("image_BHWC", "decoded_BHWC")
    ]
    assert results == {"rfid": pytest.approx(frechet.distance(*sets), rel=1e-5), "rfid_images": 10}
    assert results["rfid"] > 1
    np.testing.assert_allclose(kept[0].mean, sets[0].mean, rtol=1e-6)


def test_known_features_of_the_originals_are_not_computed_again(brightness):
    batch, known = seen(), frechet.Moments.of(np.random.default_rng(0).normal(size=(9, 3)))
    judge = judges.RFID(brightness, MESH, known, lambda moments: pytest.fail("they were known"))
    judge.see(batch)
    decoded = frechet.Moments.of(2 * batch.decoded_BHWC.mean((1, 2)))
    assert judge.results()["rfid"] == pytest.approx(frechet.distance(known, decoded), rel=1e-5)
    assert judge._features._cache_size() == 1  # one shape, and it ran for the reconstructions alone


def test_saved_pairs_read_back_bit_by_bit_and_are_never_mixed_with_others(tmp_path):
    batch = seen(3, valid=[1, 0, 1])
    judges.SavedImages(str(tmp_path / "out")).see(batch)
    for folder, images in (("originals", batch.image_BHWC), ("reconstructions", batch.decoded_BHWC)):
        files = sorted((tmp_path / "out" / folder).iterdir())
        assert [f.name for f in files] == ["00000100.png", "00000102.png"]
        for file, image in zip(files, images[batch.valid_B], strict=True):
            with Image.open(file) as saved:
                np.testing.assert_array_equal(np.asarray(saved), image)
    with pytest.raises(UserError, match="holds images already"):
        judges.SavedImages(str(tmp_path / "out"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        judges.SavedImages(str(tmp_path / "file")).see(batch)


def thirds(codes_BK, index_B):
    """Token k is the brightness of the k-th third of the rows of a 12 x 12 image."""
    return np.repeat(np.asarray(codes_BK, np.uint8), 4, axis=1)[:, :, None, None] * np.ones((1, 1, 12, 3), np.uint8)


def test_a_third_of_the_tokens_is_taken_from_the_next_image():
    codes = np.array([[10, 10, 10], [7, 7, 7], [200, 200, 200], [90, 90, 90]], np.int32)
    batch = seen(4, 12, valid=[1, 0, 1, 1], codes=codes)._replace(decoded_BHWC=thirds(codes, None))
    asked = []

    def decode(codes_BK, index_B):
        asked.append((codes_BK.tolist(), index_B.tolist()))
        return thirds(codes_BK, index_B)

    judge = judges.Counterfactuals(decode, [2, 1, 0], pairs=2)  # the last token is the coarsest
    judge.see(batch)
    judge.see(seen(4, 12, seed=9))  # only the first batch counts
    results = judge.results()
    # B of the valid rows 0, 2, 3 is 2, 3, 0; the row of padding stays as it is.
    assert asked[0] == ([[200] * 3, [7] * 3, [90] * 3, [10] * 3], [100, 101, 102, 103])
    assert asked[1][0] == [[10, 10, 200], [7, 7, 7], [200, 200, 90], [90, 90, 10]]
    assert asked[3][0] == [[200, 10, 10], [7, 7, 7], [90, 200, 200], [10, 90, 90]]
    assert results == {"counterfactual_nearer_b": {"first": 0.0, "middle": 0.0, "last": 0.0}}
    picture = judge.picture()
    assert picture.dtype == np.uint8 and picture.shape[0] > 7 * 96 and picture.shape[1] > 2 * 96


def test_what_decides_the_image_makes_it_nearer_to_b():
    codes = np.array([[10, 1, 1], [200, 2, 2]], np.int32)

    def decode(codes_BK, index_B):
        return np.asarray(codes_BK)[:, :1, None, None].astype(np.uint8) * np.ones((1, 4, 4, 3), np.uint8)

    judge = judges.Counterfactuals(decode, range(3), pairs=2)
    judge.see(seen(2, 4, codes=codes)._replace(decoded_BHWC=decode(codes, None)))
    assert judge.results()["counterfactual_nearer_b"] == {"first": 1.0, "middle": 0.0, "last": 0.0}


def test_one_image_has_no_counterfactual():
    judge = judges.Counterfactuals(thirds, range(3), pairs=2)
    judge.see(seen(3, 12, valid=[0, 1, 0]))
    assert judge.results() == {} and judge.picture() is None
