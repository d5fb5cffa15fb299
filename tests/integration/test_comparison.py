"""A comparison from its plan to its table: every step as it is run, of systems too small to mean anything."""

import importlib
import json
from pathlib import Path

import pytest

from ddt_jax import cli
from ddt_jax.scaling import trial

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SMALL = """
from ddt_jax import config, settings
def get_config(variant):
    arm, _, root = variant.partition(":")
    c = config.sibling({configs!r}, "comparison_scenes").get_config(variant)
    t = c.model.transformer
    t.width, t.mlp_width, t.depth, t.heads, t.kv_heads = 16, 32, 1, 2, 2
    c.sequences.context = 256
    c.sequences.targets = 0
    for part in (*c.sequences.sources, *c.sequences.eval_sources):
        if part["kind"] == "pictures":
            part["records"] = 40
    c.data.cache_dir = "{root}/cache"
    c.train.batch_size, c.train.tensorboard = 8, False
    c.evaluate.images, c.evaluate.prompts, c.evaluate.pictures = 8, 3, 1
    if arm == "transfusion":
        c.model.image.diffusion.solver_steps = 2
    return c
"""
TRIAL = """
from ddt_jax.scaling import trial
def get_trial():
    return trial.Trial(
        name="small",
        arms={{
            "codes": trial.Arm("small.py:codes:{{root}}/codes", {{"{configs}/smoke.py:linear": 10}}),
            "transfusion": trial.Arm("small.py:transfusion"),
        }},
        total=6e9, tolerance=0.1, rates=(3e-3,), guidances=(2.0,), first_guidance=2.0, seeds=(0, 1),
        records=40, held_out=40,
    )
"""


def test_the_steps_of_a_comparison_lead_to_its_table(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    compare, compare_plan, compare_run = map(importlib.import_module, ("compare", "compare_plan", "compare_run"))
    configs, runs, file = ROOT / "configs", tmp_path / "runs", tmp_path / "trial.py"
    (tmp_path / "small.py").write_text(SMALL.format(configs=str(configs / "comparison_scenes.py"), root=tmp_path))
    file.write_text(TRIAL.format(configs=configs))
    found = trial.load(str(file))
    arms = compare_plan.priced(found, str(file), str(runs))
    taken = []
    # What is done is told by what was made: these processes have left no records.
    while ready := compare_run.Work(found, arms, str(runs)).ready():
        taken.append(ready[0].name)
        assert cli.main(list(ready[0].arguments)) == 0
    assert len(taken) == len(set(taken)) == 12, taken
    assert compare.main(["run", "--config", str(file), "--to", str(runs)]) == 1  # nothing is left to run
    found = json.loads((runs / "result" / "comparison.json").read_text())
    # All that is not kept is what was asked for: too few seeds, and grids of one rate.
    assert len(found["violations"]) == 4, found["violations"]
    assert sum("2 seeds at learning rate" in line for line in found["violations"]) == 2
    assert sum("is at the edge of its grid" in line for line in found["violations"]) == 2
    assert len(found["rows"]) == 2 * 2
    costs = [row["total_flops"] for row in found["rows"]]
    assert max(costs) / min(costs) < 1.1 and {"training", "tokenizer", "encoding"} == set(found["rows"][0]["flops"])
    for arm in found["arms"].values():
        assert arm["plain_perplexity"]["value"] > 1 and arm["t2i_all_correct"]["of"] == "answers"
    text = (runs / "result" / "comparison.md").read_text()
    assert "NOT KEPT" in text and "| image tokenizer of | PSNR" in text
