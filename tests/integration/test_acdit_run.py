"""The whole way of a run that draws images block by block, by the verbs."""

import json

import pytest
from PIL import Image

from ddt_jax import cli

pytestmark = pytest.mark.slow
SMALL = [
    "--config.model.depth=1",
    "--config.model.width=32",
    "--config.model.diffusion.solver_steps=3",
    "--config.train.steps=30",
    "--config.train.batch_size=8",
    "--config.train.log_every=5",
    "--config.train.eval_every=15",
    "--config.train.ema=0.9",
    "--config.evaluate.images=24",
    "--config.evaluate.batch_size=8",
    "--config.evaluate.pictures=4",
    "--config.evaluate.prompts=8",
    "--config.evaluate.probe_images=24",
]


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def test_it_trains_is_measured_and_draws(tmp_path, capsys):
    root = tmp_path / "run"
    train = ["train", "--config", "configs/acdit_scenes.py", "--workdir", root, *SMALL]
    assert run(*train) == 0
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    (half_way,) = (line for line in lines if line["step"] == 15 and "eval/diffusion" in line)
    logged = [line["diffusion"] for line in lines if "diffusion" in line]
    assert logged[-1] < 0.95 * logged[0] and half_way["eval/drawn"] == 4
    assert run(*train) == 0, "a finished run is left alone"
    assert run("evaluate", "--workdir", root) == 0
    results = json.loads((root / "results.json").read_text())
    assert results["diffusion"] < half_way["eval/diffusion"] and results["drawn"] == 8
    assert len(results["mse_by_block"]) == 4 and 0 <= results["scenes_count"] <= 1
    assert 0 <= results["probe_linear"] <= 1 and results["probe_images"] == 24 and results["probe_depth"] == 1
    for name in ("samples.png", "loss.png"):
        with Image.open(root / name) as picture:
            assert picture.width > 100
    capsys.readouterr()
    for verb in (["reconstruct", root / "samples.png"], ["tokenize", "--to", tmp_path / "codes"], ["generate"]):
        arguments = [verb[0], "--workdir", root, *verb[1:]] + (["--prompt", "a"] if verb == ["generate"] else [])
        assert run(*arguments) == cli.EXIT_USER
        assert capsys.readouterr().err.count("\n") == 1, verb


def test_clips_are_learned_measured_and_drawn_beyond_their_length(tmp_path, capsys):
    root, out = tmp_path / "run", tmp_path / "longer.png"
    small = [x for x in SMALL if "eval_every" not in x and "width" not in x]
    small += ["--config.model.width=48", "--config.model.heads=3", "--config.train.steps=6", "--config.data.frames=8"]
    assert run("train", "--config", "configs/acdit_moving_scenes.py", "--workdir", root, *small) == 0
    assert run("evaluate", "--workdir", root) == 0
    results = json.loads((root / "results.json").read_text())
    assert len(results["mse_by_block"]) == 2 and 0 <= results["scenes_direction"] <= 1
    with Image.open(root / "samples.gif") as moving:
        assert moving.n_frames == 8
    asked = ["--class", "left", "--class", "11", "--samples", "2", "--frames", "16", "--out", out]
    assert run("generate", "--workdir", root, *asked) == 0
    with Image.open(out.with_suffix(".gif")) as moving:
        assert moving.n_frames > 8  # a GIF joins frames that are alike
    capsys.readouterr()
    for wrong, why in (
        (["--class", "sideways"], "--class sideways is none of the run's 12 classes (from 0); choose from left, right"),
        (["--frames", "10"], "10 frames are no whole number of blocks of 4 frames"),
        (["--prompt", "a"], "draws classes and knows no text (model.caption_bytes=0); leave out 'a'"),
    ):
        assert run("generate", "--workdir", root, *wrong) == cli.EXIT_USER
        assert why in capsys.readouterr().err


def test_it_learns_classes_of_photographs_and_to_tell_them_apart(data_dir, tmp_path, capsys):
    root, classes = tmp_path / "run", tmp_path / "classes"
    small = [x for x in SMALL if "eval_every" not in x] + ["--config.train.steps=5"]
    data = f"parquet:{data_dir}/cifar10/train-0000"
    sources = [f"--config.data.source={data}0-of-00005.parquet", f"--config.data.eval_source={data}4-of-00005.parquet"]
    assert run("train", "--config", "configs/acdit_cifar10.py", "--workdir", root, *small, *sources) == 0
    assert run("evaluate", "--workdir", root) == 0
    assert "scenes: evaluate.verifier is False" in json.loads((root / "results.json").read_text())["left_out"]
    capsys.readouterr()
    small = [x for x in small if "solver_steps" not in x]
    small += ["--config.train.eval_every=3", f"--config.init_from={root}"]
    assert run("train", "--config", "configs/acdit_cifar10.py:classify", "--workdir", classes, *small, *sources) == 0
    said = capsys.readouterr().err
    assert "copied: params/into (1), params/place (1), params/stack (" in said and "fresh: params/head/" in said
    assert run("evaluate", "--workdir", classes) == 0
    results = json.loads((classes / "results.json").read_text())
    assert results["n"] == 24 and 0 <= results["accuracy"] <= 1 and "left_out" in results
    lines = [json.loads(line) for line in (classes / "metrics.jsonl").read_text().splitlines()]
    (half_way,) = (line for line in lines if "eval/accuracy" in line)
    assert half_way["step"] == 3 and half_way["eval/n"] == 24 and any("cross_entropy" in line for line in lines)
    capsys.readouterr()
    nothing = ["generate", "--prompt", "a"], ["reconstruct", root / "samples.png"], ["tokenize", "--to", root / "codes"]
    for verb, *more in nothing:
        assert run(verb, "--workdir", classes, *more) == cli.EXIT_USER
        assert capsys.readouterr().err.count("\n") == 1, verb
