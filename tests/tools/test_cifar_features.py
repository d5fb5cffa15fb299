"""tools/cifar_features.py learns classes, and tells reconstructions that keep them from others."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from ddt_jax import config
from ddt_jax.evaluation import pictures

ROOT = Path(__file__).resolve().parents[2]
N = 64


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("cifar_features")


@pytest.mark.slow
def test_the_distance_grows_as_pictures_lose_what_they_show(tool, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, N)
    colours = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40]])
    images = np.clip(colours[labels][:, None, None] + rng.normal(0, 30, (N, 32, 32, 3)), 0, 255).astype(np.uint8)
    monkeypatch.setattr(tool, "load", lambda spec, s, most=0: (images[: most or N], labels[: most or N]))
    monkeypatch.setattr(tool, "BATCH", 16)
    s, found = config.load(str(ROOT / "configs" / "smoke.py")), {}
    for name, decoded in {"kept": images, "grey": np.full_like(images, 127)}.items():
        for i in range(N):
            pictures.save_png(images[i], tmp_path / name / "originals" / f"{i:08}.png")
            pictures.save_png(decoded[i], tmp_path / name / "reconstructions" / f"{i:08}.png")
        found[name] = tool.compare(s, tmp_path / name, epochs=10, width=16, dtype="float32")
    assert found["kept"]["images"] == N and found["kept"]["features"] == 64
    assert found["kept"]["accuracy"]["originals"] == found["kept"]["accuracy"]["reconstructions"] > 0.9
    assert found["grey"]["accuracy"]["reconstructions"] < 0.6
    assert found["kept"]["frechet"] == pytest.approx(0, abs=1e-3)
    assert found["grey"]["frechet"] > found["kept"]["frechet_of_halves"] > 1e-3


def test_pictures_of_other_images_are_refused(tool, monkeypatch, tmp_path):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    for side in tool.SIDES:
        pictures.save_png(images[0] + 9, tmp_path / side / "00000000.png")
    monkeypatch.setattr(tool, "load", lambda spec, s, most=0: (images, np.zeros(2, int)))
    s = config.load(str(ROOT / "configs" / "smoke.py"))
    with pytest.raises(SystemExit, match="does not hold the first 1 images"):
        tool.compare(s, tmp_path, epochs=1)
    with pytest.raises(SystemExit, match="holds no PNG pairs; evaluate a run with"):
        tool.compare(s, tmp_path / "nowhere", epochs=1)
