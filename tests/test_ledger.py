"""What runs cost and saw, against counts by hand; the transformer's own runs are written, not trained."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddt_jax import config, experiment, ledger, settings, speaking
from ddt_jax.data import files
from ddt_jax.data.base import open_source
from ddt_jax.data.codes import CodesWriter, Plan
from ddt_jax.errors import UserError
from ddt_jax.training import corpus
from ddt_jax.training.checkpoint import Checkpoints
from ddt_jax.training.state import TrainState

CONFIGS = Path(__file__).parents[1] / "configs"
SMOKE = f"{CONFIGS}/smoke.py:linear"
RECORDS, STEPS, ROWS = 60, 7, 8
TRANSFORMER = {"width": 32, "depth": 2, "heads": 2, "kv_heads": 2, "mlp_width": 64, "scan_layers": False}


def by_hand(vocab, *, context, targets, rows=ROWS, width=32, depth=2, mlp=64):
    """Of a step with AdamW: every product once forwards and twice backwards, of attention to all keys as well."""
    maps = depth * rows * context * (4 * width**2 + 3 * width * mlp)
    attention = depth * rows * 2 * context**2 * width
    head = rows * targets * width * vocab
    return 3 * 2 * (maps + attention + head)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tokenizer that seems to have trained 3 steps, and codes with the captions of scenes."""
    path, s = tmp_path_factory.mktemp("ledger"), config.load(SMOKE, (("train.steps", "3"),))
    points = Checkpoints(path / "tokenizer")
    zeros = np.zeros(2, np.int32)
    points.save(TrainState(np.int32(3), {"w": zeros}, {}, None, {}, zeros, zeros), {})
    points.close()
    (path / "tokenizer" / "config.json").write_text(config.to_json(s))
    count, codebook = s.model.num_tokens, s.model.quantizer.codebook_size
    for split in ("train", "heldout"):
        spec = f"scenes:{split}"
        captions = [open_source(spec)[i]["caption"] for i in range(RECORDS)]
        plan = Plan("f" * 64, count, codebook, 32, "none", False, spec, RECORDS, RECORDS)
        writer, codes = CodesWriter(path / "codes" / split, plan), np.zeros((1, count), np.int32)
        writer.write(0, ({"caption": caption, "codes": codes} for caption in captions))
        writer.complete()
    return path


def settings_of(root, **changes):
    parts = [settings.CodesFolder(folder=str(root / "codes" / x)) for x in ("train", "heldout")]
    sequences = settings.Sequences(
        text_vocab_size=300,
        context=160,  # a text tokenizer of so few captions makes long texts
        sources=(parts[0],),
        eval_sources=(parts[1],),
        tokenizer=str(root / "tokenizer"),
    )
    model = settings.Multimodal(transformer=settings.Transformer(vocab_size=0, **TRANSFORMER))
    s = settings.Experiment(
        name="tiny",
        data=settings.Data(cache_dir=str(root / "cache")),
        model=model,
        sequences=sequences,
        optimizer=settings.Optimizer(name="adamw"),
        train=settings.Train(batch_size=ROWS, steps=STEPS),
    )
    return replace(s, **changes)


def write(root, name, s, **results):
    """The workdir of a run that seems finished and evaluated."""
    workdir = root / name
    s, found = corpus.resolve(s)
    corpus.save(workdir, found)
    (workdir / "config.json").write_text(config.to_json(s))
    results = {"step": STEPS, "prompts": 9, "drawn_with": speaking.drawn_with(s), "t2i_all_correct": 0.5} | results
    results |= {"marks": {"t2i": "010101010"}}
    (workdir / "results.json").write_text(json.dumps(results))
    return s, str(workdir)


@pytest.fixture(scope="module")
def codes(root):
    return write(root, "codes_run", settings_of(root))


def test_costs_of_a_run_are_those_by_hand(root, codes):
    s, workdir = codes
    (row,) = ledger.rows("codes", workdir)
    assert row.results["marks"] == {"t2i": "010101010"}  # by which arms are compared prompt by prompt
    vocab = s.model.transformer.vocab_size
    assert row.flops["training"] == STEPS * by_hand(vocab, context=160, targets=160)
    t = experiment.saved_settings(str(root / "tokenizer"))
    pixels, wide = 3 * t.data.image_size**2, t.model.width
    features = t.model.num_tokens * t.model.quantizer.code_dim
    distances = t.model.num_tokens * t.model.quantizer.code_dim * t.model.quantizer.codebook_size
    assert row.flops["encoding"] == RECORDS * 2 * (pixels * wide + wide * features + distances)
    assert row.flops["tokenizer"] == 3 * ledger.step_flops(t)
    assert row.total_flops == sum(row.flops.values()) and not row.uncounted
    assert (row.arm, row.run, row.seed, row.lr, row.step, row.steps) == ("codes", workdir, 0, 3e-3, STEPS, STEPS)


@pytest.mark.parametrize("context", [160, 1024])  # from 1024 rows on, "auto" is a kernel with a loop over tiles
def test_attention_costs_every_pair_of_a_row_and_a_key_whichever_kernel_computes_it(root, context):
    s = ledger.sized(settings_of(root))
    s = replace(s, sequences=replace(s.sequences, context=context))
    for kernel in ("auto", "dense", "chunked", "splash"):
        transformer = replace(s.model.transformer, attention=kernel)
        found = ledger.step_flops(replace(s, model=replace(s.model, transformer=transformer)))
        assert found == by_hand(transformer.vocab_size, context=context, targets=context), kernel


def test_what_a_run_saw_is_what_its_batches_hold(codes):
    s, workdir = codes
    (row,) = ledger.rows("codes", workdir)
    found = corpus.load(workdir, s)
    loader = corpus.open_rows(s, found, s.sequences.sources)
    batches = [loader.batch_at(step) for step in range(STEPS)]
    marks = [id_ for _, id_ in found.vocabulary.special]
    images = sum(int((b["image_start"] >= 0).sum()) for b in batches)
    ids = np.concatenate([b["tokens"][b["document"] >= 0] for b in batches])
    text = int((~np.isin(ids, marks) & (ids < found.vocabulary.codes_start)).sum())
    assert row.seen["images"] == pytest.approx(images) and row.seen["text tokens"] == pytest.approx(text)
    assert row.seen["image positions"] == pytest.approx(images * s.model.image.num_tokens)
    assert row.seen["images by the tokenizer"] == 3 * experiment.saved_settings(s.sequences.tokenizer).train.batch_size


def test_of_many_rows_the_first_stand_for_all(codes, monkeypatch):
    (every,) = ledger.rows("codes", codes[1])
    monkeypatch.setattr(ledger, "_ROWS", STEPS * ROWS // 2)
    (half,) = ledger.rows("codes", codes[1])
    for name in ("images", "text tokens"):
        assert half.seen[name] != every.seen[name] and half.seen[name] == pytest.approx(every.seen[name], rel=0.1)


def test_runs_on_codes_and_on_pictures_differ_in_nothing_that_has_to_be_alike(root, codes):
    parts = [settings.Pictures(source=f"scenes:{x}", records=RECORDS) for x in ("train", "heldout")]
    formats = settings.CodesFolder().formats
    sources, held_out = ((replace(part, formats=formats),) for part in parts)
    image = settings.DiffusionImages(patch_size=4)
    model = settings.Multimodal(transformer=settings.Transformer(vocab_size=0, **TRANSFORMER), image=image)
    sequences = settings.Sequences(text_vocab_size=300, context=280, sources=sources, eval_sources=held_out)
    s, workdir = write(root, "pictures_run", settings_of(root, model=model, sequences=sequences))
    (row,), (other,) = ledger.rows("pictures", workdir), ledger.rows("codes", codes[1])
    assert row.alike == other.alike
    # Of a picture that is denoised only guidance and solver say how it is drawn; the rest of `Sampling` counts nothing.
    assert row.sampling["text_to_image"] == {"guidance": 2.0, "solver": "ddpm", "solver_steps": 250, "clip": 5.0}
    assert other.sampling["text_to_image"]["temperature"] == 0.7 and "solver" not in other.sampling["text_to_image"]
    assert row.sampling["image_to_text"] == other.sampling["image_to_text"]
    assert row.flops.keys() == {"training"} and not row.uncounted
    assert row.seen.keys() == {"images", "text tokens", "image positions"}
    assert row.seen["image positions"] == 64 * row.seen["images"]
    parts = (settings.PartRate(part="head", times=0.5),)
    changed = replace(s, optimizer=replace(s.optimizer, b2=0.5, offload=True, parts=parts), seed=3)
    (Path(workdir) / "config.json").write_text(config.to_json(changed))
    (now,) = ledger.rows("pictures", workdir)
    differing = {n for n in now.alike if row.alike.get(n) != now.alike[n]}
    assert differing == {"optimizer.b2", "optimizer.parts"} and now.seed == 3
    assert row.alike.keys() < now.alike.keys()


def test_each_choice_of_sampling_settings_is_a_row(root):
    s, workdir = write(root, "swept", settings_of(root))
    folder = Path(workdir) / ledger.SAMPLING
    folder.mkdir()
    for guidance in (1.0, 3.0):
        results = json.loads((Path(workdir) / "results.json").read_text())
        results["drawn_with"]["text_to_image"]["guidance"] = guidance
        (folder / f"{guidance:g}.json").write_text(json.dumps(results | {"t2i_all_correct": guidance / 10}))
    found = ledger.rows("codes", workdir)
    assert [row.results["t2i_all_correct"] for row in found] == [0.1, 0.3] and len({row.point for row in found}) == 2


def test_what_is_not_known_is_said(root):
    s = settings_of(root)
    elsewhere = replace(s, sequences=replace(s.sequences, tokenizer=str(root / "gone")), init_from=str(root / "other"))
    _, workdir = write(root, "costly", elsewhere)
    (row,) = ledger.rows("codes", workdir)
    assert row.uncounted == (
        f"the training of {root / 'other'} is not counted: there is no run in that place",
        f"the training of {root / 'gone'} is not counted: there is no run in that place",
    )
    assert "encoding" not in row.flops
    # A run that begins with another one pays for it.
    _, second = write(root, "second", replace(s, init_from=str(root / "tokenizer")))
    (row,) = ledger.rows("codes", second)
    assert row.flops["begins with"] == row.flops["tokenizer"] and not row.uncounted


def test_weights_of_a_codec_cost_what_the_run_that_made_them_cost(root):
    codec = settings.VAECodec(weights="vae.safetensors")
    image = settings.DiffusionImages(patch_size=2, codec=codec)
    s = settings_of(root, model=settings.Multimodal(transformer=settings.Transformer(**TRANSFORMER), image=image))
    cost = {}
    said = ledger._beneath_of(s, {}, cost, "")
    assert said == ["the training of vae.safetensors is not counted: there is no run in that place"] and not cost
    assert ledger._beneath_of(s, {"vae.safetensors": str(root / "tokenizer")}, cost, "") == []
    assert cost == {"codec": 3 * ledger.step_flops(experiment.saved_settings(str(root / "tokenizer")))}


def test_a_plan_costs_what_the_run_will(root, codes):
    s, workdir = codes
    (row,) = ledger.rows("codes", workdir)
    bare = settings_of(root / "nowhere")
    ids = s.model.transformer.vocab_size - s.model.image.codebook_size - 7  # what the text tokenizer came to have
    bare = replace(bare, sequences=replace(bare.sequences, text_vocab_size=ids))
    tokenizer = experiment.saved_settings(str(root / "tokenizer"))
    planned = ledger.plan(bare, tokenizer, RECORDS)
    assert STEPS * planned.step == row.flops["training"] and planned.before == {
        name: row.flops[name] for name in ("tokenizer", "encoding")
    }
    assert planned.steps_within(planned.total(STEPS)) == STEPS
    assert planned.steps_within(planned.total(STEPS) + 1.6 * planned.step) == STEPS + 2
    with pytest.raises(UserError, match="raise `total`"):
        planned.steps_within(planned.before["tokenizer"])


def test_what_cannot_be_used_is_one_line(root, codes, tmp_path):
    s = settings_of(root)
    for call, message in [
        (lambda: ledger.rows("a", str(root / "tokenizer")), "is a run of kind linear; name workdirs of transformers"),
        (lambda: ledger.rows("a", str(tmp_path)), "holds no run"),
        (lambda: ledger.plan(s), "tiny reads codes; name the tokenizer of that arm"),
        (lambda: ledger.plan(experiment.saved_settings(str(root / "tokenizer"))), "name configs of transformers"),
    ]:
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
    _, workdir = write(root, "broken", s)
    results = Path(workdir) / "results.json"
    for text, message in [
        ('{"step": 7, "prompts": 3}', "does not say how its answers were drawn"),
        ("{", "is no JSON"),
        (None, f"run `ddt-jax evaluate --workdir {workdir}`"),
    ]:
        results.unlink() if text is None else results.write_text(text)
        with pytest.raises(UserError) as error:
            ledger.rows("a", workdir)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_rows_of_the_comparison_hold_two_documents_whatever_images_are(tmp_path):
    """configs/comparison_scenes.py: as many texts and images in as many rows, and rows that are full."""
    count, file = 3000, f"{CONFIGS}/comparison_scenes.py"
    source = open_source("scenes:train")
    plan = Plan("f" * 64, 16, 512, 32, "coarse_to_fine", False, "scenes:train", count, count)
    for split in ("train", "heldout"):
        writer = CodesWriter(tmp_path / "codes" / split, plan)
        zeros = np.zeros((1, 16), np.int32)
        writer.write(0, ({"caption": source[i]["caption"], "codes": zeros} for i in range(count)))
        writer.write_vectors(np.zeros((512, 8)))
        writer.complete()
    held = []
    for variant in (f"codes:{tmp_path}", "transfusion", "blocks"):
        s = config.load(f"{file}:{variant}", (("data.cache_dir", str(tmp_path)),))
        first = s.sequences.sources[0]
        sources = (first if first.kind == "codes" else replace(first, records=count),)
        s, found = corpus.resolve(replace(s, sequences=replace(s.sequences, sources=sources, eval_sources=())))
        batcher = corpus.open_rows(s, found, sources).batcher
        held.append(np.array([batcher.contents(row) for row in range(1000)]))
        assert (held[-1][:, 2] == 2).all()
        if variant != "blocks":  # whose rows keep room for noised copies of images that may be given instead
            positions = held[-1] @ [1, 1, batcher.form.rows + 2]
            assert positions.mean() / s.sequences.context > 0.92
    # Of documents of one length either may come first; over a block that is nothing.
    for other in held[1:]:
        np.testing.assert_allclose(held[0].sum(axis=0), other.sum(axis=0), rtol=0.005)


@pytest.mark.parametrize("variant", ["codes", "seed", "transfusion", "blocks"])
def test_rows_of_the_comparison_on_photographs_hold_two_documents_in_the_same_order(tmp_path, data_dir, variant):
    """configs/comparison_cifar10.py: its rows can be packed, and formats come in one order whatever images are."""
    count, tokenizers = 400, config.sibling(f"{CONFIGS}/comparison_cifar10.py", "cifar10_tokenizers")
    spec = files.expand(tokenizers.SOURCE)
    source = open_source(spec)
    plan = Plan("f" * 64, 64, 4096, 32, "coarse_to_fine", False, spec, count, count)
    writer = CodesWriter(tmp_path / "codes" / "train", plan)
    zeros = np.zeros((1, 64), np.int32)
    writer.write(0, ({"caption": source[i]["caption"], "codes": zeros} for i in range(count)))
    writer.write_vectors(np.zeros((4096, 8)))
    writer.complete()
    s = config.load(f"{CONFIGS}/comparison_cifar10.py:{variant}:{tmp_path}", (("data.cache_dir", str(tmp_path)),))
    part = s.sequences.sources[0]
    part = part if part.kind == "codes" else replace(part, records=count)
    folder = replace(part, folder=str(tmp_path / "codes" / "train")) if part.kind == "codes" else part
    s, found = corpus.resolve(replace(s, sequences=replace(s.sequences, sources=(folder,), eval_sources=())))
    loader = corpus.open_rows(s, found, s.sequences.sources)
    loader.batch_at(0)
    held = np.array([loader.batcher.contents(row) for row in range(100)])
    assert (held[:, 2] == 2).all()
    records = corpus.open_records(s, s.sequences.sources[0])
    assert records.origin == f"parquet:{data_dir}/cifar10/train-0000[0-3]-of-00005.parquet"


def test_a_point_of_a_scaling_study_is_the_runs_own_training(codes, monkeypatch):
    s, workdir = codes
    monkeypatch.setattr("ddt_jax.training.checkpoint.saved_steps", lambda workdir: [STEPS])
    (row,) = ledger.rows("codes", workdir)
    found = ledger.point("arm", workdir)
    assert (found.family, found.run, found.status) == ("arm", workdir, "finished")
    assert found.flops == row.flops["training"] < row.total_flops
    assert found.tokens == pytest.approx(row.seen["text tokens"] + row.seen["image positions"])
    assert found.metrics["t2i_all_correct"] == 0.5 and "step" not in found.metrics
    width, depth, mlp = (TRANSFORMER[name] for name in ("width", "depth", "mlp_width"))
    layer = 4 * width**2 + 3 * width * mlp + 2 * width
    assert found.params == 2 * s.model.transformer.vocab_size * width + depth * layer + width


def test_sizes_that_data_decide_come_from_the_tokenizers_run(root):
    s, tokenizer = settings_of(root), experiment.saved_settings(str(root / "tokenizer"))
    found = ledger.sized(s).model
    assert found.image.num_tokens == tokenizer.model.num_tokens
    assert found.image.codebook_size == tokenizer.model.quantizer.codebook_size
    assert found.transformer.vocab_size > 300 + found.image.codebook_size
    assert ledger.sized(tokenizer) is tokenizer
    nowhere = replace(s, sequences=replace(s.sequences, tokenizer=str(root / "none")))
    with pytest.raises(UserError, match="holds no run"):
        ledger.sized(nowhere)


def test_a_transformer_on_latents_is_not_charged_for_making_them_in_its_steps():
    """Who made them, and at what cost, is not known, and is said."""
    sizes = settings.Autoencoder(block_out_channels=(4, 4), layers_per_block=1, latent_channels=2, norm_groups=2)
    codec = settings.VAECodec(preset="custom", random_weights=True, sizes=sizes)
    transformer = settings.Transformer(vocab_size=300, width=16, depth=1, heads=1, kv_heads=1, mlp_width=16)
    model = settings.Multimodal(transformer=transformer, image=settings.DiffusionImages(codec=codec))
    found = {}
    for source in ("scenes:train", "latents:DIR"):
        q = settings.Sequences(context=64, images=1, sources=(settings.Pictures(source=source),))
        s = settings.Experiment(model=model, data=settings.Data(image_size=8), sequences=q)
        found[source] = ledger.plan(s)
    images, latents = found.values()
    assert latents.step < images.step and images.uncounted == ()
    assert latents.uncounted == ("experiment learned from latents:DIR: making these latents is not counted",)
