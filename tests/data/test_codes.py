import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.codes import CodesSource, CodesWriter, Plan, read_images
from ddt_jax.errors import UserError
from ddt_jax.settings import Data

PLAN = Plan("ab" * 32, 3, 600, 8, "coarse_to_fine", False, "folder:x", 10, 4)


def records(of):
    for i in of:
        codes = np.full((1 + i % 2, 3), 50 * i)
        yield {"codes": codes, "index": i} | ({"caption": f"é {i}", "label": i} if i % 3 else {})


def write(folder, plan=PLAN, shards=(0, 1, 2)):
    writer = CodesWriter(folder, plan)
    for shard in shards:
        writer.write(shard, records(plan.shard_range(shard)))
    writer.complete()
    return writer


@pytest.mark.parametrize("codebook_size", [600, 70_000])
def test_what_is_written_comes_back(tmp_path, codebook_size):
    write(tmp_path / "c", replace(PLAN, codebook_size=codebook_size))
    source = pickle.loads(pickle.dumps(CodesSource(f"codes:{tmp_path}/c/")))
    assert len(source) == 10 and source.plan.order == "coarse_to_fine"
    for i, expected in enumerate(records(range(10))):
        found = source[i]
        np.testing.assert_array_equal(found.pop("codes"), expected.pop("codes"))
        assert found == expected
    assert source.describe(5) == "shard-00001.array_record record 1"
    assert source.records_before.tolist() == [0, 4, 8, 10]


def test_whole_shards_are_known_and_others_are_not(tmp_path):
    writer = write(tmp_path, shards=(0, 1))
    again = CodesWriter(tmp_path, PLAN)
    assert again.finished(0) == writer.finished(0) and again.finished(0).records == 4
    assert again.finished(2) is None and again.complete() is None
    path = tmp_path / "shard-00001.array_record"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert again.finished(1) is None
    (tmp_path / "shard-00000.json").write_text('{"name":')
    assert again.finished(0) is None


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    def interrupted():
        yield from records(range(2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CodesWriter(tmp_path, PLAN).write(0, interrupted())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def damage(path, text):
    path.write_text(text)


def spoilt(folder, **values):
    tree = json.loads((folder / "index.json").read_text())
    damage(folder / "index.json", json.dumps(tree | {"plan": tree["plan"] | values}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda p: CodesWriter(p, replace(PLAN, tokenizer="cd" * 32)),
            "made by tokenizer abababab….*cdcdcdcd….*another",
        ),
        (lambda p: CodesWriter(p, replace(PLAN, records=9)), "was begun with records=10, now it is 9"),
        (lambda p: CodesWriter("gs://b/c", PLAN), "gs://b/c is not a local folder"),
        (lambda p: CodesWriter("/proc/none", PLAN), "cannot write to /proc/none"),
        (lambda p: CodesSource(p / "none"), "none holds no codes; there is no folder"),
        (lambda p: CodesSource(p.parent), "holds no codes"),
        (lambda p: ((p / "index.json").unlink(), CodesSource(p)), r"not complete \(3 of 3 shards\); run the same"),
        (lambda p: (damage(p / "index.json", "{"), CodesSource(p)), "index.json is damaged"),
        (lambda p: (damage(p / "index.json", '{"plan": {"format": 7}}'), CodesSource(p)), "format 7"),
        (lambda p: (damage(p / "index.json", '{"plan": null}'), CodesSource(p)), "None in the place of a plan"),
        (lambda p: (spoilt(p, num_tokens=0), CodesSource(p)), "num_tokens=0"),
        (lambda p: (spoilt(p, records="10"), CodesSource(p)), "records='10'"),
        (lambda p: ((p / "shard-00001.array_record").unlink(), CodesSource(p)), "holds 0 records, its index says 4"),
        (lambda p: open_source(f"codes:{p}"), "holds codes, not images"),
    ],
)
def test_mistakes_are_one_line(tmp_path, spoil, message):
    write(tmp_path / "c")
    with pytest.raises(UserError, match=message) as error:
        spoil(tmp_path / "c")
    assert "\n" not in str(error.value)


def test_foreign_and_impossible_records_are_bad(tmp_path):
    write(tmp_path)
    writer = ArrayRecordWriter(str(tmp_path / "shard-00002.array_record"), "group_size:1")
    for data in (b"\xc1", b"\x81\xa5codes\xc4\x06\xff\xff\xff\xff\xff\xff"):
        writer.write(data)
    writer.close()
    source = CodesSource(tmp_path)
    for index in (8, 9):
        with pytest.raises(BadRecord):
            source[index]


@pytest.mark.parametrize("codes", [np.zeros((1, 4), int), np.full((1, 3), 600), np.full((1, 3), -1), np.zeros(3, int)])
def test_impossible_codes_are_a_bug_of_ours(tmp_path, codes):
    with pytest.raises(ValueError, match="codes"):
        CodesWriter(tmp_path, PLAN).write(0, [{"codes": codes}])


class Pictures:
    name, label_names = "pictures", None

    def __len__(self):
        return 7

    def __getitem__(self, i):
        if i == 3:
            raise BadRecord("truncated JPEG")
        image = np.full((4, 4, 3), i, np.uint8)
        more = {"images": [image + 100], "turns": [["USER", [0]]], "other": 1} if i == 5 else {}
        return {"image": image, "caption": f"c{i}", "meta": more}

    def describe(self, i):
        return f"picture {i}"


@pytest.mark.parametrize("threads", [1, 3])
def test_images_are_read_in_order_with_what_belongs_to_them(threads):
    data = Data(image_size=4, threads=threads, crop="random", flip=True)
    found = list(read_images(Pictures(), range(2, 7), data))
    assert [r.index for r in found] == [2, 3, 4, 5, 6]
    assert found[1].error == "truncated JPEG" and not found[1].images
    assert found[3].fields == {"caption": "c5", "turns": [["USER", [0]]], "index": 5}
    assert [image[0, 0, 0] for image in found[3].images] == [5, 105]


def test_the_plan_is_what_its_file_says(tmp_path):
    write(tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["tokenizer"] == "ab" * 32
    assert [list(PLAN.shard_range(s)) for s in range(PLAN.shards)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
