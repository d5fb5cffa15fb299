"""Further ways through the verbs, with tiny models: edits of scenes, images that are drawn freely, spatial codes."""

import json

import pytest
from PIL import Image

from ddt_jax import cli

pytestmark = pytest.mark.slow
SMALL = ["width=32", "depth=1", "heads=2", "kv_heads=2"]
SMALL = [f"--config.model.transformer.{size}" for size in SMALL]
SMALL += [f"--config.train.{number}" for number in ("batch_size=8", "steps=2", "log_every=1")]
ASKED = ["--config.evaluate.prompts=4", "--config.evaluate.images=8", "--config.evaluate.pictures=1"]


def run(*arguments):
    assert cli.main([str(a) for a in arguments]) == 0


def evaluated(workdir, *more):
    run("evaluate", "--workdir", workdir, *ASKED, *more)
    return json.loads((workdir / "results.json").read_text())


def tokenizer_and_codes(root, config, *more, kinds):
    short = ["--config.train.steps=2", "--config.train.batch_size=8", "--config.train.tensorboard=False", *more]
    run("train", "--config", config, "--workdir", root / "tokenizer", *short)
    for folder, source in kinds.items():
        for split in ("train", "heldout"):
            to = ["--to", root / folder / split, "--source", f"{source}:{split}", "--records", 200]
            run("tokenize", "--workdir", root / "tokenizer", *to)


def test_edits_are_learned_drawn_and_judged(tmp_path, capsys):
    tokenizer_and_codes(tmp_path, "configs/smoke.py:linear", kinds={"codes": "scenes", "edits": "scenes_edits"})
    workdir = tmp_path / "editor"
    run("train", "--config", f"configs/llama_edits.py:{tmp_path}", "--workdir", workdir, *SMALL)
    results = evaluated(workdir)
    assert results["edits"] == results["prompts"] == results["edit_all_correct_n"] == 4
    assert {"edit_changed", "edit_kept_low", "t2i_all_correct"} <= results.keys() and "edit_valid" not in results
    assert "Edited pictures" in (workdir / "results.md").read_text()
    with Image.open(workdir / "editing.png") as picture:
        assert picture.width > 3 * 96
    # A model of two steps does not write four codes and an end: none is an image, and all are wrong.
    results = evaluated(workdir, "--config.evaluate.free_images=True")
    assert results["edit_valid"] == results["t2i_valid"] == 0 and results["edit_valid_n"] == 4
    assert not any(results[name] for name in ("edit_all_correct", "edit_changed", "edit_kept", "t2i_count"))
    out = ["--out", tmp_path / "g.png", "--config.evaluate.free_images=True"]
    run("generate", "--workdir", workdir, "--prompt", "a small red disc at the top left", *out)
    assert "1 of 1 answers are no image" in capsys.readouterr().out


def test_spatial_codes_go_the_same_way(tmp_path):
    tiny = ["--config.model.block_out_channels=(8, 8, 8, 8)", "--config.model.norm_groups=4"]
    tokenizer_and_codes(tmp_path, "configs/spatial_scenes.py", *tiny, kinds={"codes": "scenes"})
    workdir = tmp_path / "transformer"
    run("train", "--config", f"configs/llama_spatial_scenes.py:{tmp_path}", "--workdir", workdir, *SMALL)
    image = json.loads((workdir / "config.json").read_text())["model"]["image"]
    assert image["order"] == "none" and image["num_tokens"] == 16 and image["code_vectors"] and image["code_places"]
    results = evaluated(workdir)
    assert results["prompts"] == 4 and len(results["image_bits_by_position"]) == 16 and "edits" not in results
    assert (workdir / "text_to_image.png").exists() and not (workdir / "editing.png").exists()
