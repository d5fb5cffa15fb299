"""Codes of a trained tokenizer, made by the command line as a user would."""

import gc
import json
import shutil
import types
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import cli, experiment, settings, speaking, tokenize
from ddt_jax.data.base import open_source
from ddt_jax.data.codes import CodesSource
from ddt_jax.errors import UserError
from ddt_jax.multimodal.records import text_lengths
from ddt_jax.tokenizers.base import make_tokenizer, to_float
from ddt_jax.tokenizers.text import train_sentencepiece
from ddt_jax.training.loop import EXIT_STOPPED

SMOKE = ["--config", str(Path(__file__).parents[1] / "configs" / "smoke.py:linear")]
SMALL = ["--records", 50, "--shard-records", 20, "--batch-size", 6]  # 6 is no multiple of 8 devices, and 20 none of 8


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    short = ["--config.train.steps=2", "--config.train.checkpoint_every=2", "--config.train.tensorboard=False"]
    assert run("train", *SMOKE, *short, "--workdir", path) == 0
    return path


@pytest.fixture(scope="module")
def made(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("codes")
    report = path.parent / "report.json"
    assert run("tokenize", "--workdir", workdir, "--to", path, *SMALL, "--json", report) == 0
    return path, json.loads(report.read_text())


def test_codes_are_those_of_the_tokenizer_image_by_image(workdir, made):
    codes = CodesSource(made[0])
    assert made[1]["records"] == len(codes) == 50 and made[1]["shards"] == 3 and made[1]["complete"]
    images = open_source("scenes:train", image_size=32)
    built, state = experiment.restore(workdir)
    for i in (0, 19, 20, 49):
        record = codes[i]
        image = to_float(jnp.asarray(images[i]["image"][None]))
        expected = built.model.encode(experiment.weights(state), state.extra, image)
        np.testing.assert_array_equal(record["codes"], expected)
        assert record["caption"] == images[i]["caption"] and record["label"] == images[i]["label"]
    every = jnp.arange(codes.plan.codebook_size)[None]
    np.testing.assert_array_equal(
        codes.code_vectors(), built.model.code_vectors(experiment.weights(state), state.extra, every)[0]
    )


def test_the_same_command_keeps_what_is_whole_and_mends_the_rest(workdir, made, tmp_path, capsys):
    to, command = tmp_path / "c", ["tokenize", "--workdir", workdir, *SMALL, "--to", tmp_path / "c"]
    assert run(*command) == 0
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    assert before == {path.name: path.read_bytes() for path in made[0].iterdir()}  # nothing in it depends on the day
    (to / "shard-00001.array_record").write_bytes(b"cut off")
    (to / "index.json").unlink()
    capsys.readouterr()
    assert run(*command) == 0
    assert "2 of 3 shards are there and whole" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in to.iterdir()}


def test_an_interrupted_one_goes_on(workdir, made, tmp_path, monkeypatch, capsys):
    command = ["tokenize", "--workdir", workdir, *SMALL, "--to", tmp_path / "c"]
    encode, calls = tokenize._Encoder._finish, []

    def interrupt(self, batch, running):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(self, batch, running)

    monkeypatch.setattr(tokenize._Encoder, "_finish", interrupt)
    assert run(*command) == EXIT_STOPPED
    assert "stopped after 1 shards, which are kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="not complete .1 of 3 shards."):
        CodesSource(tmp_path / "c")
    monkeypatch.undo()
    assert run(*command) == 0
    for path in made[0].iterdir():
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()


def test_parts_share_the_shards_and_the_last_completes_them(workdir, made, tmp_path, capsys):
    for part, state in (("1/2", "other parts are still missing"), ("0/2", "complete")):
        assert run("tokenize", "--workdir", workdir, *SMALL, "--to", tmp_path / "c", "--part", part) == 0
        assert state in capsys.readouterr().out
    for path in made[0].iterdir():
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()


def test_lengths_of_captions_are_stored_where_a_text_tokenizer_is_named(workdir, tmp_path, monkeypatch):
    text = train_sentencepiece(
        [open_source("scenes:train")[i]["caption"] for i in range(200)], 300, tmp_path / "t.model"
    )
    to = tmp_path / "c"
    assert run("tokenize", "--workdir", workdir, *SMALL, "--to", to, "--text", tmp_path / "t.model") == 0
    codes = CodesSource(to)
    monkeypatch.setattr("ddt_jax.multimodal.records._lengths", None)  # measuring again would call it
    assert text_lengths(codes, text)[7, 0] == len(text.encode(codes[7]["caption"]))


def test_bad_images_are_left_out_and_counted_or_end_it(workdir, tmp_path, encode_png, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.png").write_bytes(encode_png(i) if i != 5 else b"\x89PNG junk")
    command = ["tokenize", "--workdir", workdir, "--source", f"folder:{folder}"]
    assert run(*command, "--to", tmp_path / "a") == cli.EXIT_USER
    assert "1 of 6 images could not be used (first: 5.png" in capsys.readouterr().err
    assert run(*command, "--to", tmp_path / "b", "--config.data.max_bad_fraction=0.2") == 0
    assert "7 records in 1 shards (complete), 1 left out" in capsys.readouterr().out
    assert [CodesSource(tmp_path / "b")[i]["index"] for i in (4, 5)] == [4, 6]


@pytest.fixture
def encode_png():
    import io

    from PIL import Image

    def encode(i):
        file = io.BytesIO()
        Image.new("RGB", (40, 32), (i * 20, 0, 0)).save(file, "PNG")
        return file.getvalue()

    return encode


def test_the_order_of_codes_follows_from_the_schedule():
    names = {"coarse_first": "coarse_to_fine", "selftok": "fine_to_coarse"}
    for direction, name in names.items():
        schedule = settings.Schedule(direction=direction)
        assert make_tokenizer(settings.DDTTokenizer(width=32, heads=2, schedule=schedule), 32, 8).token_order == name


def test_turned_round_codes_are_the_same_backwards(workdir, made, tmp_path, monkeypatch):
    from ddt_jax.tokenizers.linear import LinearTokenizer

    monkeypatch.setattr(LinearTokenizer, "token_order", "fine_to_coarse")
    assert run("tokenize", "--workdir", workdir, *SMALL, "--to", tmp_path / "c", "--order", "coarse_to_fine") == 0
    one, other = CodesSource(made[0]), CodesSource(tmp_path / "c")
    assert other.plan.reversed and other.plan.order == "coarse_to_fine" and not one.plan.reversed
    np.testing.assert_array_equal(one[3]["codes"], other[3]["codes"][:, ::-1])
    assert one.plan.tokenizer != other.plan.tokenizer


@pytest.mark.slow
def test_codes_of_another_tokenizer_are_not_drawn(workdir, made, tmp_path):
    plan = CodesSource(made[0]).plan
    image = settings.CodeImages(tokenizer=plan.tokenizer, order=plan.order)

    def eyes(folder):
        s = settings.Experiment(model=settings.Multimodal(image=image))
        return speaking.Eyes(replace(s, sequences=settings.Sequences(tokenizer=str(folder))))

    eyes(workdir)
    other = ["--config.train.steps=2", "--config.train.checkpoint_every=2", "--config.seed=1"]
    assert run("train", *SMOKE, *other, "--workdir", tmp_path) == 0
    with pytest.raises(UserError, match="the run's codes were made by .*; name the workdir of that one"):
        eyes(tmp_path)


def test_training_begins_only_with_the_tokenizer_that_made_the_codes(workdir, made, tmp_path, capsys):
    for name in ("train", "heldout"):
        shutil.copytree(made[0], tmp_path / "codes" / name)
    for path in tmp_path.glob("codes/*/*.json"):
        path.write_text(path.read_text().replace(made[1]["tokenizer"], "0" * 64))
    (tmp_path / "tokenizer").symlink_to(workdir)
    config = Path(__file__).parents[1] / "configs" / "llama_scenes.py"
    assert run("train", "--config", f"{config}:{tmp_path}", "--workdir", tmp_path / "run") == cli.EXIT_USER
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ddt-jax: config: sequences.tokenizer=") and "codes were made by 00000000…" in error
    assert not (tmp_path / "run").exists()


def test_checking_the_tokenizer_leaves_no_array_and_passes_over_one_that_is_not_there(workdir, made, tmp_path):
    plan, notes = CodesSource(made[0]).plan, []
    image = settings.CodeImages(tokenizer=plan.tokenizer, order=plan.order)

    def check(folder):
        s = settings.Experiment(model=settings.Multimodal(image=image))
        experiment.check_tokenizer(replace(s, sequences=settings.Sequences(tokenizer=str(folder))), notes.append)

    gc.collect()
    before = len(jax.live_arrays())
    check(workdir)
    check("")
    assert not notes
    gc.collect()
    assert len(jax.live_arrays()) <= before
    check(tmp_path / "later")
    assert len(notes) == 1 and f"{tmp_path / 'later'} has no checkpoint" in notes[0]


def test_an_autoencoder_makes_no_codes(monkeypatch, tmp_path):
    built = types.SimpleNamespace(settings=settings.Experiment(model=settings.VAE()), model=object())
    monkeypatch.setattr(experiment, "restore", lambda *arguments: (built, None))
    with pytest.raises(UserError, match="a run of kind vae, which makes no codes"):
        tokenize.tokenize("run", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "2/2"], "--part 2/2 is not one of 0/2 to 1/2"),
        (["--part", "two"], "--part two is not I/N"),
        (["--order", "up"], "--order up is not one of coarse_to_fine, fine_to_coarse"),
        (["--order", "coarse_to_fine"], "the codes of this tokenizer have no order"),
        (["--shard-records", "0"], "--shard-records 0 must be positive"),
        (["--source", "scenes:tain"], "tain"),
        (["--text", "/nowhere.model"], "/nowhere.model does not exist"),
        (["--records", "49"], "was begun with records=50, now it is 49"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(workdir, made, capsys, arguments, message):
    assert run("tokenize", "--workdir", workdir, "--to", made[0], *SMALL, *arguments) == cli.EXIT_USER
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("ddt-jax: ")


def test_each_part_stores_the_lengths_of_its_own_shards(workdir, tmp_path, monkeypatch):
    text = train_sentencepiece(
        [open_source("scenes:train")[i]["caption"] for i in range(200)], 300, tmp_path / "t.model"
    )
    to, stored = tmp_path / "c", []
    for part in ("1/2", "0/2"):
        command = ["tokenize", "--workdir", workdir, *SMALL, "--to", to, "--text", tmp_path / "t.model"]
        assert run(*command, "--part", part) == 0
        stored.append(sorted(path.name.split("-")[1] for path in (to / "lengths").glob("*/*.npy")))
    assert stored == [["00001"], ["00000", "00001", "00002"]]
    codes = CodesSource(to)
    monkeypatch.setattr("ddt_jax.multimodal.records._lengths", None)  # measuring again would call it
    expected = [len(text.encode(codes[i]["caption"])) for i in range(50)]
    assert text_lengths(codes, text)[:, 0].tolist() == expected
