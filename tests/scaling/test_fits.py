"""Parity on the published results of Transfusion, and a study that says of every part what it found or why not."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddt_jax import fitting
from ddt_jax.errors import UserError
from ddt_jax.evaluation import scaling_plots
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


def one_budget(seed, cost=1e18):
    """Runs of one cost, whose steps are whole numbers, with noise of 0.3 %."""
    true, rng, found = law.Law(1.69, 406.4, 410.7, 0.34, 0.28), np.random.default_rng(seed), []
    for params in np.logspace(7, 9, 5):
        tokens = cost / 6 / params * (1 + 7e-4 * (rng.random() - 0.5))
        loss = float(true.loss(params, tokens) * np.exp(3e-3 * rng.standard_normal()))
        found.append(points.Point("arm", f"{params:.1e}", params, tokens, 6 * params * tokens, {"loss": loss}))
    return found


def test_runs_of_one_budget_are_one_cost_whatever_the_rounding_of_their_steps():
    for seed in range(10):
        study = fits.study(one_budget(seed), ["loss"], draws=100)
        found = study["metrics"]["loss"]["families"]["arm"]
        assert found["line"] == {"why": "1 costs, a line takes 3"}
        assert "6 runs or more" in found["law"]["why"], "no word of a loss that rises with the cost"
        assert found["isoflop"]["valleys"][0]["params"]
        assert "No line over FLOPs: 1 costs" in fits.markdown(study)


def test_a_steep_line_is_said_by_its_value_among_the_runs():
    runs = [points.Point("a", str(c), 1, c / 6, c, {"loss": 2 * (c / 2e18) ** -30}) for c in (1e18, 2e18, 4e18)]
    study = fits.study(runs, ["loss"], draws=100)
    assert "metric = 2 (C / 2e+18)^-30.0000" in fits.markdown(study)  # exp of the constant overflows


@pytest.mark.parametrize(("slope", "best"), [(-0.1, "low"), (0.1, "high")])
def test_the_dearest_run_is_the_best_of_its_budget_not_the_one_with_a_step_more(slope, best):
    flops = np.logspace(18, 20, 4)
    line = parity.line(flops, 3 * flops**slope)
    other = [("low", 1e20, 2.0), ("middle", 1.0007e20, 2.5), ("high", 1.0002e20, 3.0), ("cheap", 1e19, 2.7)]
    runs = [points.Point("b", name, 1, 1, cost, {"loss": loss}) for name, cost, loss in other]
    assert parity.parity("a", line, runs, "loss").run == best


def with_bad_rates(runs, better=min):
    """Each run at three rates with two seeds: by the means the middle one is best, the others are the worse the larger
    the size; but each of these has the best of all seeds.
    """
    sign, found = (1 if better is min else -1), []
    for p in runs:
        for rate, worse in ((1e-3, 0.02 * p.params**0.1), (2e-3, 0.001), (4e-3, 0.05 * p.params**0.1)):
            for seed, share in enumerate((-0.001 if rate == 2e-3 else -0.05, worse)):
                value = p.metrics["loss"] * (1 + sign * share)
                found.append(replace(p, run=f"{p.run}-{rate:g}-{seed}", lr=rate, metrics={"loss": value}))
    return found


def test_fits_are_through_the_best_rate_of_each_size_and_amount_and_name_the_others(tmp_path, monkeypatch):
    good, rows = planned()[:15], []
    lost = replace(good[0], run="bad", lr=8e-3, status="diverged", why="the loss ends at nan", metrics={})
    runs = [*with_bad_rates(good), lost]
    (tmp_path / "runs.csv").write_text(points.to_csv(runs))
    monkeypatch.setattr(scaling_plots, "rates_plot", lambda name, found, lost, *rest: rows.append(lost) or rest[-1])
    for other in ("isoflop_plot", "law_plot"):
        monkeypatch.setattr(scaling_plots, other, lambda *args: args[-1])
    drawn = fitting.fit([str(tmp_path / "runs.csv")], str(tmp_path / "out"), draws=100)
    found = drawn["study"]["metrics"]["loss"]["families"]["arm"]
    assert found["used"] == [p.run for p in runs if p.lr == 2e-3]
    left_out = {row["run"]: row["why"] for row in found["left_out"]}
    assert left_out.pop("bad") == "diverged: the loss ends at nan"
    assert set(left_out.values()) == {"another rate is better"}
    assert list(left_out) == [p.run for p in runs if p.lr in (1e-3, 4e-3)]
    assert len(found["rates"]["curves"]) == 15 and {len(c["rates"]) for c in found["rates"]["curves"]} == {3}
    assert rows == [[8e-3]], "of rates only those of the run that diverged are crosses"
    alone = fits.study([p for p in runs if p.lr == 2e-3], ["loss"], draws=100)["metrics"]["loss"]["families"]["arm"]
    assert all(found[part] == alone[part] for part in ("law", "isoflop", "line"))
    assert f"- left out: {good[0].run}-0.001-0: another rate is better" in drawn["table"]


def test_the_best_rate_of_a_metric_that_rises_with_the_cost_is_the_one_with_the_most():
    rising = [replace(p, metrics={"loss": p.flops**0.1}) for p in planned()[:15]]
    found = fits.study(with_bad_rates(rising, max), ["loss"], draws=100)["metrics"]["loss"]["families"]["arm"]
    assert all("-0.002-" in run for run in found["used"]) and len(found["used"]) == 30


def test_a_loss_that_more_tokens_do_not_lower_has_no_law_and_no_best_size():
    grid = [(n, d) for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11)]
    runs = [points.Point("a", f"{n} {d}", n, d, 6 * n * d, {"loss": 2 + 99 * n**-0.3 + d**0.01}) for n, d in grid]
    found = fits.study(runs, ["loss"], draws=100)
    assert "does not fall with more tokens (beta = -" in found["metrics"]["loss"]["families"]["a"]["law"]["why"]


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
