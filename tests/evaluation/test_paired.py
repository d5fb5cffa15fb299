"""Differences of runs with the same seeds and prompts: by hand, and how often their intervals hold the truth."""

import numpy as np
import pytest

from ddt_jax.evaluation import paired

FIGURES = {"t2i_all_correct": "pictures right", "plain_perplexity": "perplexity"}


def run(marks, perplexity=2.0):
    return {
        "t2i_all_correct": np.mean([int(m) for m in marks]),
        "plain_perplexity": perplexity,
        "marks": {"t2i": marks},
    }


def test_a_difference_is_the_mean_over_seeds_and_its_interval_the_wider_of_two():
    """Seeds agree exactly and prompts do not, or the other way round."""
    a = {0: run("1100", 2.0), 1: run("1010", 2.2)}
    b = {0: run("1000", 1.0), 1: run("1000", 1.2), 2: run("1111")}
    of_share, of_text = paired.differences({"a": a, "b": b}, FIGURES)
    assert (of_share.first, of_share.second, of_share.value, of_share.of) == ("a", "b", 0.25, "prompts")
    half = 3.1824 * np.std([0, 0.5, 0.5, 0], ddof=1) / 2  # t(0.975, 3)
    assert (of_share.low, of_share.high) == pytest.approx((0.25 - half, 0.25 + half), rel=1e-4)
    assert of_text.value == pytest.approx(1.0) and of_text.of == "seeds" and of_text.is_one
    a = {0: run("11111111"), 1: run("00000000")}
    (apart,) = paired.differences({"a": a, "b": {seed: run("00000000") for seed in (0, 1)}}, ["t2i_all_correct"])
    assert apart.value == 0.5 and apart.of == "seeds" and not apart.is_one


def test_without_marks_or_with_others_seeds_alone_decide():
    a, b = (
        {seed: run(marks) for seed, marks in enumerate(of)} for of in (("1100", "1010", "1110"), ("10", "00", "10"))
    )
    (found,) = paired.differences({"a": a, "b": b}, ["t2i_all_correct"])
    assert found.of == "seeds"
    for results in b.values():
        results.pop("marks")
    assert list(paired.differences({"a": a, "b": b}, ["t2i_all_correct"])) == [found]


def test_one_seed_in_common_or_a_figure_that_is_missing_is_no_difference():
    a = {0: run("11"), 1: run("11")}
    assert not list(paired.differences({"a": a, "b": {1: run("10"), 2: run("10")}}, FIGURES))
    b = {0: run("10"), 1: run("10") | {"plain_perplexity": None}}
    assert [d.figure for d in paired.differences({"a": a, "b": b}, FIGURES)] == ["t2i_all_correct"]


def test_where_there_is_no_difference_intervals_hold_zero_as_often_as_they_say():
    """Prompts that are hard are so for both arms; each run has a luck of its own."""
    rng = np.random.default_rng(0)
    held, n = 0, 300
    for _ in range(n):
        hard = rng.normal(0, 1.5, 200)

        def draw(hard=hard):
            chance = 1 / (1 + np.exp(-(hard + rng.normal(0, 0.2))))
            return run("".join("01"[int(x)] for x in rng.random(200) < chance))

        arms = {name: {seed: draw() for seed in range(3)} for name in "ab"}
        (found,) = paired.differences(arms, ["t2i_all_correct"])
        held += not found.is_one
    assert held / n > 0.94


def test_a_table_marks_what_differs():
    found = list(paired.differences({"a": {s: run("1111", 1.0 + s / 100) for s in range(3)},
                                     "b": {s: run("0000", 1.0) for s in range(3)}}, FIGURES))  # fmt: skip
    lines = paired.table(found, FIGURES, ["t2i_all_correct"])
    assert "| a less b | **+100.0 (+100.0 to +100.0, seeds)** | +0.010 (-0.015 to +0.035, seeds) |" in lines
    assert "1 of 2" in lines[-2] and paired.table([], FIGURES, []) == []
