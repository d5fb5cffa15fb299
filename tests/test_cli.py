"""The verbs as a user calls them: what they print, write and exit with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddt_jax import cli, cli_checkpoints, config, experiment, peers, replaying, settings
from ddt_jax.errors import Away, UserError
from ddt_jax.training import checkpoint, goodput, heartbeat
from ddt_jax.training.claim import claim
from ddt_jax.training.loop import EXIT_STOPPED
from ddt_jax.training.stored import Stored
from tests import xla

ROOT = Path(__file__).parents[1]
SMOKE = ["--config", str(ROOT / "configs" / "smoke.py:linear")]
SHORT = ["--config.train.steps=6", "--config.train.checkpoint_every=3", "--config.train.log_every=2"]
ENV = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags(1)}
ENV["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "inf"  # what is interrupted leaves no half-written program


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    assert run("train", *SMOKE, *SHORT, "--workdir", path, "--json", path / "train.json") == 0
    return path


@pytest.mark.smoke
def test_train_leaves_everything_a_run_needs(workdir):
    assert json.loads((workdir / "train.json").read_text())["finished"] is True
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"loss", "reconstruction", "commitment", "codebook_perplexity", "grad_norm", "learning_rate"} <= set(
        lines[0]
    )
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 6
    assert checkpoint.saved_steps(workdir) == [3, 6]
    assert list((workdir / "tensorboard").glob("events*"))


def test_a_finished_run_is_left_alone(workdir, capsys):
    before = experiment.digest(workdir)
    assert run("train", *SMOKE, *SHORT, "--workdir", workdir) == 0
    assert "finished at step 6" in capsys.readouterr().out
    assert experiment.digest(workdir) == before


@pytest.mark.smoke
def test_evaluate_writes_figures_and_pictures(workdir, tmp_path, capsys):
    assert run("evaluate", "--workdir", workdir, "--json", tmp_path / "sub" / "r.json") == 0
    results = json.loads((tmp_path / "sub" / "r.json").read_text())
    assert results == json.loads((workdir / "results.json").read_text())
    needed = {"psnr", "psnr_by_tokens", "scenes_all_correct", "codebook_perplexity", "train_seconds", "ssim"}
    assert needed <= set(results)
    assert results["scenes_all_correct_originals"] == 1.0
    out = capsys.readouterr().out
    for name in ("reconstructions.png", "psnr_by_tokens.png", "loss.png", "results.md"):
        assert (workdir / name).stat().st_size > 0 and name in out


def test_reconstruct_prints_codes(workdir, tmp_path, capsys):
    from PIL import Image

    picture = tmp_path / "a.png"
    Image.new("RGB", (50, 40), (200, 10, 10)).save(picture)
    assert run("reconstruct", "--workdir", workdir, "--out", tmp_path / "out.png", picture) == 0
    codes = capsys.readouterr().out.splitlines()[0].split(": ")[1].split()
    assert len(codes) == 4 and all(0 <= int(c) < 64 for c in codes)
    assert (tmp_path / "out.png").exists()


def test_data_and_config_and_checkpoint_report(workdir, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert run("data", *SMOKE, "--count", 8, "--out", out, "--json", tmp_path / "d.json") == 0
    assert json.loads((tmp_path / "d.json").read_text())["images"] == 1_000_000 and out.exists()
    capsys.readouterr()
    assert run("config", *SMOKE) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "smoke"
    assert run("checkpoint", "digest", "--workdir", workdir) == 0
    digest = capsys.readouterr().out.strip()
    assert len(digest) == 64 and digest == experiment.digest(workdir)


def test_checkpoints_are_listed_verified_compared_and_averaged(workdir, tmp_path, capsys):
    report = tmp_path / "r.json"

    def ask(*arguments, code=0):
        assert run("checkpoint", arguments[0], "--workdir", workdir, "--json", report, *arguments[1:]) == code
        return json.loads(report.read_text())

    rows = ask("list")["checkpoints"]
    assert [(row["step"], row["read_back"]) for row in rows] == [(3, True), (6, True)]
    assert rows[1]["bytes"] > 10_000 and rows[1]["metrics"]["loss"] > 0
    sound = {"files": "as written", "arrays": "as saved", "sound": True}
    assert ask("verify", "--deep")["checkpoints"] == [{"step": s, **sound} for s in (3, 6)]

    found = ask("diff", "--step", 3)
    names = [row["name"] for row in found["different"]]
    assert "params/up" in names and "rng" not in names and found["settings"] == []
    assert len(names) + found["equal"] == len(Stored(workdir / "checkpoints" / "3").names())
    mean = ask("average", "--to", tmp_path / "mean")
    assert mean["steps"] == [3, 6]
    stored = [
        Stored(path) for path in (*((workdir / "checkpoints" / n) for n in "36"), tmp_path / "mean/checkpoints/6")
    ]
    for name in ("params/up", "ema/down"):
        a, b, c = (x.read(name) for x in stored)
        np.testing.assert_array_equal(c, ((a.astype(np.float64) + b) / 2).astype(a.dtype))
    assert run("checkpoint", "average", "--workdir", workdir, "--to", tmp_path / "mean") == cli.EXIT_USER
    assert "holds checkpoints already" in capsys.readouterr().err

    shutil.copytree(workdir, tmp_path / "damaged")
    largest = max((tmp_path / "damaged/checkpoints/3/state").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert run("checkpoint", "verify", "--workdir", tmp_path / "damaged") == cli_checkpoints.EXIT_DAMAGED
    assert largest.name in capsys.readouterr().out


def test_a_replayed_step_equals_the_log_and_shows_where_it_does_not(workdir, tmp_path, capsys):
    assert run("replay", "--workdir", workdir, "--step", 5) == 0
    assert "replayed from the checkpoint at step 3" in (out := capsys.readouterr().out) and "equal in every bit" in out
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    content = bytearray((copy / "steps.f32").read_bytes())
    assert len(content) == 6 * 8
    content[3 * 8] ^= 1  # the last bit of the loss of step 4
    (copy / "steps.f32").write_bytes(content)
    assert run("replay", "--workdir", copy, "--step", 4, "--json", tmp_path / "r.json") == cli_checkpoints.EXIT_DAMAGED
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["from"], found["equal"], found["first_difference"], found["batch"]) == (3, False, 4, "as made")
    assert abs(found["logged"]["loss"] / found["replayed"]["loss"] - 1) < 1e-6
    assert run("replay", "--workdir", workdir, "--step", 7) == cli.EXIT_USER


def test_a_step_is_replayed_by_the_program_of_the_run(workdir, monkeypatch):
    """What it is called with has the shapes and the layout that the run's program was compiled for."""
    build, seen = experiment.build, []

    def watched(s):
        built = build(s)

        def step(state, batch):
            seen.append((batch, experiment.abstract_batch(built)))
            return built.step(state, batch)

        return replace(built, step=step)

    monkeypatch.setattr(experiment, "build", watched)
    replaying.replay(str(workdir), 4)
    ((batch, wanted),) = seen
    described = [{name: (x.shape, x.dtype, x.sharding) for name, x in rows.items()} for rows in (batch, wanted)]
    assert described[0] == described[1]


def test_what_is_away_is_one_line_and_a_code_to_start_again_after(monkeypatch, capsys):
    def away(args, overrides):
        raise Away("data: x is away; start it again")

    monkeypatch.setitem(cli._VERBS, "config", away)
    assert run("config", *SMOKE) == peers.EXIT_ALONE
    assert capsys.readouterr().err == "ddt-jax: data: x is away; start it again\n"


def test_a_run_from_before_a_setting_existed_goes_on(tmp_path):
    tree = config.dump(settings.Experiment())
    older = {**tree, "optimizer": {k: v for k, v in tree["optimizer"].items() if k != "spike_skip"}}
    (tmp_path / "config.json").write_text(json.dumps(older))
    claim(tmp_path, tree, lambda: pytest.fail("taken for a new run"))
    with pytest.raises(UserError, match=r"other settings \(optimizer.spike_skip\)"):
        claim(tmp_path, config.dump(config.from_dict(config.override(tree, (("optimizer.spike_skip", "6"),)))), None)


def test_other_settings_are_refused_by_name_unless_forced(workdir, capsys):
    other = ("train", *SMOKE, *SHORT, "--workdir", workdir, "--config.optimizer.lr=1e-4", "--config.mesh.fsdp=1")
    assert run(*other, "--config.mesh.data=-1") == cli.EXIT_USER
    assert "holds a run with other settings (optimizer.lr)" in capsys.readouterr().err
    assert run(*other, "--config.mesh.data=-1", "--force") == 0
    assert (
        f"--force: goes on with other settings than {workdir} was trained with: optimizer.lr" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "configs/none.py", "--workdir", "{tmp}"], "configs/none.py does not exist"),
        (["train", *SMOKE, "--workdir", "{tmp}", "--config.train.step=1"], "did you mean train.steps?"),
        (["train", *SMOKE, "--workdir", "{tmp}", "--config.train.steps"], "needs a value"),
        (["train", *SMOKE, "--workdir", "{tmp}", "--config.data.source=scense:train"], "scenes"),
        (["train", *SMOKE, "--workdir", "{tmp}", "--config.data.source=folder:/nowhere"], "/nowhere"),
        (["train", *SMOKE, "--workdir", "{tmp}", "--config.train.batch_size=12"], "does not divide over 8 devices"),
        (["train", *SMOKE, "--workdir", "{tmp}", "--num-processes", "2"], "--coordinator"),
        (["train", *SMOKE, "--workdir", "{run}"], "holds a run with other settings (train.steps)"),
        (["train", *SMOKE, "--workdir", "/proc/none"], "cannot write to /proc/none"),
        (["evaluate", "--workdir", "{tmp}"], "holds no run"),
        (["evaluate", "--workdir", "{run}", "--config.evaluate.image=3"], "did you mean evaluate.images?"),
        (["evaluate", "--workdir", "{run}", "--config.data.eval_source=digits:test"], "evaluate.verifier"),
        (["reconstruct", "--workdir", "{run}", "/nowhere.png"], "/nowhere.png does not exist"),
        (["reconstruct", "--workdir", "{run}", __file__], "cannot be read"),
        (["config", *SMOKE, "--json", "/proc/none/x.json"], "cannot write /proc/none/x.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(workdir, tmp_path, capsys, arguments, message):
    places = {"{tmp}": str(tmp_path), "{run}": str(workdir)}
    assert run(*[places.get(a, a) for a in arguments]) == cli.EXIT_USER
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error and error.splitlines()[-1].startswith("ddt-jax: ")


def test_a_run_says_where_its_time_went_and_that_it_has_ended(workdir):
    accounts = goodput.read(workdir)
    seconds, whole = accounts["seconds"], json.loads((workdir / "timing.json").read_text())["train_seconds"]
    assert {"init", "compile", "step", "checkpoint"} <= set(seconds) <= set(goodput.KINDS) and "lost" not in seconds
    assert 0.3 * whole < sum(seconds.values()) < whole + 0.1  # all but closing files, once each
    assert accounts["tries"] == 1 and accounts["peak_host_bytes"] > 100 << 20
    (beat,) = heartbeat.read(workdir)
    assert (beat["process"], beat["step"], beat["phase"]) == (0, 6, "ended")


def test_what_is_compiled_is_kept_with_the_run_unless_another_place_is_named(tmp_path, monkeypatch):
    name, run_folder = "JAX_COMPILATION_CACHE_DIR", tmp_path / "run"
    monkeypatch.delenv(name, raising=False)
    assert run("config", *SMOKE) == 0 and name not in os.environ  # of no run
    assert run("train", "--config", "configs/none.py", "--workdir", run_folder) == cli.EXIT_USER
    assert os.environ[name] == f"{run_folder}/compiled"
    monkeypatch.setenv(name, "elsewhere")
    assert run("train", "--config", "configs/none.py", "--workdir", run_folder) == cli.EXIT_USER
    assert os.environ[name] == "elsewhere"


def test_help_of_every_verb_explains_itself(capsys):
    for verb in cli._VERBS:
        with pytest.raises(SystemExit) as done:
            run(verb, "--help")
        assert done.value.code == 0
        assert len(capsys.readouterr().out) > 150


def start(workdir, *more):
    command = [sys.executable, "-m", "ddt_jax.cli", "train", *SMOKE, "--workdir", str(workdir), *more]
    return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_log(process, path, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if path.exists() and path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no line in {path}: {process.communicate()}")


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_leaves_nothing_behind(tmp_path):
    more = ["--config.train.steps=100000", "--config.train.log_every=1"]
    process = start(tmp_path, *more)
    wait_for_log(process, tmp_path / "metrics.jsonl")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, err
    assert "the same command goes on" in out
    assert "Traceback" not in err and "Warning" not in err and "SIGINT: saving after this step" in err
    assert len(checkpoint.saved_steps(tmp_path)) == 1


@pytest.mark.slow
def test_a_second_ctrl_c_quits_at_once(tmp_path):
    process = start(tmp_path, "--config.train.steps=100000", "--config.train.log_every=1")
    wait_for_log(process, tmp_path / "metrics.jsonl")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, EXIT_STOPPED, 130)  # 75: it was quicker than the second signal
