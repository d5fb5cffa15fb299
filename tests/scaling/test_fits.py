"""Parity on the published results of Transfusion, and a study that says of every part what it found or why not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ddt_jax import fitting
from ddt_jax.errors import UserError
from ddt_jax.scaling import fits, law, parity, points

PUBLISHED = Path(__file__).parents[2] / "docs" / "scaling" / "transfusion.csv"
# Transfusion (arXiv 2408.11039), Table 3: its FLOPs for what Chameleon-7B reaches, over Chameleon's.
REPORTED = {"c4": 0.489, "wiki": 0.526, "llama": 0.600, "cider": 0.218, "fid": 0.029, "clip": 0.319}
RULES = ("fid<=100", "clip>=17.25", "cider>=4")  # fn 16


@pytest.fixture(scope="module")
def published():
    return fits.study(points.read(str(PUBLISHED)), list(REPORTED), rules=[points.rule(r) for r in RULES], draws=500)


def of(study, metric):
    (found,) = (r for r in study["metrics"][metric]["parity"] if (r["family"], r["against"]) == ("linear", "chameleon"))
    return found


@pytest.mark.parametrize("metric", REPORTED)
def test_parity_of_the_published_results_is_what_the_paper_reports(published, metric):
    """Its lines hold runs of several token counts, ours the five that Table 7 has: within 10 % for text, whose figures
    are the same in both tables; within 30 % for images, which Table 7 has drawn with another guidance.
    """
    found = of(published, metric)
    assert found["ratio"] == pytest.approx(REPORTED[metric], rel=0.1 if metric in ("c4", "wiki", "llama") else 0.3)
    if found["interval"]:
        assert found["interval"][0] <= REPORTED[metric] <= found["interval"][1]
    assert (found["interval"] is None) == (metric == "fid")  # five values that hardly fall leave it open


def test_the_published_runs_of_one_token_count_are_no_law(published):
    found = published["metrics"]["c4"]["families"]["linear"]
    assert "6 runs or more" in found["law"]["why"] and "4 sizes" in found["isoflop"]["why"]
    assert "so it is no loss" in published["metrics"]["clip"]["families"]["linear"]["law"]["why"]


def test_a_family_that_needs_half_for_the_same_has_half_as_ratio():
    flops = np.logspace(18, 21, 6)
    line = parity.line(flops, 80 * (2 * flops) ** -0.1)
    other = [points.Point("b", str(c), 1, 1, c, {"loss": 80 * c**-0.1}) for c in flops]
    found = parity.parity("a", line, other, "loss")
    assert found.ratio == pytest.approx(0.5) and found.interval == pytest.approx((0.5, 0.5)) and not found.extrapolated
    assert line.slope == pytest.approx(-0.1) and line.metric(flops[0] / 2) == pytest.approx(80 * flops[0] ** -0.1)
    assert parity.line([1, 1, 2], [1, 2, 3]) is None


def test_intervals_of_parity_hold_it_in_90_of_100_outcomes():
    rng, flops, held = np.random.default_rng(0), np.logspace(18, 21, 8), 0
    other = [points.Point("b", "b", 1, 1, 1e21, {"loss": 80 * (0.3 * 1e21) ** -0.1})]
    for _ in range(100):
        line = parity.line(flops, 80 * flops**-0.1 * np.exp(0.01 * rng.standard_normal(len(flops))), draws=200)
        low, high = parity.parity("a", line, other, "loss").interval
        held += low <= 0.3 <= high
    assert held >= 90


def planned(noise=0.004):
    """An iso-FLOP sweep of a known law, with a run that diverged and one that failed."""
    true, rng, found = law.Law(1.69, 406.4, 410.7, 0.34, 0.28), np.random.default_rng(1), []
    for cost in np.logspace(17, 19, 3):
        for params in np.logspace(-0.8, 0.8, 5) * true.optimum(cost, 6)[0]:
            tokens = cost / 6 / params
            loss = float(true.loss(params, tokens) * np.exp(noise * rng.standard_normal()))
            found.append(points.Point("arm", f"{cost:.0e}-{params:.1e}", params, tokens, cost, {"loss": loss}))
    bad = points.Point("arm", "bad", 1e8, 1e9, 6e17, {"loss": math.nan}, "diverged", "the loss ends at nan")
    return [*found, bad, points.Point("arm", "gone", 1e8, 1e9, 6e17, {}, "failed", "exit code 1")]


def test_the_verb_fits_what_there_is_and_shows_what_it_left_out(tmp_path):
    source = tmp_path / "runs.csv"
    source.write_text(points.to_csv(planned()))
    found = fitting.fit([str(source)], str(tmp_path / "out"), draws=100)
    arm = found["study"]["metrics"]["loss"]["families"]["arm"]
    assert len(arm["used"]) == 15 and [row["run"] for row in arm["left_out"]] == ["bad", "gone"]
    assert arm["law"]["held_out"]["max_error"] < 0.03
    assert arm["isoflop"]["exponent"] == pytest.approx(0.4516, abs=0.05)
    assert "- left out: bad: diverged: the loss ends at nan" in found["table"]
    names = {Path(path).name for path in found["written"]}
    assert names == {"fit.json", "fit.md", "points.csv", "loss_flops.png", "loss_arm_isoflop.png", "loss_arm_law.png"}
    assert all(Path(path).stat().st_size > 300 for path in found["written"])
    again = fitting.gather([str(tmp_path / "out" / "points.csv")])
    assert [p.run for p in again] == [p.run for p in planned()]
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["metrics"]["loss"]["families"]["arm"]["used"]


def test_what_cannot_be_fitted_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match="no run has bleu; there are c4, cider"):
        fits.study(points.read(str(PUBLISHED)), ["bleu"])
    with pytest.raises(UserError, match="does not exist"):
        fitting.gather([str(tmp_path / "none.csv")])
    with pytest.raises(UserError, match="two runs called chameleon-7B|two runs called linear-0.16B"):
        fitting.gather([str(PUBLISHED), str(PUBLISHED)])
    with pytest.raises(UserError, match="neither a sweep"):
        fitting.gather([str(tmp_path)])
    with pytest.raises(UserError, match="100 or more"):
        fitting.fit([str(PUBLISHED)], str(tmp_path), draws=5)
