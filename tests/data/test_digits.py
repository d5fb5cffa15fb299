import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddt_jax.data.base import open_source
from ddt_jax.errors import UserError


def test_both_parts_together_are_the_set_and_share_nothing():
    train, test = open_source("digits:train", image_size=8), open_source("digits:test", image_size=8)
    assert (len(train), len(test)) == (1437, 360)
    rows = [source.describe(i) for source in (train, test) for i in range(len(source))]
    assert sorted(rows) == sorted(f"digits row {i}" for i in range(1797))
    for source in (train, test):
        assert np.bincount([source[i]["label"] for i in range(len(source))], minlength=10).min() >= 20


@pytest.mark.parametrize("size", [8, 16, 32, 20])
def test_enlarged_without_smoothing(size):
    source = open_source("digits:test", image_size=size)
    digits = load_digits()
    for index in (0, 359):
        row = int(source.describe(index).split()[-1])
        record = source[index]
        assert record["image"].shape == (size, size, 3) and record["image"].dtype == np.uint8
        for y, x in [(0, 0), (size // 2, size // 3), (size - 1, size - 1)]:
            want = round(digits.images[row][y * 8 // size, x * 8 // size] * 255 / 16)
            assert record["image"][y, x].tolist() == [want] * 3
        assert record["label"] == digits.target[row]
        assert record["caption"] == f"a handwritten digit {source.label_names[record['label']]}"


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ddt-jax\[digits\]'"):
        open_source("digits:train")
