import pickle

import numpy as np
import pytest

from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.pictures import PictureRecords, encoded_images, fields_of
from ddt_jax.errors import UserError
from ddt_jax.settings import Data

DATA = Data(flip=True, crop="random")


def test_a_record_is_an_image_with_its_caption_the_same_each_time():
    records, source = PictureRecords("scenes:train", DATA, 50), open_source("scenes:train")
    assert len(records) == 50 and records.num_codes == 0 and records.name == "scenes:train"
    for i in (0, 7, 49):
        found = records[i]
        assert found["caption"] == source[i]["caption"]
        (image,) = found["images"]
        np.testing.assert_array_equal(image, source[i]["image"])
        np.testing.assert_array_equal(records[i]["images"][0], image)  # neither flipped nor cropped at random
        assert records.without_images(i) == found | {"images": [None]}
    assert len(PictureRecords("scenes:heldout", DATA)) == 100_000
    assert pickle.loads(pickle.dumps(records))[3]["caption"] == records[3]["caption"]


def test_further_images_and_documents_come_along():
    record = {"image": b"a", "caption": "c", "label": 1, "meta": {"images": (b"b",), "parts": ["x", 1], "else": 0}}
    assert encoded_images(record) == (b"a", b"b")
    assert fields_of(record) == {"caption": "c", "label": 1, "parts": ["x", 1]}


def test_a_record_that_cannot_be_read_says_so():
    records = PictureRecords("scenes:train", DATA, 5)

    class Broken:
        def __getitem__(self, index):
            raise BadRecord("torn")

    records.source = Broken()
    with pytest.raises(BadRecord, match="torn"):
        records[0]


@pytest.mark.parametrize("count", [-1, 100_001])
def test_more_records_than_there_are_is_one_line(count):
    with pytest.raises(UserError, match="has 100,000 records, not records="):
        PictureRecords("scenes:heldout", DATA, count)
