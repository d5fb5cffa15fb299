"""Evaluation and comparison of whole runs: which figures there are, and what is said about those that are not."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ddt_jax import cli, judging
from ddt_jax.evaluation import judges, metrics
from ddt_jax.io import torch_file
from ddt_jax.nn import inception
from tests.integration.test_survival import environment, finish
from tests.nn.test_lpips import weights as lpips_weights

ROOT = Path(__file__).parents[1]
SMALL = ["--config.evaluate.images=40", "--config.evaluate.batch_size=16", "--config.evaluate.probe_images=60"]
ALL_PICTURES = {"reconstructions", "psnr_by_tokens", "codebook_usage", "counterfactuals", "probes", "entropy", "loss"}


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on images with labels, of few steps."""
    workdir = tmp_path_factory.mktemp("digits")
    more = ["--config.train.steps=8", "--config.data.source=digits:train", "--config.data.eval_source=digits:test"]
    more += ["--config.evaluate.verifier=False", *SMALL]
    assert run("train", "--config", ROOT / "configs" / "smoke.py:linear", "--workdir", workdir, *more) == 0
    return workdir


def evaluate(workdir, *more):
    assert run("evaluate", "--workdir", workdir, *more) == 0
    return json.loads((workdir / "results.json").read_text())


def left_out(results, what):
    return [line for line in results["left_out"] if line.startswith(what)]


def test_evaluation_with_labels_has_probes_entropies_and_pictures(digits, capsys):
    results = evaluate(digits)
    assert results["n"] == results["probe_test_images"] == 40 and results["probe_images"] == 60
    for name in ("probe_linear", "probe_knn"):
        assert results[name] == results[f"{name}_by_tokens"]["4"]
        low, high = results[f"{name}_interval"]
        assert low <= results[name] <= high
    assert 0.1 <= results["probe_chance"] < 0.3
    assert list(results["entropy_by_stride"]) == ["1", "2", "4"]
    assert all(len(values) == 4 for values in results["entropy_by_place"].values())
    assert results["bits_per_image"] == 4 * 6 and results["eval_source"] == "digits:test"
    assert set(results["counterfactual_nearer_b"]) == {"first", "middle", "last"}
    assert left_out(results, "LPIPS") and left_out(results, "rFID") and len(results["left_out"]) == 2
    assert not [name for name, value in results.items() if value is None]
    assert {path.stem for path in digits.glob("*.png")} == ALL_PICTURES
    output = capsys.readouterr()
    assert "image 40/40  100%" in output.err and "- rFID: set evaluate.inception_file" in output.out
    assert str(digits / "probes.png") in output.out


def test_weights_by_path_give_lpips_and_rfid_whose_originals_are_computed_once(digits, tmp_path, monkeypatch, capsys):
    for name, part in zip(("backbone", "heads"), lpips_weights("alexnet"), strict=True):
        torch_file.save(tmp_path / f"{name}.pth", part)
    (tmp_path / "fid.pth").write_bytes(b"weights")
    traced = []
    monkeypatch.setattr(inception, "FEATURES", 3)
    monkeypatch.setattr(inception, "load", lambda path: {"scale": np.float32(1)})
    monkeypatch.setattr(inception, "features", lambda params, x: x.mean((1, 2)) * params["scale"])
    add = judges.RFID._add
    monkeypatch.setattr(judges.RFID, "_add", lambda self, *a: traced.append(1) or add(self, *a))
    files = [f"--config.evaluate.lpips_{name}_file={tmp_path / name}.pth" for name in ("backbone", "heads")]
    files += [f"--config.evaluate.inception_file={tmp_path / 'fid.pth'}", f"--config.data.cache_dir={tmp_path / 'c'}"]
    saved = tmp_path / "png"
    results = evaluate(digits, *files, f"--config.evaluate.save_images={saved}")
    assert results["lpips"] > 0 and results["rfid"] > 0 and results["rfid_images"] == 40 and not results["left_out"]
    assert len(traced) == 2 * 3
    pairs = [np.stack([np.asarray(Image.open(p)) for p in sorted((saved / d).iterdir())]) for d in
             ("originals", "reconstructions")]  # fmt: skip
    assert metrics.psnr(*pairs).mean() == pytest.approx(results["psnr"], rel=1e-12)
    less = ["--config.evaluate.probe_images=0", "--config.evaluate.counterfactuals=0"]
    again = evaluate(digits, *files, *less, "--config.evaluate.pictures=0")
    assert len(traced) == 2 * 3 + 3 and again["rfid"] == pytest.approx(results["rfid"], rel=1e-9)
    assert (
        left_out(again, "counterfactuals") and left_out(again, "probes and entropies") and len(again["left_out"]) == 2
    )
    capsys.readouterr()
    assert run("evaluate", "--workdir", digits, f"--config.evaluate.save_images={saved}") == cli.EXIT_USER
    assert "holds images already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.evaluate.lpips_heads_file=x"], "go together"),
        (["--config.evaluate.inception_file=/nowhere.pth"], "/nowhere.pth"),
        (["--config.evaluate.batch_size=12"], "does not divide over 8 devices"),
        (["--config.evaluate.probe_images=-1"], "must not be negative"),
    ],
)
def test_mistakes_are_one_line(digits, capsys, arguments, message):
    assert run("evaluate", "--workdir", digits, *arguments) == cli.EXIT_USER
    error = capsys.readouterr().err.strip()
    assert message in error and error.splitlines()[-1].startswith("ddt-jax: ")


def test_small_images_are_no_reason_to_fail_late(digits, capsys):
    files = [f"--config.evaluate.lpips_{name}_file=x.pth" for name in ("backbone", "heads")]
    assert run("evaluate", "--workdir", digits, "--config.data.image_size=16", *files) == cli.EXIT_USER
    assert "needs images of 31 pixels or more" in capsys.readouterr().err


def fake_run(folder, **results):
    folder.mkdir(parents=True)
    base = {"psnr_by_tokens": {"2": 17.0, "16": 28.0}, "codebook_size": 512, "num_tokens": 16, "psnr": 28.0, "n": 64}
    (folder / "results.json").write_text(json.dumps(base | {"eval_source": "scenes:heldout"} | results))
    return folder


def test_compare_puts_runs_side_by_side(tmp_path, capsys):
    a = fake_run(tmp_path / "ddt" / "seed0", rfid=2.0, rfid_images=100)
    b = fake_run(tmp_path / "spatial" / "seed0", rfid=3.0, rfid_images=5000, eval_source="digits:test")
    assert run("compare", a, b, "--out", tmp_path / "c.png", "--json", tmp_path / "c.json") == 0
    out = capsys.readouterr().out
    assert "| ddt/seed0 |" in out and "| spatial/seed0 |" in out
    assert "rFID falls with the number of images, which differs: ddt/seed0 100, spatial/seed0 5,000." in out
    assert "Not the same held-out images" in out
    assert set(json.loads((tmp_path / "c.json").read_text())) == {"ddt/seed0", "spatial/seed0"}
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 400
    alike = judging.compare([str(a)], str(tmp_path / "one.png"))
    assert list(alike["runs"]) == ["seed0"] and "Not the same" not in alike["table"]


def test_compare_says_what_cannot_be_compared(tmp_path, capsys):
    a, empty = fake_run(tmp_path / "a"), tmp_path / "empty"
    broken = fake_run(tmp_path / "broken")
    (broken / "results.json").write_text("{")
    for arguments, message in [
        ([a, empty], f"run `ddt-jax evaluate --workdir {empty}`"),
        ([a, a], "is named twice"),
        ([a, broken], "is no JSON"),
        ([a, "--config.seed=1"], "takes no settings"),
    ]:
        assert run("compare", *arguments, "--out", tmp_path / "x.png") == cli.EXIT_USER
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_two_processes_evaluate_as_one(digits):
    one = evaluate(digits)
    command = [sys.executable, "-m", "ddt_jax.cli", "evaluate", "--workdir", str(digits), "--num-processes", "2"]
    command += ["--coordinator", f"127.0.0.1:{free_port()}"]
    processes = [
        subprocess.Popen(
            [*command, "--process-id", str(i)],
            cwd=ROOT,
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for i in range(2)
    ]
    try:
        outputs = [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    two = json.loads((digits / "results.json").read_text())
    assert "written:" in outputs[0]
    # "The image before", B of a pair and the classifier's ties follow the order in which processes hold the images.
    moved = {"psnr_wrong_image_codes", "counterfactual_nearer_b", "evaluate_seconds"}
    for name in set(one) - moved:
        for (path, a), (_, b) in zip(leaves(two[name]), leaves(one[name]), strict=True):
            assert a == (b if isinstance(b, str) else pytest.approx(b, rel=1e-5)), (name, path)


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
