"""tools/compare.py: the commands of a plan keep the protocol, the table is written, and what is wrong is one line."""

import importlib
import json
import shlex
from pathlib import Path

import pytest

from ddt_jax import cli, config, ledger
from ddt_jax.evaluation.comparison import Row

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"{ROOT}/configs/comparison_scenes.py"
TOKENIZER = f"{ROOT}/configs/quickstart.py"
ARMS = [
    "--arm",
    f"codes={CONFIG}:codes",
    "--tokenizer",
    f"codes={TOKENIZER}",
    "--arm",
    f"denoised={CONFIG}:transfusion",
]


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("compare")


def lines_of(text):
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


def overrides_of(line):
    return dict(text.removeprefix("--config.").split("=") for text in line if text.startswith("--config."))


def test_a_plan_has_a_grid_of_equal_cost_and_then_seeds_and_a_sweep(compare, capsys, tmp_path):
    to = str(tmp_path / "runs")
    assert compare.main(["plan", *ARMS, "--to", to, "--records", "1000", "--held-out", "50"]) == 0
    lines = lines_of(capsys.readouterr().out)
    for line in lines[:-1]:
        assert line[0] == "ddt-jax"
        cli._arguments(line[1:])  # the command line accepts it
    assert [line[1] for line in lines[:3]] == ["train", "tokenize", "tokenize"]
    assert [line[line.index("--records") + 1] for line in lines[1:3]] == ["1000", "50"]
    trained = [line for line in lines[3:] if line[1] == "train"]
    assert [float(overrides_of(line)["optimizer.lr"]) for line in trained] == [1.5e-3, 3e-3, 6e-3] * 2
    assert {overrides_of(line)["seed"] for line in trained} == {"0"}
    steps = {line[3]: int(overrides_of(line)["train.steps"]) for line in trained}
    codes, denoised = (config.load(path) for path in steps)
    assert steps[f"{CONFIG}:codes"] == codes.train.steps
    plans = ledger.plan(codes, config.load(TOKENIZER), 1000), ledger.plan(denoised)
    costs = [plan.total(count) for plan, count in zip(plans, steps.values(), strict=True)]
    assert costs[1] == pytest.approx(costs[0], rel=1e-3) and plans[1].step > plans[0].step
    assert lines[-1][1] == "tools/compare.py" and lines[-1][-1] == "--draft"
    assert len(lines[-1][lines[-1].index("--arm") + 1].split(",")) == 3

    chosen = ["--chosen", "codes=3e-3", "--chosen", "denoised=6e-3", "--guidances", "1.5,4", "--seeds", "4"]
    assert compare.main(["plan", *ARMS, *chosen, "--to", to]) == 0
    lines = lines_of(capsys.readouterr().out)
    trained = [line for line in lines if line[1] == "train"]
    assert sorted(overrides_of(line)["seed"] for line in trained) == ["1", "1", "2", "2", "3", "3"]  # 0 is the grid's
    swept = [line for line in lines if line[1] == "evaluate"]
    guidance = "evaluate.text_to_image.guidance"
    assert [overrides_of(line)[guidance] for line in swept] == ["1.5", "2", "4"] * 8  # that of the grid is among them
    assert len({line[-1] for line in swept}) == 24 and all(f"/{ledger.SAMPLING}/" in line[-1] for line in swept)
    given = dict(text.split("=") for flag, text in zip(lines[-1], lines[-1][1:], strict=False) if flag == "--arm")
    assert {name: len(runs.split(",")) for name, runs in given.items()} == {"codes": 6, "denoised": 6}
    assert "--draft" not in lines[-1]


@pytest.mark.slow
def test_stages_of_a_tokenizer_are_trained_in_turn_and_all_of_them_are_paid(compare, capsys, tmp_path):
    """SEED's three, each begins with the one before; codes are made by the last."""
    seed = f"{ROOT}/configs/seed_scenes.py"
    stages = [f"{seed}:align@400", f"{seed}:codes", f"{seed}:draw"]
    arms = ["--arm", f"seed={CONFIG}:seed:{tmp_path}", "--tokenizer", f"seed={','.join(stages)}"]
    assert compare.main(["plan", *arms, "--to", str(tmp_path), "--records", "1000", "--held-out", "50"]) == 0
    out = capsys.readouterr().out
    trained = [line for line in lines_of(out) if line[1] == "train"][:3]
    for line in trained:
        cli._arguments(line[1:])
    assert [line[3] for line in trained] == [stage.partition("@")[0] for stage in stages]
    assert [overrides_of(line).get("train.steps") for line in trained] == ["400", None, None]
    workdirs = [line[5] for line in trained]
    assert [overrides_of(line).get("init_from") for line in trained] == [None, *workdirs[:2]]
    assert lines_of(out)[3][3] == workdirs[2] == str(tmp_path / "tokenizer")
    *earlier, draw = [config.load(*compare.stage_of(stage)) for stage in stages]
    transformer = config.load(f"{CONFIG}:seed:{tmp_path}")
    paid = ledger.plan(transformer, draw, 1000, earlier).before["tokenizer"]
    alone = [stage.train.steps * ledger.step_flops(stage) for stage in (*earlier, draw)]
    assert paid == sum(alone) and min(alone) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--arm", "codes", "--to", "x"], "--arm codes is not NAME=VALUE"),
        (["plan", *ARMS, *ARMS[:2], "--to", "x"], "--arm codes is given twice"),
        (["plan", *ARMS[:2], "--to", "x"], "comparison_scenes_codes reads codes; give --tokenizer ARM=CONFIG"),
        (["plan", *ARMS, "--tokenizer", "b=c", "--to", "x"], "there is no such --arm; there are codes, denoised"),
        (["plan", *ARMS, "--chosen", "codes=fast", "--to", "x"], "--chosen codes=fast is not a number above 0"),
        (
            ["plan", *ARMS[:2], "--tokenizer", f"codes={TOKENIZER}@x", "--to", "x"],
            "x is no number of steps; write CONFIG@",
        ),
        (["plan", *ARMS, "--rates", "1,-1", "--to", "x"], "--rates=-1 is not a number above 0"),
        (["plan", *ARMS, "--seeds", "0", "--to", "x"], "must be at least 1"),
        (["plan", "--arm", f"a={ROOT}/configs/smoke.py", "--to", "x"], "name configs of transformers"),
        (["plan", "--arm", f"a={CONFIG}:seeds", "--to", "x"], "has no arm 'seeds'; choose from codes, unordered"),
        (["--arm", "a=/nowhere/x", "--to", "/dev/null/x"], "cannot write to /dev/null/x: Not a directory"),
    ],
)
def test_what_cannot_be_used_is_one_line(compare, capsys, arguments, message):
    assert compare.main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in said and not Path("x").exists()


def test_a_workdir_without_a_run_is_one_line(compare, tmp_path, capsys):
    assert compare.main(["--arm", "a=/nowhere/x", "--to", str(tmp_path)]) == 2
    assert "/nowhere/x holds no run" in capsys.readouterr().err and not list(tmp_path.iterdir())


def fake_rows(arm, workdir, codecs):
    """What a directory named RATE_SEED stands for; "b/..." costs more."""
    rate, seed = Path(workdir).name.split("_")
    share = 0.5 + 0.01 * int(seed) - 0.1 * (rate != "2")
    results = {"t2i_all_correct": share, "caption_all_correct": share, "plain_perplexity": 2.0}
    drawn = {"text_to_image": {"guidance": 2.0}, "image_to_text": {}}
    cost, seen = {"training": 1.0 + ("b" in Path(workdir).parts)}, {"images": 9.0}
    return [Row(arm, workdir, int(seed), float(rate), 5, 5, cost, seen, {}, drawn, results)]


def test_the_table_is_written_and_what_is_not_kept_is_an_error(compare, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ledger, "rows", fake_rows)
    runs = ("1_0", "2_0", "3_0", "2_1", "2_2")
    equal = [f"{arm}={','.join(f'runs/{run}' for run in runs)}" for arm in ("one", "two")]
    arguments = ["--arm", equal[0], "--arm", equal[1], "--to", str(tmp_path / "c")]
    assert compare.main(arguments) == 0
    text = (tmp_path / "c" / "comparison.md").read_text()
    assert "| one | 3 |" in text and "NOT KEPT" not in text and text in capsys.readouterr().out
    tree = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert len(tree["rows"]) == 10 and tree["arms"]["two"]["t2i_all_correct"]["value"] == pytest.approx(0.51)

    dear = f"two={','.join(f'b/{run}' for run in runs)}"
    arguments = ["--arm", equal[0], "--arm", dear, "--to", str(tmp_path / "d")]
    assert compare.main(arguments) == 1
    out = capsys.readouterr().out
    assert "NOT KEPT: 1 of the protocol's demands." in out and "total training FLOPs are not equal" in out
    assert compare.main([*arguments, "--draft"]) == 0 and "NOT KEPT" in (tmp_path / "d" / "comparison.md").read_text()
    assert compare.main([*arguments, "--tolerance", "1.1"]) == 0
