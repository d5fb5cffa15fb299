"""Points come whole out of files, and those that no fit may use are listed with the reason."""

import json
import math

import pytest

from ddt_jax.errors import UserError
from ddt_jax.scaling import points

GOOD = points.Point("arm", "a", 10.0, 100.0, 6000.0, {"loss": 2.0, "fid": 30.0})
BAD = points.Point("arm", "b", 20.0, 100.0, 9000.0, {"loss": math.nan}, "diverged", "the loss, at the end, is nan")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_what_is_written_is_read_again(tmp_path, kind):
    path = tmp_path / f"runs.{kind}"
    path.write_text(
        points.to_csv([GOOD, BAD]) if kind == "csv" else json.dumps({"points": points.to_json([GOOD, BAD])})
    )
    good, bad = points.read(str(path))
    assert good == GOOD
    assert (bad.status, bad.why, bad.flops) == (BAD.status, BAD.why, BAD.flops) and math.isnan(bad.metrics["loss"])


def test_little_is_asked_of_a_file(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("# a remark\nparams, tokens, loss\n1e6, 1e9, 3.5\n")
    assert points.read(str(path)) == [points.Point("mine", "run 1", 1e6, 1e9, 6e15, {"loss": 3.5})]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "params,loss\n5,1\n", "run 1: tokens must be a number above 0, got nothing"),
        ("a.csv", "params,tokens,loss\n5,5,1\n5,5,much\n", "run 2: loss is 'much', which is no number"),
        ("a.csv", "params,tokens,status\n5,5,lost\n", "status lost is not one of finished"),
        ("a.csv", "params,tokens\n5,5,6\n", "more values than the header"),
        ("a.json", "{", "is no JSON"),
        ("a.json", '{"runs": []}', 'must be one, or have one under "points"'),
        ("a.txt", "", "neither .csv nor .json"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        points.read(str(path))


def test_runs_are_left_out_for_a_reason_that_is_given():
    far = points.Point("arm", "c", 1.0, 1.0, 6.0, {"loss": 1.0, "fid": 180.0})
    none = points.Point("arm", "d", 1.0, 1.0, 6.0, {"loss": -1.0})
    chosen = points.choose([GOOD, BAD, far, none], "fid", [points.rule("fid<=100")])
    assert chosen.used == [GOOD]
    reasons = {point.run: why for point, why in chosen.left_out}
    assert reasons == {
        "b": "diverged: the loss, at the end, is nan",
        "c": "fid is 180, outside of the rule fid<=100",
        "d": "has no fid",
    }
    assert "no logarithm" in points.choose([none], "loss").left_out[0][1]


@pytest.mark.parametrize("text", ["fid", "fid<100", "fid<=much", "<=3"])
def test_a_rule_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--keep"):
        points.rule(text)
