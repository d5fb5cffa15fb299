"""A comparison that keeps its protocol has nothing against it; each demand that is not kept is named, and it alone."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddt_jax.errors import UserError
from ddt_jax.evaluation import comparison, comparison_plots, metrics
from ddt_jax.evaluation.comparison import Row
from ddt_jax.evaluation.samples import Sample

RATES, BEST, GUIDANCES = (1e-3, 2e-3, 4e-3), 2e-3, (1.0, 2.0, 3.0)
ARMS = {"codes": 0.5, "denoised": 0.4}


def drawn(guidance, **more):
    return {"text_to_image": {"guidance": guidance} | more, "image_to_text": {"temperature": 0.0}, "seed": 0}


def row(arm, lr, seed, guidance):
    """Best at BEST and at a guidance of 3; seeds differ by 1 %."""
    share = ARMS[arm] - 0.05 * (lr != BEST) + 0.01 * guidance + 0.01 * seed
    results = {"t2i_all_correct": share, "t2i_all_correct_n": 1000, "plain_perplexity": 3.0 - share}
    results |= {"caption_all_correct": share + 0.1, "caption_all_correct_n": 1000}
    return Row(
        arm=arm,
        run=f"{arm}/{lr:g}/{seed}",
        seed=seed,
        lr=lr,
        step=100,
        steps=100,
        flops={"training": 8e12, "tokenizer": 2e12} if arm == "codes" else {"training": 1e13},
        seen={"images": 5000.0},
        alike={"optimizer.b2": 0.99, "train.batch_size": 32},
        sampling=drawn(guidance),
        results=results,
    )


def kept():
    grid = [row(arm, lr, 0, 2.0) for arm in ARMS for lr in RATES if lr != BEST]
    return grid + [row(arm, BEST, seed, guidance) for arm in ARMS for seed in range(3) for guidance in GUIDANCES]


def test_what_keeps_the_protocol_has_nothing_against_it():
    found = comparison.compare(kept())
    assert found.violations == ()
    for arm in found.arms:
        assert arm.lr == BEST and [r.seed for r in arm.rows] == [0, 1, 2]
        assert {r.sampling["text_to_image"]["guidance"] for r in arm.rows} == {3.0}
    text = comparison.markdown(found)
    assert "| codes | 3 |" in text and "NOT KEPT" not in text and "| 8.000e+12 | 2.000e+12 |" in text
    tree = json.loads(json.dumps(comparison.as_json(found, kept())))
    assert len(tree["rows"]) == 22 and tree["arms"]["codes"]["lr"] == BEST


def test_the_grid_of_one_arm_may_go_on_beyond_that_of_all():
    more = [replace(r, lr=8e-3, run=f"{r.run}/beyond") for r in kept() if of(lr=4e-3)(r)]
    assert comparison.compare([*kept(), *more]).violations == ()
    between = [replace(r, lr=3e-3) for r in more]
    (line,) = comparison.compare([*kept(), *between]).violations
    assert "not tuned over the same grid: codes 0.001, 0.002, 0.004; denoised 0.001, 0.002, 0.003, 0.004" in line


def edited(change, where=lambda r: r.arm == "denoised"):
    """The rows that keep the protocol, some of them changed; None leaves one out."""
    made = [change(r) if where(r) else r for r in kept()]
    return [r for r in made if r is not None]


def of(arm="denoised", **values):
    return lambda r: r.arm == arm and all(getattr(r, name) == value for name, value in values.items())


def guidance(r):
    return r.sampling["text_to_image"]["guidance"]


def without(*names):
    return lambda r: replace(r, results={k: v for k, v in r.results.items() if k not in names})


NOT_KEPT = {
    "cost": (
        edited(lambda r: replace(r, flops={"training": 1.03e13})),
        "total training FLOPs are not equal: 1.000e+13",
    ),
    "cost of one": (edited(lambda r: replace(r, flops={"training": 9e12}), of(lr=4e-3)), "11.1% more"),
    "uncounted": (edited(lambda r: replace(r, uncounted=("x.pth is not counted",))), "denoised: x.pth is not counted"),
    "settings": (
        edited(lambda r: replace(r, alike=r.alike | {"optimizer.b2": 0.95})),
        "optimizer.b2 is not the same in all runs: codes 0.99; denoised 0.95",
    ),
    "settings that only one has": (
        edited(lambda r: replace(r, alike=r.alike | {"model.x": 1})),
        "model.x is not the same in all runs: codes null; denoised 1",
    ),
    "unfinished": (
        edited(lambda r: replace(r, step=90), of(seed=2, lr=BEST)),
        "denoised/0.002/2 was evaluated at step 90",
    ),
    "other grid": (
        edited(lambda r: replace(r, lr=8e-3), of(lr=4e-3)),
        "not tuned over the same grid: codes 0.001, 0.002, 0.004; denoised 0.001, 0.002, 0.008",
    ),
    "rate without the tuning seed": (
        edited(lambda r: replace(r, seed=1), of(lr=4e-3)),
        "denoised: learning rates 0.004 have no run with seed 0",
    ),
    "edge": (
        [r for r in kept() if r.lr != 4e-3],
        [
            "0.001, 0.002 (shares are 5.0 points better than at 0.001); go beyond it",
            "denoised: the best learning rate, 0.002, is at the edge",
        ],
    ),
    "two seeds": (
        [r for r in kept() if r.seed < 2],
        ["codes: 2 seeds at learning rate 0.002", "denoised: 2 seeds at learning rate 0.002"],
    ),
    "other seeds": (
        edited(lambda r: replace(r, seed=7), of(seed=2)),
        "are not the same: codes 0, 1, 2; denoised 0, 1, 7",
    ),
    "a run twice": (
        kept() + [replace(r, run="again") for r in kept() if of(lr=BEST, seed=1)(r)],
        "denoised: 2 runs have seed 1 at learning rate 0.002",
    ),
    "guidance": (
        edited(lambda r: replace(r, sampling=drawn(1.5)) if guidance(r) == 1.0 else r),
        "guidance was not swept over the same values: codes 1, 2, 3; denoised 1.5, 2, 3",
    ),
    "more settings": (
        kept()
        + [replace(r, sampling=drawn(3.0, solver="ddim")) for r in kept() if of(lr=BEST)(r) and guidance(r) == 1.0],
        "not as many sampling settings were tried in each arm: codes 3; denoised 4",
    ),
    "the tuning seed without one setting": (
        edited(lambda r: None if guidance(r) == 1.0 else r, of(seed=0, lr=BEST)),
        "denoised/0.002/0 was evaluated with 2 of the 3 sampling settings",
    ),
    "a seed without the chosen setting": (
        edited(lambda r: None if guidance(r) == 3.0 else r, of(seed=1)),
        "denoised: denoised/0.002/1 was not evaluated with guidance 3, which seed 0 has chosen",
    ),
    "captions": (
        edited(lambda r: replace(r, sampling=r.sampling | {"image_to_text": {"temperature": 1.0}})),
        "captions were not drawn with the same settings",
    ),
    "figure": (
        edited(without("plain_perplexity"), of(seed=2)),
        "denoised: denoised/0.002/2 has no plain_perplexity",
    ),
}


@pytest.mark.parametrize("name", NOT_KEPT)
def test_each_demand_that_is_not_kept_is_named_alone(name):
    rows, said = NOT_KEPT[name]
    found = comparison.compare(rows)
    said = [said] if isinstance(said, str) else said
    assert len(found.violations) == len(said), found.violations
    for line, text in zip(found.violations, said, strict=True):
        assert text in line and "\n" not in line
        assert f"- {line}" in comparison.markdown(found)


def test_other_seeds_need_no_more_than_the_chosen_setting():
    rows = [r for r in kept() if r.seed == 0 or guidance(r) == 3.0]
    assert len(rows) == 14 and comparison.compare(rows).violations == ()


def diverged(r):
    return replace(r, step=0, flops={}, seen={}, alike={}, sampling={}, results={}, diverged="50 steps in a row")


def test_a_rate_that_diverged_has_been_tried_and_is_shown():
    rows = edited(diverged, of(lr=4e-3))
    found = comparison.compare(rows)
    assert found.violations == () and found.arms[1].lr == BEST
    assert found.diverged == ("denoised: denoised/0.004/0 diverged: 50 steps in a row",)
    assert "their learning rates have lost by it:\n\n- denoised: denoised/0.004/0" in comparison.markdown(found)
    # A seed that diverged at the chosen rate is not one of three, and its arm's figures are those of the others.
    few, _, survived = comparison.compare(edited(diverged, of(lr=BEST, seed=2))).violations
    assert "denoised: 2 seeds at learning rate 0.002" in few
    assert survived == "denoised: seed 2 diverged at its rate, 0.002; its figures are of the runs that did not"


def test_figures_without_the_seed_that_was_chosen_on_stand_beside_those_of_all():
    tree = comparison.as_json(comparison.compare(kept()), kept())["arms"]["codes"]
    assert tree["rates"] == 3 and tree["untuned"]["t2i_all_correct"]["values"] == [
        row.results["t2i_all_correct"]
        for row in kept()
        if of("codes", lr=BEST)(row) and guidance(row) == 3.0 and row.seed
    ]


def test_what_was_not_run_is_a_demand_that_is_not_kept():
    found = comparison.compare(kept(), lost=["denoised-lr0.002-s3 failed: no space"])
    assert found.violations == ("denoised-lr0.002-s3 failed: no space",)


def test_tokenizers_have_a_table_of_their_own():
    def read(r):
        return replace(r, results=r.results | {"tokenizer_psnr": 28.257, "tokenizer_scenes_all_correct": 0.97})

    text = comparison.markdown(comparison.compare(edited(read, of("codes"))))
    assert "| codes | 28.26 | 97.0% | – | – |" in text and "| denoised | –" not in text
    assert "image tokenizer of" not in comparison.markdown(comparison.compare(kept()))


def test_tasks_of_pictures_have_a_table_of_their_own():
    def read(r):
        return replace(r, results=r.results | {"t2i_counting": 0.5 + r.seed / 100, "t2i_counting_n": 100})

    found = comparison.compare(edited(read, of("codes")))
    low, high = metrics.binomial_interval(153, 300)
    text = comparison.markdown(found)
    assert "| pictures of | counting |" in text and f"| codes | 51.0% ({low:.1%} to {high:.1%}, answers) |" in text
    assert "| denoised | – |" in text
    assert comparison.as_json(found, kept())["arms"]["codes"]["tasks"]["t2i_counting"]["value"] == pytest.approx(0.51)
    assert "pictures of" not in comparison.markdown(comparison.compare(kept()))


def test_the_page_of_the_comparison_says_what_its_runs_say():
    """Every demand is kept, the generated tables are those of the rows, and so are the figures of the page."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    tree = json.loads((docs / "comparison" / "comparison.json").read_text())
    found = comparison.compare(comparison.from_json(tree))
    assert not found.violations and not found.diverged
    assert (docs / "comparison" / "comparison.md").read_text().startswith(comparison.markdown(found))
    page = (docs / "comparison.md").read_text()
    for arm in found.arms:
        of, untuned = arm.figures, arm.untuned
        text = "{value:.3f} ({low:.3f} to {high:.3f})".format(**of["plain_perplexity"])
        shares = " | ".join(
            f"{100 * of[name]['value']:.1f} % ({100 * of[name]['low']:.1f} to {100 * of[name]['high']:.1f}) "
            f"[{100 * untuned[name]['value']:.1f}]"
            for name in comparison.SHARES
        )
        assert f"| {text} | {shares} |" in page, arm.name
    for arm in (arm for arm in found.arms if arm.name in ("codes", "spatial", "unordered", "transfusion")):
        tasks = [name for name in comparison.TASKS if name != "t2i_position"]
        cells = (
            f"{100 * t['value']:.0f} % ({100 * t['low']:.0f} to {100 * t['high']:.0f})"
            for t in map(arm.tasks.get, tasks)
        )
        assert " | ".join(cells) in page, arm.name
    signed = lambda d, k, form: f"{k * d.value:+{form}} ({k * d.low:+{form}} to {k * d.high:+{form}})"  # noqa: E731
    names = {"codes": "DDT", "transfusion": "Transfusion"}
    wanted = [("codes", other) for other in ("spatial", "unordered", "transfusion", "blocks")]
    for pair in (*wanted, ("spatial", "unordered"), ("spatial", "transfusion"), ("transfusion", "blocks")):
        of = {d.figure: d for d in found.differences if (d.first, d.second) == pair}
        cells = [
            signed(of["plain_perplexity"], 1, ".3f"),
            *(signed(of[name], 100, ".1f") for name in comparison.SHARES),
        ]
        line = f"| {names.get(pair[0], pair[0])} less {names.get(pair[1], pair[1])} | {' | '.join(cells)} |"
        assert line in page.replace("**", ""), pair


def test_plots_are_written(tmp_path):
    rows = edited(diverged, of(lr=4e-3))
    written = comparison_plots.draw(comparison.compare(rows), rows, {}, tmp_path)
    assert [p.name for p in written] == [*(f"{n}.png" for n in comparison.FIGURES), "rates.png", "guidance.png"]
    assert all(len(p.read_bytes()) > 5000 for p in written)


def test_what_arms_have_drawn_of_the_same_prompts_is_one_picture(tmp_path):
    colours = {"one": (255, 0, 0), "two": (0, 0, 255)}
    samples = {arm: [Sample(np.full((8, 8, 3), c, np.uint8), t, t == "a") for t in "ab"] for arm, c in colours.items()}
    samples["one"] = samples["one"][::-1] + [Sample(np.full((8, 8, 3), (0, 255, 0), np.uint8), "its own", True)]
    found = comparison.compare(kept())
    picture = np.asarray(Image.open(comparison_plots.draw(found, kept(), samples, tmp_path)[-1]).convert("RGB"))
    reds, blues = ((picture == c).all(axis=-1) for c in colours.values())
    assert np.argwhere(reds)[:, 0].max() < np.argwhere(blues)[:, 0].min()  # a row below the other
    assert not (picture == (0, 255, 0)).all(axis=-1).any()  # nobody else was asked for it
    framed = (picture == (0x2E, 0x9E, 0x5B)).all(axis=-1)
    middle = np.argwhere(reds)[:, 1].mean()
    assert framed.any() and np.argwhere(framed)[:, 1].min() > middle  # "one" was asked for "b" first
    other = {arm: of[:1] for arm, of in samples.items()}
    assert comparison_plots.draw(found, kept(), other, tmp_path)[-1].name == "guidance.png"  # they share no prompt


def test_costs_may_differ_by_the_tolerance():
    rows = edited(lambda r: replace(r, flops={"training": 1.03e13}))
    assert not comparison.compare(rows, tolerance=0.04).violations


def test_rate_and_sampling_are_chosen_on_the_tuning_seed_alone():
    """The other seeds would choose a guidance of 1, and by their results the third rate."""

    def other(r):
        return replace(r, results={k: 0.9 if k.endswith("correct") else v for k, v in r.results.items()})

    rows = [other(r) if r.seed and guidance(r) == 1.0 else r for r in kept()]
    rows += [other(replace(row(arm, 4e-3, seed, 2.0))) for arm in ARMS for seed in (1, 2)]
    found = comparison.compare(rows)
    assert all(arm.lr == BEST and guidance(arm.rows[0]) == 3.0 for arm in found.arms)


def test_rates_are_compared_at_sampling_settings_that_all_have():
    """At a guidance of 2 the middle rate is worse than the first; that it was also tried at 3 must not help it."""
    worse = {"t2i_all_correct": 0.1, "caption_all_correct": 0.1}
    rows = edited(lambda r: replace(r, results=r.results | worse) if guidance(r) == 2.0 else r, of(lr=BEST, seed=0))
    found = {arm.name: arm for arm in comparison.compare(rows).arms}
    assert found["codes"].lr == BEST and found["denoised"].lr == 1e-3


def test_students_interval_is_that_of_tables():
    # t(0.975, 2) = 4.303; of 1, 2, 3 the deviation is 1.
    assert metrics.mean_interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2 - 4.3027 / np.sqrt(3), 2 + 4.3027 / np.sqrt(3)), rel=1e-4
    )
    rng = np.random.default_rng(0)
    held = [low <= 0 <= high for low, high in (metrics.mean_interval(list(x)) for x in rng.normal(size=(4000, 3)))]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_of_two_intervals_the_wider_is_given_and_named():
    found = comparison.compare(kept()).arms[0].figures["t2i_all_correct"]
    # 0.53, 0.54 and 0.55; of 3,000 answers Wilson's is 0.522 to 0.558, of 300 it is 0.4834 to 0.5955.
    assert found["of"] == "seeds" and (found["low"], found["high"]) == pytest.approx((0.51516, 0.56484), abs=1e-5)
    rows = edited(lambda r: replace(r, results=r.results | {"t2i_all_correct_n": 100}), of("codes"))
    few = comparison.compare(rows).arms[0].figures["t2i_all_correct"]
    assert few["of"] == "answers" and (few["low"], few["high"]) == pytest.approx((0.4834, 0.5955), abs=1e-4)
    assert found["value"] == pytest.approx(statistics.fmean([0.53, 0.54, 0.55]))
    alone = comparison.compare([r for r in kept() if r.seed == 0])
    assert alone.arms[0].figures["t2i_all_correct"]["of"] == "answers"
    assert "(no interval)" in comparison.markdown(alone)  # of a perplexity of one run


def test_what_cannot_be_compared_is_one_line():
    with pytest.raises(UserError, match="takes two arms or more"):
        comparison.compare([r for r in kept() if r.arm == "codes"])
    with pytest.raises(UserError, match=r"no seed is in every arm .codes .0, 1, 2.; denoised .8.."):
        comparison.compare(edited(lambda r: replace(r, seed=8)))
    with pytest.raises(UserError, match="no run of denoised with seed 0 has caption_all_correct and t2i_all_correct"):
        comparison.compare(edited(without("t2i_all_correct")))
