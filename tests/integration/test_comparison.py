"""A comparison from its plan to its table: every command as it is printed, of systems too small to mean anything."""

import importlib
import json
import shlex
from pathlib import Path

import pytest

from ddt_jax import cli

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SMALL = """
from ddt_jax import config, settings
def get_config(arm):
    c = config.sibling({configs!r}, "comparison_scenes").get_config(arm + ":{root}/" + arm)
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


def test_the_plan_of_a_comparison_leads_to_its_table(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    compare = importlib.import_module("compare")
    small = tmp_path / "small.py"
    small.write_text(SMALL.format(configs=str(ROOT / "configs" / "comparison_scenes.py"), root=tmp_path))
    arms = ["--arm", f"codes={small}:codes", "--tokenizer", f"codes={ROOT}/configs/smoke.py:linear"]
    arms += ["--arm", f"transfusion={small}:transfusion", "--to", str(tmp_path / "runs")]
    how = ["--steps", "40", "--rates", "3e-3", "--guidances", "2", "--seeds", "2"]
    how += ["--records", "40", "--held-out", "40"]

    def carry_out(*more):
        """The exit code of the last command, which makes the table."""
        assert compare.main(["plan", *arms, *how, *more]) == 0
        lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
        for line in lines[:-1]:
            assert cli.main(line[1:]) == 0
        return compare.main(lines[-1][2:])

    assert carry_out() == 0  # a draft
    draft = json.loads((tmp_path / "runs" / "draft" / "comparison.json").read_text())
    assert any("1 seeds at learning rate" in line for line in draft["violations"])
    chosen = [f"{arm}={found['lr']:g}" for arm, found in draft["arms"].items()]
    capsys.readouterr()
    assert carry_out("--chosen", chosen[0], "--chosen", chosen[1]) == 1
    found = json.loads((tmp_path / "runs" / "result" / "comparison.json").read_text())
    # All that is not kept is what was asked for: too few seeds, and grids of one rate.
    assert len(found["violations"]) == 4, found["violations"]
    assert sum("2 seeds at learning rate" in line for line in found["violations"]) == 2
    assert sum("is at the edge of its grid" in line for line in found["violations"]) == 2
    assert len(found["rows"]) == 2 * 2
    costs = [row["total_flops"] for row in found["rows"]]
    assert max(costs) / min(costs) < 1.02 and {"training", "tokenizer", "encoding"} == set(found["rows"][0]["flops"])
    for arm in found["arms"].values():
        assert arm["plain_perplexity"]["value"] > 1 and arm["t2i_all_correct"]["of"] == "answers"
    assert "NOT KEPT" in (tmp_path / "runs" / "result" / "comparison.md").read_text()
