"""Processes that have found different data are told so before a run begins."""

from types import SimpleNamespace

import pytest

from ddt_jax import config, experiment, settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.training import feed, same_data
from tests.evaluation import two_processes


class Source(list):
    def __init__(self, count, name, label_names):
        super().__init__(range(count))
        self.name, self.label_names = name, label_names


def images(count=1000, name="folder:/a", classes=("cat", "dog")):
    return feed.ImageFeed(settings.Experiment(), SimpleNamespace(source=Source(count, name, classes)))


def rows(*records, codes=8):
    corpus = SimpleNamespace(vocabulary=Vocabulary.extend(300, codes))
    return feed.RowFeed(settings.Experiment(), SimpleNamespace(batcher=SimpleNamespace(records=records)), corpus)


def difference(*feeds):
    return same_data.difference([same_data.found(f) for f in feeds])


def test_the_same_numbers_in_another_place_are_the_same_data():
    assert difference(images(), images(name="folder:/b"), images()) == ""
    assert difference(rows(("a", 5), ("b", 6)), rows(("x/a", 5), ("b", 6))) == ""


@pytest.mark.parametrize(
    ("feeds", "says"),
    [
        (
            (images(), images(), images(950, name="folder:/b")),
            "process 2 of 3 has found 950 records of folder:/b where process 0 has 1,000 records of folder:/a; ",
        ),
        (
            (rows(("a", 5), ("b", 6)), rows(("x", 5), ("y", 7))),
            "found 7 records of y where process 0 has 6 records of b;",
        ),
        ((images(), images(classes=("cat", "cow"))), "2 classes with names "),
        ((images(), images(classes=None)), "found nothing where process 0 has 2 classes with names "),
        ((rows(("a", 5)), rows(("a", 5), codes=9)), "found vocabulary "),
        ((rows(*[("a", 5)] * 500), rows(*[("a", 5)] * 499, ("a", 6))), "found 6 records of a where process 0 has 5 "),
    ],
)
def test_the_first_process_that_differs_is_named_with_what_it_has(feeds, says):
    line = difference(*feeds)
    assert line.startswith("data: process ") and says in line and "\n" not in line


def test_what_there_is_no_room_for_is_not_taken_for_a_difference():
    """Names of other lengths leave room for other numbers of lines."""

    def said(name, *counts):
        text, digest = same_data.found(rows(*((name, count) for count in counts)))
        return same_data._cut(text).decode(), digest

    many = [5] * 400
    short, long = said("a", *many, 7), said("a" * 30, *many, 8)
    assert short[0].endswith("\n...") and len(short[0].splitlines()) > len(long[0].splitlines())
    assert "has found other sources where process 0 has its own" in same_data.difference([short, long])
    assert "found 6 records of a" in same_data.difference([long, said("a", *many[:3], 6, *many)])
    assert same_data._cut("x\ny") == b"x\ny"


def test_a_run_asks_before_it_writes_anything(tmp_path, monkeypatch):
    def refuse(feed):
        raise UserError(f"asked of {len(feed.loader.source):,} records")

    monkeypatch.setattr(same_data, "check", refuse)
    with pytest.raises(UserError, match="asked of .* records"):
        experiment.train(config.load("configs/smoke.py", ()), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


_PROCESS = """
import json, sys
import jax

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from ddt_jax.errors import UserError
from ddt_jax.training import same_data
from tests.training.test_same_data import images, rows

same_data.check(images(name=f"folder:/{jax.process_index()}"))
said = []
for feed in (images(1000 - jax.process_index()), rows(*[("a", 5)] * 500, ("b", jax.process_index()))):
    try:
        same_data.check(feed)
    except UserError as error:
        said.append(str(error))
print(json.dumps(said))
"""


@pytest.mark.slow
def test_every_process_hears_of_the_one_that_differs():
    said = two_processes.results(_PROCESS, timeout=120)
    counts, behind = said[0]
    assert (
        said[1] == said[0] and "process 1 of 2 has found 999 records of folder:/a where process 0 has 1,000" in counts
    )
    assert "process 1 of 2 has found other sources" in behind
