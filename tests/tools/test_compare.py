"""tools/compare.py: what a comparison will run keeps the protocol, the table is written, what is wrong is one line."""

import importlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddt_jax import cli, config, ledger
from ddt_jax.evaluation.comparison import FIGURES, Row

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TRIAL = """
from ddt_jax.scaling import trial
def get_trial():
    configs = {configs!r}
    how = dict(
        arms={{
            "codes": trial.Arm(
                configs + "/comparison_scenes.py:codes:{{root}}/codes", {{configs + "/quickstart.py": 2300}}
            ),
            "denoised": trial.Arm(configs + "/comparison_scenes.py:transfusion"),
        }},
        total=5.6e13, rates=(1.5e-3, 3e-3, 6e-3), guidances=(1.0, 2.0, 4.0), first_guidance=2.0,
        records=80_000, held_out=50, changes={{"train.tensorboard": False}},
    )
    return trial.Trial("t", **how | dict({changes}))
"""


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("compare")


@pytest.fixture
def written(tmp_path):
    """(changes) → path of a trial's file."""

    def write(changes=""):
        path = tmp_path / "trial.py"
        path.write_text(TRIAL.format(configs=str(CONFIGS), changes=changes))
        return str(path)

    return write


def lines_of(text):
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def overrides_of(line):
    return dict(text.removeprefix("--config.").split("=") for text in line if text.startswith("--config."))


def test_a_plan_has_a_grid_of_equal_cost(compare, written, capsys, tmp_path):
    to = tmp_path / "runs"
    assert compare.main(["run", "--config", written(), "--to", str(to), "--plan"]) == 0 and not to.exists()
    out = capsys.readouterr().out
    lines = lines_of(out)
    for line in lines:
        assert line[0] == "ddt-jax"
        cli._arguments(line[1:])  # the command line accepts it
    assert [line[1] for line in lines[:3]] == ["train", "tokenize", "tokenize"]
    assert [line[line.index("--records") + 1] for line in lines[1:3]] == ["80000", "50"]
    trained = [line for line in lines[3:] if line[1] == "train"]
    assert [float(overrides_of(line)["optimizer.lr"]) for line in trained] == [1.5e-3, 1.5e-3, 3e-3, 3e-3, 6e-3, 6e-3]
    assert {(overrides_of(line)["seed"], overrides_of(line)["train.tensorboard"]) for line in trained} == {
        ("0", "False")
    }
    steps = {line[3]: int(overrides_of(line)["train.steps"]) for line in trained}
    codes, denoised = (config.load(path) for path in steps)
    plans = ledger.plan(codes, config.load(f"{CONFIGS}/quickstart.py"), 80_000), ledger.plan(denoised)
    costs = [plan.total(count) for plan, count in zip(plans, steps.values(), strict=True)]
    assert costs == pytest.approx([5.6e13] * 2, rel=1e-3) and plans[1].step > plans[0].step
    judged = [line for line in lines if line[1] == "evaluate" and "--json" in line]
    assert len(judged) == 6 and {overrides_of(line)["evaluate.text_to_image.guidance"] for line in judged} == {"2"}
    # What is not known yet is announced: two guidances, two seeds, and their evaluation, of each arm.
    assert sum("once the best are known" in line for line in out.splitlines()) == 2 * 6


def test_arms_that_draw_from_more_images_than_others_are_refused(compare, written, capsys):
    assert compare.main(["run", "--config", written({"records": 1000}), "--to", "runs", "--plan"]) == 2
    said = capsys.readouterr().err
    assert "comparison_scenes.py:transfusion draws from 80,000 images of scenes:train" in said
    assert "codes are made of 1,000; make `records`" in said and said.count("\n") == 1


def test_denoised_arms_learn_from_as_many_images_as_codes_are_made_of():
    from ddt_jax.scaling import trial

    path = str(CONFIGS / "sweeps" / "image_languages.py")
    found = trial.load(path)
    places = [trial.place(path, arm.config, "runs") for arm in found.arms.values() if not arm.tokenizer]
    sources = [part for place in places for part in config.load(place).sequences.sources]
    assert [part.records for part in sources] == [found.records] * 2


@pytest.mark.slow
def test_stages_of_a_tokenizer_are_trained_in_turn_and_all_of_them_are_paid(compare, written, tmp_path):
    """SEED's three, each begins with the one before; codes are made by the last."""
    from ddt_jax.scaling import trial

    plan, seed = importlib.import_module("compare_plan"), f"{CONFIGS}/seed_scenes.py"
    stages = {f"{seed}:align": 400, f"{seed}:codes": 2800, f"{seed}:draw": 3000}
    found = trial.load(written())
    arms = {"seed": trial.Arm(f"{CONFIGS}/comparison_scenes.py:seed:{{root}}", stages)}
    found = trial.Trial("t", arms, 2e14, found.rates, found.guidances, found.first_guidance, records=1000)
    (arm,) = plan.priced(found, "t.py", str(tmp_path))
    first, second, third, codes, *_ = plan.steps(found, [arm], str(tmp_path), {})
    trained = [list(step.arguments) for step in (first, second, third)]
    for line in trained:
        cli._arguments(line)
    assert [line[2] for line in trained] == list(stages) and second.needs == (first.name,)
    assert [overrides_of(line).get("train.steps") for line in trained] == ["400", "2800", "3000"]
    workdirs = [step.workdir for step in (first, second, third)]
    assert [overrides_of(line).get("init_from") for line in trained] == [None, *workdirs[:2]]
    assert codes.arguments[2] == workdirs[2] == str(tmp_path / "tokenizer") and codes.needs == (third.name,)
    alone = [n * ledger.step_flops(config.load(path)) for path, n in stages.items()]
    assert arm.flops["tokenizer"] == pytest.approx(sum(alone)) and min(alone) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("total=1e12", "comparison_scenes_codes reads costs"),
        ("arms=dict.fromkeys('ab', trial.Arm(configs + '/smoke.py'))", "name configs of transformers"),
        (
            "arms=dict.fromkeys('ab', trial.Arm(configs + '/comparison_scenes.py:codes'))",
            "reads codes; name the tokenizer",
        ),
        (
            "arms=dict.fromkeys('ab', trial.Arm(configs + '/comparison_scenes.py:seeds'))",
            "has no arm 'seeds'; choose from",
        ),
        ("changes={'train.stepz': 1}", "train.stepz is not a setting"),
        ("changes={'evaluate.verifier': False}", "rates are chosen by what they find"),
    ],
)
def test_what_cannot_be_used_is_one_line(compare, written, tmp_path, capsys, changes, message):
    to = tmp_path / "runs"
    assert compare.main(["run", "--config", written(changes), "--to", str(to)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said and not to.exists()


def fake_rows(arm, workdir, codecs):
    """What a folder named lrRATE_seedN stands for; the arm "dear" costs more."""
    rate, seed = Path(workdir).name.removeprefix("lr").split("_seed")
    share = 0.5 + 0.01 * int(seed) - 0.1 * (rate != "2")
    results = {"t2i_all_correct": share, "caption_all_correct": share, "plain_perplexity": 2.0}
    drawn = {"text_to_image": {"guidance": 2.0}, "image_to_text": {}}
    cost, seen = {"training": 1.0 + (arm == "dear")}, {"images": 9.0}
    return [Row(arm, workdir, int(seed), float(rate), 5, 5, cost, seen, {}, drawn, results)]


@pytest.fixture
def finished(compare, monkeypatch, tmp_path):
    """(names of arms, names of workdirs that are not evaluated) → arguments of the table of what is there."""
    monkeypatch.setattr(ledger, "rows", fake_rows)
    plan = importlib.import_module("compare_plan")

    def make(*arms, missing=()):
        listed = ", ".join(f"{name!r}: trial.Arm('x.py')" for name in arms)
        changes = f"rates=(1.0, 2.0, 3.0), guidances=(2.0,), first_guidance=2.0, arms={{{listed}}}"
        path = tmp_path / "trial.py"
        path.write_text(TRIAL.format(configs="", changes=changes))
        monkeypatch.setattr(
            plan, "priced", lambda *_: [plan.Arm(name, "x.py", "x.py", 5, {"training": 1.0}) for name in arms]
        )
        for name in arms:
            for run in ("lr1_seed0", "lr2_seed0", "lr3_seed0", "lr2_seed1", "lr2_seed2"):
                folder = tmp_path / "runs" / name / run
                (folder / "checkpoints" / "5").mkdir(parents=True, exist_ok=True)
                if f"{name}/{run}" in missing:
                    continue
                (folder / "sampling").mkdir(exist_ok=True)
                (row,) = fake_rows(name, str(folder), {})
                tree = row.results | {"step": 5, "prompts": 9, "drawn_with": row.sampling}
                (folder / "sampling" / "2.json").write_text(json.dumps(tree))
        return ["table", "--config", str(path), "--to", str(tmp_path / "runs")]

    return make


def test_the_table_is_written_and_what_is_not_kept_is_an_error(compare, finished, tmp_path, capsys):
    arguments = finished("one", "two")
    assert compare.main(arguments) == 0
    result = tmp_path / "runs" / "result"
    text = (result / "comparison.md").read_text()
    assert "| one | 3 |" in text and "NOT KEPT" not in text and text in capsys.readouterr().out
    assert all(f"]({name}.png)" in text and (result / f"{name}.png").exists() for name in (*FIGURES, "rates"))
    tree = json.loads((result / "comparison.json").read_text())
    assert tree["made"]["machine"]["cores"] and str(tmp_path) not in tree["made"]["command"]
    assert len(tree["rows"]) == 10 and tree["arms"]["two"]["t2i_all_correct"]["value"] == pytest.approx(0.51)

    assert compare._samples(SimpleNamespace(found=SimpleNamespace(seeds=(0,))), None) == {}  # a trial of one seed

    again = [*arguments[:-1], str(tmp_path / "elsewhere"), "--known", str(result / "comparison.json")]
    assert compare.main(again) == 0 and (tmp_path / "elsewhere" / "result" / "comparison.md").read_text() == text

    arguments = [*finished("one", "dear"), "--out", str(tmp_path / "d")]
    assert compare.main(arguments) == 1
    out = capsys.readouterr().out
    assert "NOT KEPT: 1 of the protocol's demands." in out and "total training FLOPs are not equal" in out
    assert compare.main([*arguments, "--draft"]) == 0 and "NOT KEPT" in (tmp_path / "d" / "comparison.md").read_text()
    assert compare.main([*arguments[:-1], "/dev/null/x"]) == 2
    assert "cannot write to /dev/null/x: Not a directory" in capsys.readouterr().err


def test_what_is_not_there_is_said_and_the_rest_is_shown(compare, finished, capsys):
    runs = ("lr1_seed0", "lr2_seed0", "lr3_seed0", "lr2_seed1", "lr2_seed2")
    arguments = finished("one", "two", "three", missing=["two/lr2_seed2", *(f"three/{run}" for run in runs)])
    assert compare.main(arguments) == 1
    out = capsys.readouterr().out
    assert "- 8 of 30 steps are not done yet" in out and "| two | 2 |" in out and "| three |" not in out
    assert "- three is left out: none of its runs with seed 0 was evaluated" in out
    assert compare.main(finished("four", "five", missing=[f"{a}/{r}" for a in ("four", "five") for r in runs])) == 2
    assert "takes two arms or more, of which runs are evaluated; there is none" in capsys.readouterr().err
