"""The whole way of a run whose images are denoised, by the verbs: training, pictures, captions, edits, figures."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddt_jax import cli, speaking
from ddt_jax.data import scenes
from ddt_jax.multimodal import documents
from ddt_jax.nn import inception

pytestmark = pytest.mark.slow
SMALL = ["--config.model.transformer.width=48", "--config.model.transformer.mlp_width=96"]
SMALL += ["--config.train.batch_size=8", "--config.model.transformer.depth=1"]
SMALL += ["--config.train.steps=20", "--config.train.log_every=5", "--config.train.eval_every=10"]
SMALL += ["--config.evaluate.images=40", "--config.evaluate.prompts=5"]
SMALL += ["--config.model.image.diffusion.solver_steps=4"]


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("transfusion")
    cache = [f"--config.data.cache_dir={root / 'cache'}"]
    config = root / "scenes.py"
    config.write_text(
        "from ddt_jax import config, settings\n"
        "def get_config():\n"
        "    c = config.sibling('configs/transfusion_scenes.py', 'transfusion_scenes').get_config()\n"
        "    c.sequences.sources = (config.dump(settings.Pictures(source='scenes:train', records=600)),)\n"
        "    own = settings.Pictures(source='scenes_edits:heldout', records=40, formats=settings.Formats(own=1.0))\n"
        "    c.sequences.eval_sources = (config.dump(settings.Pictures(source='scenes:heldout', records=60)),\n"
        "                                config.dump(own))\n"
        "    return c\n"
    )
    assert run("train", "--config", config, "--workdir", root / "run", *cache, *SMALL) == 0
    return root / "run"


def test_it_is_measured_while_it_trains_and_draws_and_describes(trained, tmp_path, capsys):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    (half_way,) = (line for line in lines if "eval/diffusion" in line)
    assert half_way["step"] == 10 and half_way["eval/text_perplexity"] > 1
    assert run("evaluate", "--workdir", trained) == 0
    results = json.loads((trained / "results.json").read_text())
    assert results["prompts"] == results["edits"] == 5 and "image_bits" not in results
    assert results["diffusion"] < half_way["eval/diffusion"]
    assert results["plain_perplexity"] > 1 and results["drawn_with"]["text_to_image"]["solver_steps"] == 4
    assert results["text_perplexity"] < half_way["eval/text_perplexity"]
    for name in ("t2i_all_correct", "caption_all_correct", "edit_all_correct"):
        assert 0 <= results[name] <= 1
    for name in ("text_to_image.png", "image_to_text.png", "editing.png", "loss.png"):
        with Image.open(trained / name) as picture:
            assert picture.width > 100

    Image.fromarray(scenes.render(scenes.sample_scene("heldout", 0))).save(tmp_path / "a.png")
    more = ["--prompt", "a small red circle", "--caption", tmp_path / "a.png"]
    more += ["--edit", tmp_path / "a.png", "make it blue"]
    more += ["--continue", "a small red circle", "--force-image"]
    out = ["--out", tmp_path / "g.png", "--json", tmp_path / "g.json", "--samples", 2]
    assert run("generate", "--workdir", trained, *more, *out) == 0
    said = json.loads((tmp_path / "g.json").read_text())
    told = [part for parts in said["told"] for part in parts if not isinstance(part, str)]
    assert len(said["told"]) == 2 and all(parts[0] in told for parts in said["told"])
    assert told == list(range(5, 5 + len(told))) and len(said["drawn"]) == 4 + len(told)
    assert list(said["captions"]) == [str(tmp_path / "a.png")] and not said["no_image"]
    first = (tmp_path / "g.png").read_bytes()
    assert run("generate", "--workdir", trained, *more, *out) == 0 and (tmp_path / "g.png").read_bytes() == first
    assert run("generate", "--workdir", trained, "--prompt", "red " * 500) == cli.EXIT_USER
    assert "leaves no room" in capsys.readouterr().err


def test_drawn_pictures_have_a_fid_where_weights_are_named(trained, monkeypatch, tmp_path):
    """More captions are drawn for it than for the other figures, which stay what they are."""
    monkeypatch.setattr(inception, "load", lambda path: np.float32(1))
    monkeypatch.setattr(inception, "features", lambda params, x: x.mean((1, 2)) * params)
    (tmp_path / "fid.pth").write_bytes(b"weights")
    few = ["--config.evaluate.batch_size=8", f"--config.data.cache_dir={tmp_path}"]
    assert run("evaluate", "--workdir", trained, *few) == 0
    without = json.loads((trained / "results.json").read_text())
    weights = [f"--config.evaluate.inception_file={tmp_path / 'fid.pth'}", "--config.evaluate.fid_images=9"]
    assert run("evaluate", "--workdir", trained, *few, *weights) == 0
    results = json.loads((trained / "results.json").read_text())
    assert results.pop("t2i_fid") > 0 and results.pop("t2i_fid_images") == 9
    assert "FID of 9 pictures drawn from captions" in (trained / "results.md").read_text()
    assert results.pop("evaluate_seconds") and without.pop("evaluate_seconds") and results == without


def test_drawn_pictures_have_a_clip_score_where_a_clip_is_named(trained, monkeypatch, tmp_path):
    """Of every picture that is drawn, those for FID too, beside its own caption."""
    seen = []

    class Judge:
        def watch(self, pictures, captions):
            for picture, caption in zip(pictures, captions, strict=True):
                seen.append((picture.shape, caption))
                yield picture

        def results(self):
            return {"t2i_clip_score": 31.25, "t2i_clip_images": len(seen)}

    monkeypatch.setattr(speaking, "_clip", lambda s, mesh: Judge())
    monkeypatch.setattr(inception, "load", lambda path: np.float32(1))
    monkeypatch.setattr(inception, "features", lambda params, x: x.mean((1, 2)) * params)
    (tmp_path / "fid.pth").write_bytes(b"weights")
    weights = [f"--config.evaluate.inception_file={tmp_path / 'fid.pth'}", "--config.evaluate.fid_images=7"]
    few = ["--config.evaluate.batch_size=8", f"--config.data.cache_dir={tmp_path}", "--config.evaluate.clip_folder=x"]
    assert run("evaluate", "--workdir", trained, *few, *weights) == 0
    results = json.loads((trained / "results.json").read_text())
    assert (results["t2i_clip_score"], results["t2i_clip_images"], results["t2i_fid_images"]) == (31.25, 7, 7)
    assert {shape for shape, _ in seen} == {(32, 32, 3)} and len({caption for _, caption in seen}) > 5
    assert "CLIP score of 7 drawn pictures: 31.25" in (trained / "results.md").read_text()


def test_images_in_blocks_go_the_same_way(trained, tmp_path):
    config = tmp_path / "blocks.py"
    text = (trained.parent / "scenes.py").read_text()
    config.write_text(text.replace("get_config()\n    c.seq", "get_config('blocks')\n    c.seq"))
    cache = f"--config.data.cache_dir={trained.parent / 'cache'}"
    small = [*SMALL, "--config.evaluate.prompts=3", "--config.train.steps=10", cache]
    assert run("train", "--config", config, "--workdir", tmp_path / "run", *small) == 0
    assert run("evaluate", "--workdir", tmp_path / "run") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["prompts"] == results["edits"] == 3 and 0.1 < results["diffusion"] < 2
    assert 0 <= results["t2i_all_correct"] <= 1 and results["plain_perplexity"] > 1
    speaker = speaking.open_speaker(str(tmp_path / "run"))
    asked = documents.text_to_image(speaker.encode_text("a small red disc at the top left"), documents.Image())
    (parts,) = speaker.tell([asked], [3], force_image=True)
    assert isinstance(parts[0], np.ndarray) and parts[0].shape == (32, 32, 3)


def test_text_and_images_come_in_turns(trained):
    speaker = speaking.open_speaker(str(trained))
    asked = documents.text_to_image(speaker.encode_text("a small red disc at the top left"), documents.Image())
    (parts,) = speaker.tell([asked], [3], force_image=True)
    assert isinstance(parts[0], np.ndarray) and parts[0].shape == (32, 32, 3)
    assert all(isinstance(part, str | np.ndarray) for part in parts)


def test_text_alone_is_learned_and_measured(tmp_path):
    pq.write_table(pa.table({"text": ["to be, or not to be", "that is the question"] * 40}), tmp_path / "a.parquet")
    config = tmp_path / "texts.py"
    config.write_text(
        "from ddt_jax import config, settings\n"
        "def get_config():\n"
        "    c = config.sibling('configs/transfusion_scenes.py', 'transfusion_scenes').get_config()\n"
        f"    texts = config.dump(settings.Texts(source='parquet:{tmp_path}/a.parquet'))\n"
        "    c.sequences.sources = c.sequences.eval_sources = (texts,)\n"
        "    return c\n"
    )
    short = [*SMALL, "--config.train.steps=4", f"--config.data.cache_dir={tmp_path}"]
    assert run("train", "--config", config, "--workdir", tmp_path / "run", *short) == 0
    assert run("evaluate", "--workdir", tmp_path / "run") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 1 < results["plain_perplexity"] < 400 and results["prompts"] == 0
    assert not (tmp_path / "run" / "text_to_image.png").exists()
