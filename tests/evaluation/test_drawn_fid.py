"""FID of drawn pictures, by hand from the same pictures, whether records hold pixels or codes."""

import dataclasses

import jax
import numpy as np
import pytest

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.data import scenes
from ddt_jax.data.codes import CodesWriter, Plan
from ddt_jax.errors import UserError
from ddt_jax.evaluation import asked, drawn_fid, frechet
from ddt_jax.nn import inception

N, SIZE = 11, 32
MESH = meshes.make_mesh(settings.Mesh(), jax.devices()[:1])
DATA = settings.Data(image_size=SIZE)
PICTURES = settings.Pictures(source="scenes:heldout", records=N)
DRAWN = np.random.default_rng(0).integers(0, 256, (N, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture
def brightness(monkeypatch):
    """Stands for Inception's features: a mean colour. It lists how many pictures it was given at once."""
    traced = []
    monkeypatch.setattr(inception, "features", lambda params, x: traced.append(len(x)) or x.mean((1, 2)) * params)
    return traced


def codes(folder):
    """Codes of the same scenes: of the even ones, and of one that has no caption."""
    plan = Plan("f" * 64, 4, 64, SIZE, "none", False, "scenes:heldout", N, N)
    writer = CodesWriter(str(folder), plan)
    record = {"codes": np.zeros((1, 4), np.int32)}
    kept = [record | {"index": i, "caption": f"scene {i}"} for i in range(0, N, 2)]
    writer.write(0, [record | {"index": 1}, *kept])
    writer.complete()
    return settings.CodesFolder(folder=str(folder))


def experiment(tmp_path, *parts, **evaluate):
    evaluate = {"batch_size": 4} | evaluate
    return settings.Experiment(
        data=dataclasses.replace(DATA, cache_dir=str(tmp_path / "cache")),
        sequences=settings.Sequences(eval_sources=parts),
        evaluate=settings.Evaluate(**evaluate),
    )


def make(s, digest="digest", data=DATA):
    return drawn_fid.DrawnFID(np.float32(2), digest, s, data, MESH)


def originals(indices):
    return np.stack([scenes.render(scenes.sample_scene("heldout", i)) for i in indices])


def by_hand(indices, drawn):
    return frechet.distance(*(frechet.Moments.of(2 * x.mean((1, 2))) for x in (originals(indices), drawn)))


def test_it_is_the_distance_to_the_pictures_that_the_captions_are_of(tmp_path, brightness):
    judge = make(experiment(tmp_path, PICTURES))
    assert len(judge.captions) == N
    found = judge.results(iter(DRAWN))
    assert found == {"t2i_fid": pytest.approx(by_hand(range(N), DRAWN), rel=1e-5), "t2i_fid_images": N}
    assert judge.results(iter(originals(range(N))))["t2i_fid"] == pytest.approx(0, abs=1e-3)
    assert brightness == [4]  # one program, for full batches and the last


def test_pictures_of_codes_come_from_where_the_codes_do(tmp_path, brightness):
    judge = make(experiment(tmp_path, codes(tmp_path / "codes")))
    assert judge.captions == [f"scene {i}" for i in range(0, N, 2)]
    found = judge.results(iter(DRAWN[::2]))["t2i_fid"]
    assert found == pytest.approx(by_hand(range(0, N, 2), DRAWN[::2]), rel=1e-5)


def test_captions_are_those_that_are_asked(tmp_path):
    s = experiment(tmp_path, PICTURES, codes(tmp_path / "codes"))
    expected = [record["caption"] for record in asked.captioned(s, 14)]
    assert [caption for caption, _ in asked.with_pictures(s, DATA, 14)] == expected and len(expected) == 14


def test_features_of_the_originals_are_computed_once_for_the_same_pictures_and_weights(
    tmp_path, brightness, monkeypatch
):
    s, kept = experiment(tmp_path, PICTURES), []
    keep = frechet.keep
    monkeypatch.setattr(frechet, "keep", lambda *a: kept.append(1) or keep(*a))
    first, again = (make(s).results(iter(DRAWN)) for _ in range(2))
    assert first == again and len(kept) == 1
    few = dataclasses.replace(s, evaluate=dataclasses.replace(s.evaluate, fid_images=5))
    assert make(few).results(iter(DRAWN[:5]))["t2i_fid_images"] == 5
    make(s, digest="other").results(iter(DRAWN))
    assert len(kept) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fid_images": 1}, "fid_images=1 must be two or more"),
        ({"fid_images": -1}, "fid_images=-1 must be two or more"),
        ({"gone": True}, "bring them back"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_is_drawn(
    tmp_path, brightness, change, message, monkeypatch
):
    part = codes(tmp_path / "codes")
    if change.pop("gone", False):
        monkeypatch.setattr(asked, "open_source", lambda *a, **k: [])
    with pytest.raises(UserError, match=message):
        make(experiment(tmp_path, part, **change))
    assert not brightness
