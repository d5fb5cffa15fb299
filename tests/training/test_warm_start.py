"""A run that begins with another one's weights: what it takes, what it refuses, and that it does so once."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import config, experiment, settings
from ddt_jax.errors import UserError
from ddt_jax.training import checkpoint, warm_start
from ddt_jax.training.state import TrainState

FIRST = settings.Experiment(
    name="first",
    model=settings.LinearTokenizer(quantizer=settings.Quantizer(normalize_input="none", codebook_size=32)),
    train=settings.Train(batch_size=8, steps=6, checkpoint_every=3, log_every=3, tensorboard=False, ema=0.9),
    optimizer=settings.Optimizer(warmup=1),
)
DDT = settings.DDTTokenizer(
    width=16, heads=2, num_tokens=4, encoder_depth=1, decoder_depth=1, quantizer=settings.Quantizer(codebook_size=32)
)
PIXELS = settings.ImageLoss(lpips_weight=0, lpips_weight_late=0, adversarial_weight_late=0)
RENDERER = replace(DDT, decoder=settings.Renderer(), stage="decoder", image_loss=PIXELS)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    path = tmp_path_factory.mktemp("first")
    experiment.train(FIRST, str(path))
    return str(path)


def second(first, **changes):
    return replace(FIRST, name="second", init_from=first, **changes)


def begun(s):
    """The state with which training begins, what the user is told, and the state without `init_from`."""
    built, said = experiment.build(s), []
    with jax.set_mesh(built.mesh):
        fresh, found = built.init(), warm_start.find(s, built.model, built.mesh, built.abstract, experiment.make_model)
        return found.give(fresh, said.append), "\n".join(said), fresh


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_it_begins_with_the_average_and_the_codebook_and_nothing_else(first):
    theirs = experiment.restore(first, whole=True)[1]
    assert not equal(theirs.params, theirs.ema)
    state, said, fresh = begun(second(first))
    assert equal(state.params, theirs.ema) and equal(state.ema, theirs.ema) and equal(state.extra, theirs.extra)
    assert not equal(fresh.params, theirs.ema) and int(state.step) == 0 and equal(state.opt_state, fresh.opt_state)
    assert "at step 6, its average" in said and "params/down (1)" in said and "extra/codebook (5)" in said


def test_nothing_is_read_of_the_other_run_but_what_goes_over(first, monkeypatch):
    asked, restore = [], checkpoint.Checkpoints.restore

    def watched(self, abstract, *rest, **options):
        asked.append((abstract, options))
        return restore(self, abstract, *rest, **options)

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", watched)
    begun(second(first))
    ((abstract, options),) = asked
    assert abstract.opt_state is None and abstract.params is None and options == {"partial": True}
    assert jax.tree.leaves(abstract.ema) and "codebook" in abstract.extra


@pytest.mark.slow
def test_without_an_average_it_takes_the_parameters(first, tmp_path):
    s = replace(FIRST, train=replace(FIRST.train, ema=0.0, steps=1))
    experiment.train(s, str(tmp_path))
    theirs = experiment.restore(str(tmp_path), whole=True)[1]
    state, said, _ = begun(second(str(tmp_path)))
    assert equal(state.params, theirs.params) and equal(state.ema, theirs.params) and "its parameters" in said


@pytest.mark.slow
def test_it_happens_at_the_start_and_never_again(first, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    s = second(str(moved), train=replace(FIRST.train, steps=4, checkpoint_every=2))
    experiment.train(s, str(tmp_path / "run"))
    whole = experiment.digest(str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    shutil.rmtree(moved)  # who goes on needs it no more
    experiment.train(s, str(tmp_path / "run"))
    assert experiment.digest(str(tmp_path / "run")) == whole


def test_where_there_is_no_run_or_one_of_other_sizes_nothing_is_written(first, tmp_path):
    wider, run = replace(FIRST.model, width=48), str(tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps(config.dump(FIRST)))
    for s, message in (
        (second(str(tmp_path / "none")), "init_from: .*none holds no run"),
        (second(str(empty)), "init_from: .*empty has no checkpoint yet"),
        (
            second(first, model=wider),
            r"4 arrays .* other shapes \(params/down float32\[3072, 32\] there, float32\[3072",
        ),
        (second(first, model=DDT), "init_from: no parameter there has a name that this run knows"),
    ):
        with pytest.raises(UserError, match=message) as error:
            experiment.train(s, run)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_decoder_alone_needs_a_run_with_its_codes(tmp_path):
    """Each found from settings and shapes alone: the first stage has a config and a checkpoint that nobody reads."""
    theirs = replace(FIRST, model=DDT)
    (tmp_path / "config.json").write_text(json.dumps(config.dump(theirs)))
    built = experiment.build(theirs)
    points = checkpoint.Checkpoints(tmp_path)
    with jax.set_mesh(built.mesh):
        points.save(built.init(), config.dump(theirs))
    points.close()

    def find(model, first=str(tmp_path)):
        s = replace(theirs, model=model, init_from=first)
        built = experiment.build(s)
        return warm_start.find(s, built.model, built.mesh, built.abstract, experiment.make_model)

    with pytest.raises(UserError, match="model.stage='decoder' goes on from .*set init_from"):
        find(RENDERER, first="")
    assert find(DDT, first="") is None
    with pytest.raises(UserError, match="makes other codes .*: model.mix, model.quantizer.normalize_input$"):
        find(replace(RENDERER, mix=False, quantizer=replace(DDT.quantizer, normalize_input="none")))
    plan = find(RENDERER).plan
    assert plan.fresh == ("params/decoder/canvas",)
    assert plan.left == ("params/decoder/embed/bias", "params/decoder/embed/kernel")
    assert "left behind: params/decoder/embed/bias, params/decoder/embed/kernel" in str(plan)
    state, _, _ = begun(replace(theirs, model=RENDERER, init_from=str(tmp_path)))
    assert equal(state.params["encoder"], experiment.restore(str(tmp_path))[1].ema["encoder"])


def test_a_part_that_is_not_trained_has_to_be_there():
    def state(*names):
        return TrainState(0, {n: jax.ShapeDtypeStruct((2,), np.float32) for n in names}, None, None, {}, 0, 0)

    with pytest.raises(UserError, match="init_from: lacks params/encoder, not trained here"):
        warm_start.plan(state("decoder"), state("decoder", "encoder"), ("params/encoder",))
    with pytest.raises(UserError, match="no parameter there has a name that this run knows"):
        warm_start.plan(state("a"), state("b"))
    plan = warm_start.plan(state("a", "b"), state("b", *(f"c{i}" for i in range(8))))
    assert (plan.copied, plan.left) == (("params/b",), ("params/a",))
    assert str(plan).endswith("params/c5 and 2 more\n  left behind: params/a")


def test_a_transformer_begins_with_imported_weights(tmp_path):
    from ddt_jax.multimodal import backbone
    from ddt_jax.multimodal.row_model import FROZEN
    from ddt_jax.nn.params import split
    from ddt_jax.training import weights

    sizes = settings.Transformer(vocab_size=40, width=16, depth=2, heads=2, kv_heads=1, mlp_width=32)
    theirs = split(backbone.init(replace(sizes, scan_layers=False), jax.random.key(7)))[0]
    about = {"kind": "llama", "settings": config.dump(replace(sizes, scan_layers=False))}
    weights.save(tmp_path / "w", weights.unrolled_arrays(theirs), about)

    def begin(transformer, image=None, **options):
        image = image or settings.CodeImages(num_tokens=4, codebook_size=8, **options)
        model = settings.Multimodal(transformer=transformer, image=image)
        s = settings.Experiment(model=model, init_from=str(tmp_path / "w"))
        built = experiment.build(s, jax.devices()[:1])
        found = warm_start.find(s, built.model, built.mesh, built.abstract, experiment.make_model)
        with jax.set_mesh(built.mesh):
            return found.give(built.init(), lambda line: None)

    state = begin(sizes)
    wanted = np.stack([theirs["blocks"][f"block_{i}"]["query"]["kernel"] for i in range(2)])
    updated = begin(replace(sizes, lora=settings.LoRA(rank=2, whole=("embed",))))
    for tree in (state.params, state.ema, updated.extra[FROZEN]):
        np.testing.assert_array_equal(tree["blocks"]["scanned"]["block"]["query"]["kernel"], wanted)
    for tree in (state.params, state.ema, updated.params, updated.ema):
        np.testing.assert_array_equal(tree["embed"], theirs["embed"])
    assert "embed" not in updated.extra[FROZEN]
    np.testing.assert_array_equal(updated.extra[FROZEN]["norm"]["scale"], theirs["norm"]["scale"])
    own = updated.params["blocks"]["scanned"]["block"]["query"]
    assert own.keys() == {"lora_a", "lora_b"} and np.any(own["lora_a"]) and not np.any(own["lora_b"])
    state = begin(sizes, code_places=True)  # which no LLaMA has: it is fresh
    np.testing.assert_array_equal(state.params["embed"], theirs["embed"])
    assert equal(state.ema["codes"], state.params["codes"]) and np.any(state.params["codes"]["places"])
    for lora in (settings.LoRA(), settings.LoRA(rank=2)):  # what takes denoised images in and out is fresh too
        state = begin(replace(sizes, lora=lora), settings.DiffusionImages(patch_size=8))
        tree = state.extra[FROZEN] if lora.rank else state.params
        np.testing.assert_array_equal(tree["embed"], theirs["embed"])
        assert equal(state.ema["coder"], state.params["coder"]) and "coder" in state.params
    with pytest.raises(UserError, match="vocab_size=40 there, 48 here.*--vocab-size"):
        begin(replace(sizes, vocab_size=48))
    with pytest.raises(UserError, match="rope_theta=500000.0 there, 1.0 here"):
        begin(replace(sizes, rope_theta=1.0))


def test_a_transformer_that_was_told_something_else_of_codes_is_named(monkeypatch):
    model = settings.Multimodal(image=settings.CodeImages(num_tokens=4, codebook_size=8, code_places=True))

    def begin(**changes):
        s = settings.Experiment(model=replace(model, image=replace(model.image, **changes)), init_from="there")
        monkeypatch.setattr(warm_start.checkpoint, "saved_config", lambda *args: config.dump(replace(s, model=model)))
        monkeypatch.setattr(warm_start.checkpoint, "saved_steps", lambda workdir: [1])
        warm_start.find(s, experiment.make_model(replace(s, model=DDT, init_from="")), None, None, None)

    with pytest.raises(UserError, match="there was trained with model.image.code_places=True; set it as there"):
        begin(code_places=False)
    with pytest.raises(UserError, match="trained on other codes than sequences.sources"):
        begin(codebook_size=16)


def test_a_transformer_in_which_other_weights_stand_still_is_named(monkeypatch):
    """Else what is frozen there would be fresh here, or the other way round."""

    def of(**lora):
        transformer = settings.Transformer(lora=settings.LoRA(**lora))
        image = settings.CodeImages(num_tokens=4, codebook_size=8, code_places=True)
        model = settings.Multimodal(transformer=transformer, image=image)
        return settings.Experiment(model=model, init_from="there")

    monkeypatch.setattr(warm_start.checkpoint, "saved_steps", lambda workdir: [1])
    kinds = of(), of(rank=2), of(rank=2, whole=("embed",))
    for there in kinds:
        monkeypatch.setattr(warm_start.checkpoint, "saved_config", lambda *args, there=there: config.dump(there))
        for s in kinds:
            if s is not there:
                with pytest.raises(UserError, match="other weights stand still than here; set model.transformer.lora"):
                    warm_start.find(s, experiment.make_model(replace(s, model=DDT, init_from="")), None, None, None)
