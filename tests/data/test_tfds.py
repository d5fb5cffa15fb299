import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ddt_jax.data.base import open_source
from ddt_jax.data.images import decode
from ddt_jax.errors import UserError
from ddt_jax.settings import Data


def picture(i):
    return np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)


def png(i):
    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, "PNG")
    file.seek(0)  # a file object is taken as it is; an array would be encoded, by TensorFlow
    return file


F = tfds.features
SETS = {
    "encoded": (
        {"image": F.Image(shape=(None, None, 3)), "label": F.ClassLabel(names=["ant", "bee"]), "caption": F.Text()},
        lambda i: {"image": png(i), "label": i % 2, "caption": f" number {i}" if i else ""},
    ),
    "raw": (
        {"id": F.Scalar(np.int64), "pixels": F.Tensor(shape=(8, 8, 3), dtype=np.uint8)},
        lambda i: {"id": i, "pixels": picture(i)},
    ),
    "sound": ({"wave": F.Tensor(shape=(4,), dtype=np.float32)}, lambda i: {"wave": np.zeros(4, np.float32)}),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the sets above as `tfds build` leaves them."""
    folder = tmp_path_factory.mktemp("tfds")
    for name, (features, example) in SETS.items():

        class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self, features=features):
                return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))

            def _split_generators(self, manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self, example=example):
                for i in range(6):
                    yield i, example(i)

        Builder.name, Builder.__module__ = name, "fixture"  # of no package, whose folder it would search
        tfds.disable_progress_bar()
        Builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_encoded_images_stay_encoded(prepared):
    source = pickle.loads(pickle.dumps(open_source(f"tfds:encoded/train?data_dir={prepared}")))
    assert len(source) == 6 and source.label_names == ("ant", "bee")
    seen = set()
    for index in range(6):
        record = source[index]
        (number,) = [i for i in range(6) if np.array_equal(decode(record["image"], Data()), picture(i))]
        assert record["label"] == number % 2
        assert record.get("caption") == (f"number {number}" if number else None)
        seen.add(number)
    assert seen == set(range(6))
    assert source.describe(4) == "encoded/train example 4"


def test_pixel_arrays_and_a_part_of_a_split(prepared):
    source = open_source(f"tfds:raw:1.0.0/train[:4]?data_dir={prepared}&label=id")
    assert len(source) == 4
    for index in range(4):
        record = source[index]
        np.testing.assert_array_equal(record["image"], picture(record["label"]))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tfds:encodet/train", "did you mean encoded?"),
        ("tfds:encoded/test", "has no split test; it has train"),
        ("tfds:encoded", "names no split; write tfds:encoded/train"),
        ("tfds:sound/train", "has no image feature; it has wave (Tensor)"),
        ("tfds:qqqqqq/train", "tfds build qqqqqq --file_format=array_record"),
    ],
)
def test_what_is_missing_is_said(prepared, spec, words):
    with pytest.raises(UserError) as error:
        open_source(f"{spec}?data_dir={prepared}")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_tensorflow_is_not_imported(prepared):
    code = f"""
import sys
from ddt_jax.data.base import open_source
source = open_source("tfds:encoded/train?data_dir={prepared}")
source[0]
print("tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
