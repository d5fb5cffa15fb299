"""The best learning rate of a size, and how far it moves with the size."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from ddt_jax import fitting
from ddt_jax.evaluation import scaling_plots
from ddt_jax.scaling import fits, points, rates

DOCS = Path(__file__).resolve().parents[2] / "docs"
GRID = [1e-3 * 2**i for i in range(6)]


def run(width, lr, best, seed=0, **more):
    """A parabola over the octaves of the rate, lower for larger widths."""
    loss = 3 - math.log10(width) / 4 + 0.1 * math.log2(lr / best) ** 2 + (-1) ** seed * 0.01
    name = f"{width}-{lr:g}-{seed}"
    values = {"loss": loss, **more.pop("metrics", {})}
    return points.Point("arm", name, 12.0 * width**2, 1e4, 1e5 * width**2, values, lr=lr, width=width, **more)


def sweep(moves):
    """Widths 64 to 512, whose best rate begins at 5e-3 and moves by so many factors of 2 with each doubling."""
    return [
        run(w, lr, 5e-3 * 2 ** (moves * i), seed)
        for i, w in enumerate((64, 128, 256, 512))
        for lr in GRID
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("moves", [0.0, -0.5])
def test_the_bottom_of_a_known_curve_is_found_between_its_rates(moves):
    found = rates.curves(sweep(moves), "loss")
    assert [c.name for c in found] == ["width 64", "width 128", "width 256", "width 512"]
    for i, curve in enumerate(found):
        assert curve.runs == (2,) * len(GRID) and curve.rates == tuple(GRID)
        assert curve.bottom == pytest.approx(5e-3 * 2 ** (moves * i), rel=1e-6)
        assert curve.best == min(GRID, key=lambda lr: abs(math.log(lr / curve.bottom)))
    assert rates.moved(found) == pytest.approx(3 * moves, abs=1e-6)


def test_the_best_at_an_end_is_a_bound_and_has_no_bottom():
    low = rates.curves([run(64, lr, 1e-5) for lr in GRID], "loss")[0]
    high = rates.curves([run(128, lr, 1.0) for lr in GRID], "loss")[0]
    assert (low.best, low.bottom, high.best, high.bottom) == (GRID[0], None, GRID[-1], None)
    assert rates.moved([low, high]) == pytest.approx(5)
    assert rates.moved([low]) is None


def at_cost(width, cost, best, tokens=0.0):
    """The rates of a size on as many tokens as a cost allows, or on these."""
    tokens = tokens or cost / (72 * width**2)
    return [replace(run(width, lr, best), run=f"{width}-{tokens}-{lr}", tokens=tokens, flops=72.0 * width**2 * tokens)
            for lr in GRID]  # fmt: skip


def test_at_equal_flops_the_best_rate_moves_from_the_smallest_size_to_the_largest():
    """There the largest size has the fewest tokens."""
    one = [p for i, w in enumerate((64, 128, 256)) for p in at_cost(w, 1e13, 2e-3 * 2**i)]
    assert rates.moved(rates.curves(one, "loss")) == pytest.approx(2, abs=1e-6)
    dear = [p for i, w in enumerate((64, 128, 256)) for p in at_cost(w, 4e13, 4e-3 * 2**i)]
    found = rates.curves([*one, *dear], "loss")
    assert rates.moved(found) == pytest.approx(2, abs=1e-6)
    assert [c.flops for c in rates.ends(found)] == pytest.approx([4e13, 4e13])
    arm = fits.study([*one, *dear], ["loss"], draws=100)
    told = f"size (width 64, {4e13 / 72 / 64**2:.3g} tokens to width 256, {4e13 / 72 / 256**2:.3g} tokens) the best"
    assert told in fits.markdown(arm)


def test_of_several_amounts_the_best_rate_moves_within_one():
    """It moves by 1 with the size, and by 2 more with the tokens."""
    runs = [
        p
        for i, w in enumerate((64, 256))
        for j, n in enumerate((1e6, 3e6))
        for p in at_cost(w, 0, 2e-3 * 2 ** (i + 2 * j), n)
    ]
    found = rates.curves(runs, "loss")
    assert [(c.width, c.tokens) for c in rates.ends(found)] == [(64, 3e6), (256, 3e6)]
    assert rates.moved(found) == pytest.approx(1, abs=1e-6)


def test_seeds_whose_packed_rows_hold_a_few_tokens_more_are_of_one_curve():
    seeds = [replace(run(64, lr, 5e-3, seed), tokens=1e4 * (1 + 0.002 * seed)) for lr in GRID for seed in (0, 1, 2)]
    (found,) = rates.curves(seeds, "loss")
    assert found.runs == (3,) * len(GRID)


def test_a_size_with_two_rates_or_none_said_has_no_curve():
    two = [run(64, lr, 5e-3) for lr in GRID[:2]]
    unsaid = [points.Point("arm", str(i), 10.0, 10.0, 600.0, {"loss": 2.0}) for i in range(4)]
    assert rates.curves([*two, *unsaid], "loss") == []


def test_the_verb_draws_rates_and_says_how_far_the_best_moves(tmp_path, monkeypatch):
    lost = run(512, 6.4e-2, 5e-3, status="diverged", why="the loss ends at nan")
    source, drawn = tmp_path / "runs.json", []
    source.write_text(json.dumps({"points": points.to_json([*sweep(-0.5), lost])}))
    monkeypatch.setattr(scaling_plots, "rates_plot", _noting(scaling_plots.rates_plot, drawn))
    found = fitting.fit([str(source)], str(tmp_path / "out"), draws=100)
    of = found["study"]["metrics"]["loss"]["families"]["arm"]["rates"]
    assert of["moved"] == pytest.approx(-1.5, abs=1e-6) and len(of["curves"]) == 4
    assert "largest size (width 64 to width 512) the best rate moves by 2^-1.50" in found["table"]
    assert (tmp_path / "out" / "loss_arm_rates.png").stat().st_size > 5000
    assert drawn == [[6.4e-2]], "the run that diverged is a cross at its rate"
    again = points.read(str(tmp_path / "out" / "points.csv"))
    assert [(p.lr, p.width) for p in again] == [(p.lr, p.width) for p in [*sweep(-0.5), lost]]


def _noting(draw, seen):
    def drawing(name, found, lost, family, path):
        seen.append(lost)
        return draw(name, found, lost, family, path)

    return drawing


def test_the_best_rate_stays_from_width_64_to_512_as_the_docs_say():
    """The table of docs/scaling.md is that of the runs, and what is asked of transfer: less than a step of the grid."""
    found = rates.curves(points.read(str(DOCS / "scaling" / "transfer.csv")), "loss")
    assert [curve.width for curve in found] == [64, 128, 256, 512]
    text = (DOCS / "scaling.md").read_text()
    for curve in found:
        cells = [
            f"**{v:.3f}**" if r == curve.best else f"{v:.3f}" for r, v in zip(curve.rates, curve.values, strict=True)
        ]
        assert f"| {curve.width:g} | {' | '.join(cells)} | {curve.bottom:.4f} |" in text
    assert abs(rates.moved(found)) < 1
    assert max(c.bottom for c in found) / min(c.bottom for c in found) < 2
