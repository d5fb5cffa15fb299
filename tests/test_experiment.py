"""What a training finds out before it has begun: nothing is written, and no data are read that need not be."""

import json
from dataclasses import replace

import pytest

from ddt_jax import config, experiment
from ddt_jax.errors import UserError
from ddt_jax.training import corpus, feed, loop
from tests.test_cli import ROOT

LINEAR = str(ROOT / "configs" / "smoke.py:linear")


def settings_with(**changes):
    return config.load(LINEAR, tuple((name.replace("__", "."), str(value)) for name, value in changes.items()))


@pytest.fixture
def untrained(monkeypatch):
    """Ends a training where its first step would come."""

    class Begun(Exception):
        pass

    def begin(*args, **kwargs):
        raise Begun

    monkeypatch.setattr(loop, "train", begin)
    return Begun


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__eval_source": "folder:/nowhere/typo"}, "/nowhere/typo"),
        ({"data__eval_source": "digits:test", "evaluate__verifier": True}, "set evaluate.verifier=False"),
    ],
)
def test_what_it_is_to_be_measured_on_is_opened_before_it_begins(tmp_path, untrained, changes, message):
    with pytest.raises(UserError, match=message):
        experiment.train(settings_with(train__eval_every=2, **changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(untrained):  # it is not measured before it has ended
        experiment.train(settings_with(**changes), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__fsdp": 3, "mesh__data": 1}, "mesh"),
        ({"train__batch_size": 30, "mesh__data": 1, "mesh__fsdp": 8}, "train.batch_size"),
        ({"optimizer__lr": 0.5}, r"holds a run with other settings \(optimizer.lr\)"),
    ],
)
def test_mesh_batch_and_workdir_come_before_data(tmp_path, monkeypatch, changes, message):
    experiment.claim(tmp_path, config.dump(settings_with()), lambda: None)
    monkeypatch.setattr(feed, "open_feed", lambda *args: pytest.fail("data were opened"))
    with pytest.raises(UserError, match=message):
        experiment.train(settings_with(**changes), str(tmp_path))


def test_what_a_run_keeps_of_its_data_is_kept_whole_or_again(tmp_path, untrained, monkeypatch):
    """A save that failed behind the run's settings is made good by the next start."""
    root = str(ROOT / "configs" / "transfusion_scenes.py")
    s = config.load(root, (("train.batch_size", "8"), ("data.cache_dir", str(tmp_path / "cache"))))
    sources = (replace(s.sequences.sources[0], records=300),)
    s = replace(s, sequences=replace(s.sequences, sources=sources, eval_sources=sources, targets=0))
    save = corpus.save
    monkeypatch.setattr(corpus, "save", lambda *args: (_ for _ in ()).throw(UserError("no space left")))
    with pytest.raises(UserError, match="no space left"):
        experiment.train(s, str(tmp_path / "run"))
    monkeypatch.setattr(corpus, "save", save)
    with pytest.raises(untrained):
        experiment.train(s, str(tmp_path / "run"))
    kept = {path.name for path in (tmp_path / "run").rglob("*.json")}
    assert {"vocabulary.json", "data.json"} <= kept


def test_a_run_that_has_its_settings_alone_keeps_what_its_data_are(tmp_path, untrained):
    """One that was imported, or that was killed behind them."""
    s = settings_with()
    experiment.claim(tmp_path, config.dump(s), lambda: None)
    with pytest.raises(untrained):
        experiment.train(s, str(tmp_path))
    ((name, count),) = json.loads((tmp_path / "data.json").read_text())["records"]
    assert name == "scenes:train" and count > 0
