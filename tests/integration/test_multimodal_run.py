"""The whole way through the verbs: tokenizer, codes, transformer, pictures from text, captions of pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from ddt_jax import cli, speaking
from ddt_jax.data import scenes
from ddt_jax.data.codes import CodesSource
from ddt_jax.multimodal import documents
from ddt_jax.multimodal.backbone import Backbone
from ddt_jax.nn import inception, spans
from tests.integration.test_survival import command, finish, free_port, spawn

pytestmark = pytest.mark.slow
SMALL = ["--config.model.transformer.width=48", "--config.model.transformer.depth=2", "--config.train.batch_size=8"]
SMALL += ["--config.train.steps=30", "--config.train.log_every=5", "--config.sequences.context=128"]


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    picture = ["--config.data.source=scenes:train", "--config.data.eval_source=scenes:heldout"]
    picture += ["--config.data.image_size=32", "--config.train.steps=4"]
    assert run("train", "--config", "configs/smoke.py", "--workdir", root / "tokenizer", *picture) == 0
    for split, records in (("train", 2000), ("heldout", 300)):
        to = ["--to", root / "codes" / split, "--source", f"scenes:{split}", "--records", records]
        assert run("tokenize", "--workdir", root / "tokenizer", *to) == 0
    return root


@pytest.fixture(scope="module")
def trained(root):
    config = f"configs/llama_scenes.py:{root}"
    # In a process of its own, so that it is compiled as those that it is compared with.
    finish(spawn(command(config, root / "transformer", *SMALL), devices=8, keep_compiled=True))
    return root / "transformer"


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_is_evaluated_and_draws(root, trained, capsys, monkeypatch):
    curve = losses(trained)
    assert curve[-1] < 0.8 * curve[0]
    monkeypatch.setattr(inception, "load", lambda path: np.float32(1))
    monkeypatch.setattr(inception, "features", lambda params, x: x.mean((1, 2)) * params)
    (root / "fid.pth").write_bytes(b"weights")
    few = ["--config.evaluate.prompts=9", "--config.evaluate.images=40", "--config.evaluate.fid_images=14"]
    few += [f"--config.evaluate.inception_file={root / 'fid.pth'}", f"--config.data.cache_dir={root / 'cache'}"]
    assert run("evaluate", "--workdir", trained, *few) == 0
    results = json.loads((trained / "results.json").read_text())
    assert 0 <= results["t2i_all_correct"] <= 1 and results["prompts"] == 9 and results["caption_parsed"] >= 0
    assert results["text_perplexity"] < 500 and results["image_bits"] > 0
    assert results["t2i_fid"] > 0 and results["t2i_fid_images"] == 14
    for name in ("text_to_image.png", "image_to_text.png", "loss.png"):
        with Image.open(trained / name) as picture:
            assert picture.width > 100
    singly = json.loads((trained / "samples.json").read_text())
    for kind, share in {"text_to_image": "t2i_all_correct", "image_to_text": "caption_all_correct"}.items():
        assert len(singly[kind]) == 9 and np.mean([s["right"] for s in singly[kind]]) == pytest.approx(results[share])
        marks = results["marks"][share.partition("_")[0]]
        assert [mark == "1" for mark in marks] == [s["right"] for s in singly[kind]]
    assert "pictures of captions" in (trained / "results.md").read_text().lower()

    scene = scenes.sample_scene("heldout", 0)
    Image.fromarray(scenes.render(scene)).save(root / "a.png")
    Image.fromarray(scenes.render(scene)[::-1]).save(root / "b.png")
    more = ["--prompt", "a small red circle", "--caption", root / "a.png", root / "b.png"]
    more += ["--edit", root / "a.png", "make it blue", "--ask", root / "a.png", "what colour is it?"]
    more += ["--continue", "a large blue bar", "--force-image"]
    out = ["--out", root / "g.png", "--json", root / "g.json", "--samples", 2]
    assert run("generate", "--workdir", trained, *more, *out) == 0
    said = json.loads((root / "g.json").read_text())
    assert [a["question"] for a in said["answers"]] == ["what colour is it?"] and len(said["told"]) == 2
    pictures = [part for parts in said["told"] for part in parts if not isinstance(part, str)]
    assert len(pictures) >= 2 and max(pictures) == len(said["drawn"])
    assert len(said["drawn"]) == 4 + len(pictures) and list(said["captions"]) == [str(root / f"{x}.png") for x in "ab"]
    plan = json.loads((root / "codes" / "train" / "index.json").read_text())["plan"]
    assert said["tokenizer"] == plan["tokenizer"] and np.shape(said["codes"]) == (4, plan["num_tokens"])
    first = (root / "g.png").read_bytes()
    assert run("generate", "--workdir", trained, *more, *out) == 0 and (root / "g.png").read_bytes() == first


def test_a_picture_depends_on_its_prompt_and_seed_alone(trained):
    speaker = speaking.open_speaker(str(trained))
    texts = [speaker.encode_text(text) for text in ("a small red disc at the top left", "a large blue bar")]
    given = [documents.text_to_image(ids, documents.Image()) for ids in texts]
    both = speaker.draw(given, [3, 4]).pictures
    np.testing.assert_array_equal(speaker.draw(given[1:], [4]).pictures[0], both[1])
    assert (speaker.draw(given[1:], [5]).pictures[0] != both[1]).any()


def test_a_run_that_was_stopped_ends_like_an_undisturbed_one(root, trained):
    config, workdir = f"configs/llama_scenes.py:{root}", root / "again"
    more = [*SMALL, "--config.train.checkpoint_every=5"]
    process = spawn(command(config, workdir, *more), devices=8)
    try:
        while not (workdir / "checkpoints" / "5").exists():
            assert process.poll() is None, process.communicate()
        process.kill()
    finally:
        process.kill()
        process.communicate()
    finish(spawn(command(config, workdir, *more), devices=8))
    assert losses(workdir) == losses(trained)


def test_two_processes_read_the_same_rows_and_learn_the_same(root, trained):
    config, workdir = f"configs/llama_scenes.py:{root}", root / "hosts"
    where = ["--num-processes", 2, "--coordinator", f"127.0.0.1:{free_port()}"]
    both = [spawn(command(config, workdir, *SMALL, *where, "--process-id", i), devices=4) for i in range(2)]
    try:
        for process in both:
            finish(process)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    np.testing.assert_allclose(losses(workdir), losses(trained), rtol=1e-4)


def test_mistakes_are_one_line_before_anything_is_written(root, trained, tmp_path, capsys):
    config = f"configs/llama_scenes.py:{root}"
    other = tmp_path / "other"
    seed = ["--config.seed=9", "--config.data.image_size=32", "--config.data.source=scenes:train"]
    seed += ["--config.data.eval_source=scenes:heldout", "--config.train.steps=2"]
    assert run("train", "--config", "configs/smoke.py", "--workdir", other, *seed) == 0
    questions, one = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"question": "x", "question_id": 1}
    questions.write_text(json.dumps({"data_subtype": "val2014", "questions": [one | {"image_id": 2}]}))
    for arguments, message in (
        (["generate", "--workdir", trained], "there is nothing to do"),
        (["generate", "--workdir", trained, "--prompt", "x", "--force-image"], "says how --continue begins"),
        (["reconstruct", "--workdir", trained, "x.png"], "name the workdir of its image tokenizer"),
        (["evaluate", "--workdir", trained, "--config.evaluate.text_to_image.top_p=0"], "top_p in (0, 1]"),
        (["generate", "--workdir", root / "tokenizer", "--prompt", "x"], "is a run of kind"),
        (["generate", "--workdir", trained, "--prompt", "red " * 500], "leaves no room"),
        (["generate", "--workdir", trained, "--prompts", questions], "which are asked by --ask IMAGE QUESTION"),
        (["export", "llama", "--workdir", trained, "--to", tmp_path / "x"], "train without it to export"),
        (["generate", "--workdir", trained, "--caption", tmp_path / "none.png"], "does not exist"),
        (
            ["generate", "--workdir", trained, "--prompt", "x", f"--config.sequences.tokenizer={other}"],
            "codes were made by",
        ),
        (["train", "--config", f"{config}/none", "--workdir", tmp_path / "run"], "holds no codes"),
        (
            ["train", "--config", config, "--workdir", tmp_path / "run", "--config.sequences.context=16"],
            "take a longer context",
        ),
    ):
        assert run(*arguments) == cli.EXIT_USER, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error and error.startswith("ddt-jax: "), error
    assert not (tmp_path / "run").exists()


def test_transformers_opens_what_is_exported(root, oracle):
    torch, transformers = oracle("torch"), oracle("transformers")
    plain = ["--config.model.image.code_places=False", "--config.model.whole_prompts=False"]
    short, trained = [*SMALL, "--config.train.steps=2", *plain], root / "plain"
    assert run("train", "--config", f"configs/llama_scenes.py:{root}", "--workdir", trained, *short) == 0
    assert run("export", "llama", "--workdir", trained, "--to", root / "theirs") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "theirs").eval()
    speaker = speaking.open_speaker(str(trained))
    c, params = speaker.answerer.config, speaker.answerer.params
    ids = np.random.default_rng(0).integers(0, c.vocab_size, (2, 24))
    positions = np.arange(24, dtype=np.int32)[None]
    ours = Backbone(c).apply({"params": params}, ids, positions, spans.causal(24), method="everything")
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_codes_on_disk_are_those_of_the_tokenizer(root):
    speaker = speaking.open_speaker(str(root / "transformer"))
    records = CodesSource(str(root / "codes" / "heldout"))
    images = np.stack([scenes.render(scenes.sample_scene("heldout", records[i]["index"])) for i in range(6)])
    np.testing.assert_array_equal(speaker.eyes.encode(images), [records[i]["codes"][0] for i in range(6)])
