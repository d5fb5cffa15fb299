"""Settings from files and the command line: what is wrong is said in one line that names it."""

import dataclasses
import inspect
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from ddt_jax import config, settings
from ddt_jax.errors import UserError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py"))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from ddt_jax import config\n"
        "def get_config(variant='a'):\n"
        "    c = config.defaults()\n"
        "    c.name = variant\n"
        "    return c\n"
    )
    return str(path)


def fails(message, tree_or_overrides, file=None):
    with pytest.raises(UserError) as error:
        if file:
            config.load(file, tuple(tree_or_overrides))
        else:
            config.from_dict(tree_or_overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_defaults_survive_a_round_trip():
    assert config.from_dict(config.dump(settings.Experiment())) == settings.Experiment()
    assert config.from_dict(json.loads(config.to_json(settings.Experiment()))) == settings.Experiment()


def test_variant_and_overrides_reach_the_settings(config_file):
    e = config.load(f"{config_file}:b", (("optimizer.lr", "1e-4"), ("data.flip", "true"), ("train.steps", "7")))
    assert (e.name, e.optimizer.lr, e.data.flip, e.train.steps) == ("b", 1e-4, True, 7)
    assert config.load(config_file).name == "a"


def test_override_reads_lists_and_keeps_text_that_looks_like_a_number(config_file):
    e = config.load(config_file, (("evaluate.visible", "[0.5, 1]"), ("name", "12")))
    assert e.evaluate.visible == (0.5, 1.0)
    assert e.name == "12"


def test_unknown_key_names_the_nearest(config_file):
    fails("optimizer.lr_ is not a setting; did you mean optimizer.lr?", [("optimizer.lr_", "1")], config_file)
    fails("optimiser is not a setting; did you mean optimizer?", [("optimiser.lr", "1")], config_file)
    fails("did you mean model.width", {"model": {"kind": "ddt", "widht": 3}})
    fails("model.kind=[] is not one of", {"model": {"kind": []}})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.steps", "many", "train.steps must be a whole number, got 'many'"),
        ("train.steps", "1.5", "train.steps must be a whole number"),
        ("train.steps", "True", "train.steps must be a whole number"),
        ("optimizer.lr", "nan", "optimizer.lr must be a number"),
        ("optimizer.lr", "1e999", "optimizer.lr must be finite"),
        ("data.flip", "1", "data.flip must be True or False"),
        ("data.crop", "middle", "data.crop='middle' is not one of 'center', 'random', 'stretch'"),
        ("data.background", "[1, 2]", "data.background needs 3 values, got 2"),
        ("train", "3", "train is a group"),
        ("model.kind", "gan", "model.kind='gan' is not one of"),
        ("train.accumulate", "3", "train.batch_size=32 does not divide into train.accumulate=3"),
        ("train.steps", "0", "train.steps must be at least 1"),
        ("data.image_size", "33", "is not a multiple of model.patch_size"),
        ("data.flip", "{[]: 1}", "data.flip must be True or False"),
        ("optimizer.lr", "(" * 5000, "optimizer.lr must be a number"),
        ("optimizer.lr", "9" * 400, "optimizer.lr must be finite"),
        ("model.heads", "0", "model.heads must be at least 1"),
        ("model.patch_size", "0", "model.patch_size must be at least 1"),
        ("model.heads", "5", "model.width=96 is not a multiple of model.heads=5"),
        ("evaluate.visible", "[0, 1]", "evaluate.visible"),
        ("train.ema", "1", "train.ema"),
        ("train.silence_limit", "-1", "train.silence_limit must not be negative, got -1"),
        ("optimizer.clip_norm", "-1", "optimizer.clip_norm must not be negative, got -1"),
        ("optimizer.warmup", "-5", "optimizer.warmup must not be negative, got -5"),
        ("optimizer.weight_decay", "-0.1", "optimizer.weight_decay must not be negative, got -0.1"),
        ("optimizer.newton_schulz_steps", "0", "optimizer.newton_schulz_steps must be at least 1, got 0"),
        ("optimizer.eps", "-1", "optimizer.eps must be above 0, got -1"),
        ("optimizer.b1", "1.5", "optimizer.b1 must lie in [0, 1), got 1.5"),
        ("optimizer.b2", "1", "optimizer.b2 must lie in [0, 1), got 1"),
        ("optimizer.momentum", "-0.5", "optimizer.momentum must lie in [0, 1), got -0.5"),
        ("optimizer.decay_fraction", "-1", "optimizer.decay_fraction must lie in [0, 1], got -1"),
        ("optimizer.final_lr_fraction", "-2", "optimizer.final_lr_fraction must lie in [0, 1], got -2"),
        ("model.flow.solver_steps", "0", "model.flow.solver_steps must be at least 1, got 0"),
        ("model.flow.shift", "0", "model.flow.shift must be above 0, got 0"),
        ("model.flow.condition_drop", "1.5", "model.flow.condition_drop must lie in [0, 1], got 1.5"),
        ("model.quantizer.decay", "1.0", "model.quantizer.decay must lie in [0, 1), got 1"),
        ("model.quantizer.commitment", "-1", "model.quantizer.commitment must not be negative, got -1"),
        ("model.quantizer.init_variance", "2", "model.quantizer.init_variance must lie in (0, 1), got 2"),
        ("optimizer.discriminator.lr", "-1", "optimizer.discriminator.lr must be above 0, got -1"),
        ("optimizer.discriminator.b1", "-0.5", "optimizer.discriminator.b1 must lie in [0, 1), got -0.5"),
        ("optimizer.discriminator.b2", "1", "optimizer.discriminator.b2 must lie in [0, 1), got 1"),
        ("optimizer.discriminator.clip_norm", "-1", "optimizer.discriminator.clip_norm must not be negative, got -1"),
    ],
)
def test_wrong_values_are_named(config_file, key, value, message):
    fails(message, [(key, value)], config_file)


def test_a_zero_that_turns_a_part_of_the_optimizer_off_is_taken(config_file):
    off = ("weight_decay", "clip_norm", "discriminator.clip_norm", "warmup", "b1", "momentum", "final_lr_fraction")
    overrides = tuple((f"optimizer.{name}", "0") for name in off)
    o = config.load(config_file, (*overrides, ("optimizer.decay_fraction", "1"))).optimizer
    assert (o.clip_norm, o.discriminator.clip_norm, o.warmup, o.b1, o.decay_fraction) == (0, 0, 0, 0, 1)


def test_another_kind_has_its_own_defaults():
    """Also of settings with the same name: a flow decoder's tokens see the image, a released renderer's do not."""
    file = f"{ROOT}/configs/ddt_selftok_256.py"
    assert config.load(file).model.decoder.context_see_xt
    decoder = (("model.decoder.depth", "6"), ("model.decoder.kind", "renderer"))
    for overrides in (decoder, decoder[::-1]):
        assert config.load(file, overrides).model.decoder == settings.SelftokRenderer(depth=6)
    kept = config.load(file, (("model.decoder.kind", "mmdit"),)).model.decoder
    assert kept == config.load(file).model.decoder
    images = f"{ROOT}/configs/transfusion_scenes.py"
    unet = config.load(images, (("model.image.coder.kind", "unet"), ("model.image.coder.width", "64")))
    assert unet.model.image.coder == settings.UNetCoder(width=64)
    assert config.load(images, (("model.image.diffusion.kind", "ddpm"),)).model.image.diffusion == settings.DDPM()
    spatial = config.load(f"{ROOT}/configs/smoke.py", (("model.kind", "spatial"),))
    assert spatial.model == settings.SpatialTokenizer()


def test_a_run_can_be_named_by_its_settings(tmp_path):
    s = config.load(f"{ROOT}/configs/smoke.py")
    (tmp_path / "config.json").write_text(config.to_json(s))
    found = config.load(f"{tmp_path}/config.json", (("train.steps", "7"),))
    assert found == replace(s, train=replace(s.train, steps=7))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json failed with JSONDecodeError"):
        config.load(f"{tmp_path}/config.json")


def test_runs_from_when_remat_was_yes_or_no_are_read():
    tree = config.dump(settings.Experiment(model=settings.SelftokTokenizer()))
    for before, now in ((True, "full"), (False, "none")):
        tree["model"]["remat"] = before
        assert config.from_dict(tree).model.remat == now


def test_what_does_nothing_is_refused_of_a_new_config_and_read_of_a_run():
    weighted = ("model.token_gradient_weights", "True")
    for file, changes, message in (
        (
            "smoke.py",
            (weighted, ("model.decoder.kind", "renderer")),
            "token_gradient_weights=True is for a flow decoder",
        ),
        ("smoke.py", (weighted, ("model.stage", "decoder")), "token_gradient_weights=True is for a flow decoder"),
        ("smoke.py", (weighted, ("model.flow.time", "logit_normal")), "token_gradient_weights=True is for a flow"),
        ("seed_scenes.py", (("model.quantizer.diversity", "1"),), "diversity=1.0 is no part of SEED's loss"),
    ):
        path = f"{ROOT}/configs/{file}"
        with pytest.raises(UserError, match=message):
            config.load(path, changes)
        config.from_dict(config.override(config.dump(config.load(path)), changes))


def test_an_autoencoder_has_no_codes_to_verify():
    tree = config.dump(settings.Experiment(model=settings.VAE(), evaluate=settings.Evaluate(verifier=True)))
    fails("model.kind='vae' is none; set evaluate.verifier=False", tree)
    tree["evaluate"]["verifier"] = False
    assert config.from_dict(tree).model == settings.VAE()


def test_images_are_retrieved_and_not_each_caption_of_them():
    source = "karpathy:/coco/dataset_coco.json?split=val&each=caption"
    tree = config.dump(settings.Experiment(model=settings.SEED(), data=settings.Data(eval_source=source)))
    fails("has a record of each caption, images are retrieved; leave out each=caption", tree)
    tree["data"]["eval_source"] = source.removesuffix("&each=caption")
    assert config.from_dict(tree).data.eval_source.endswith("split=val")


def test_missing_and_failing_files_are_user_errors(tmp_path):
    fails("does not exist", [], str(tmp_path / "none.py"))
    bad = tmp_path / "bad.py"
    bad.write_text("def get_config():\n    return 1 / 0\n")
    fails("failed with ZeroDivisionError", [], str(bad))


def test_difference_ignores_what_a_run_may_change():
    before = config.dump(settings.Experiment())
    after = config.dump(dataclasses.replace(settings.Experiment(), seed=1, train=settings.Train(log_every=7)))
    assert config.difference(before, after) == ["seed"]
    assert config.difference(before, before) == []


def test_a_key_with_a_line_in_it_is_refused_in_one_line():
    with pytest.raises(UserError, match="is not a setting") as error:
        config.from_dict({"two\nlines": 1})
    assert "\n" not in str(error.value)


def test_settings_that_decide_codes_exist():
    models = settings.DDTTokenizer(codec=settings.VAECodec()), settings.SelftokTokenizer(), settings.SEED()
    names, groups, decisive = [], ("quantizer", "codec", "vision", "qformer"), set()
    for model in models:
        tree = config.dump(settings.Experiment(model=model))
        names += config.difference(tree, {"data": {}, "model": dict.fromkeys(groups, {})})
        decisive |= {*config.decides_codes(model.kind)}
    assert [code for code in decisive if not any(name.startswith(code) for name in names)] == []
    assert {c.rsplit(".", 1)[0] for c in decisive - {*config.decides_codes("seed")}} == {"model.codec"}
    assert all("quantizer" in c for c in {*config.decides_codes("ddt")} - {*config.decides_codes("ddt", False)})


def test_the_renderer_of_scenes_is_for_the_codes_of_their_tokenizer():
    file = str(ROOT / "configs" / "ddt_scenes.py")
    first, second = (config.dump(config.load(f"{file}:{variant}")) for variant in ("tokenizer", "renderer"))
    changed = config.difference(first, second)
    assert "model.stage" in changed and not [name for name in changed if name.startswith(config.decides_codes("ddt"))]
    with pytest.raises(UserError, match="'rendrer' is no variant of ddt_scenes"):
        config.load(f"{file}:rendrer")


def test_configs_beside_llama_scenes_change_what_they_say_and_no_more():
    base, spatial, edits, seed = (
        config.dump(config.load(f"{ROOT}/configs/{name}.py:R"))
        for name in ("llama_scenes", "llama_spatial_scenes", "llama_edits", "seed_llama_scenes")
    )
    assert config.difference(base, spatial) == ["model.transformer.qk_norm", "model.transformer.z_loss", "name"]
    assert config.difference(base, edits) == ["name", "sequences.sources"]
    assert config.difference(base, seed) == ["name", "sequences.sources"]
    assert seed["sequences"]["tokenizer"] == "R/draw"  # the stage that draws
    for name, split in (("sources", "train"), ("eval_sources", "heldout")):
        assert seed["sequences"][name] == [base["sequences"][name][0] | {"folder": f"R/{split}_codes"}]
        assert edits["sequences"][name][:1] == base["sequences"][name]


def test_stages_of_seed_go_on_with_what_stands():
    def load(name):
        return config.dump(config.load(f"{ROOT}/configs/{name}"))

    first = load("seed_scenes.py:align")
    for variant in ("codes", "codes_published", "draw"):
        changed = config.difference(first, load(f"seed_scenes.py:{variant}"))
        assert "model.stage" in changed and not [
            name for name in changed if name.startswith(config.decides_codes("seed"))
        ]
    assert config.difference(first, load("seed_scenes.py:align_bidirectional")) == ["model.causal", "name"]
    describe, joint = load("seed_opt.py:describe"), load("seed_opt.py:joint")
    assert config.difference(describe, joint) == ["init_from", "name", "sequences.sources"]
    pretrain, instruct = load("seed_llama_7b.py:pretrain"), load("seed_llama_7b.py:instruct")
    assert pretrain["model"] == instruct["model"] and instruct["sequences"]["sources"][0]["formats"]["own"] == 1.0


def test_arms_of_the_comparison_differ_in_their_images_alone():
    """The base is whatever llama_scenes.py is at the moment; Chameleon's two additions are everybody's."""
    file = f"{ROOT}/configs/comparison_scenes.py"
    root = "runs/comparison/codes"
    codes, spatial, unordered, seed, denoised, blocks = (
        config.dump(config.load(f"{file}:{arm}"))
        for arm in ("codes", f"spatial:{root}", f"unordered:{root}", f"seed:{root}", "transfusion", "blocks")
    )
    for other in (spatial, unordered, seed):
        assert config.difference(codes, other) == ["name"]
    assert config.difference(denoised, blocks) == ["model.image.block_size", "name", "sequences.context"]
    assert blocks["sequences"]["context"] - denoised["sequences"]["context"] == 2 * 64  # noised copies of both
    assert set(config.difference(codes, denoised)) == {
        *(f"model.image.{name}" for name in codes["model"]["image"].keys() | denoised["model"]["image"].keys()),
        "name",
        "sequences.context",
        "sequences.sources",
    }
    assert denoised["sequences"]["context"] - codes["sequences"]["context"] == 2 * (64 - 16)  # two documents, longer
    assert denoised["evaluate"] == codes["evaluate"] and codes["evaluate"]["images"] == 2048
    formats = [c["sequences"][parts][0]["formats"] for c in (codes, denoised) for parts in ("sources", "eval_sources")]
    assert all(f == formats[0] for f in formats)
    base = config.dump(config.load(f"{ROOT}/configs/llama_scenes.py:runs/comparison/codes"))
    more = ["model.transformer.qk_norm", "model.transformer.z_loss", "name", "sequences.context", "sequences.images"]
    assert config.difference(base, codes) == more


@pytest.mark.smoke
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_named_config_is_as_reviewed(path):
    """To accept a change: DDT_JAX_UPDATE_GOLDENS=1 pytest tests/test_config.py, and read the diff."""
    found = config.to_json(config.load(str(path)))
    golden = ROOT / "tests" / "goldens" / "configs" / f"{path.stem}.json"
    if os.environ.get("DDT_JAX_UPDATE_GOLDENS"):
        golden.write_text(found)
    assert golden.exists(), f"no golden for {path.name}; see this test's docstring"
    assert found == golden.read_text(), (
        f"{path.name} resolves to other settings than {golden.name}; see this test's docstring"
    )


def test_every_golden_has_its_config():
    goldens = {p.stem for p in (ROOT / "tests" / "goldens" / "configs").glob("*.json")}
    assert goldens == {p.stem for p in CONFIGS}


def variant_of(path):
    """The name of what follows the file of a config, "" if nothing may."""
    return next(iter(inspect.signature(config.sibling(str(path), path.stem).get_config).parameters), "")


@pytest.mark.parametrize("path", [p for p in CONFIGS if variant_of(p) != "root"], ids=lambda p: p.stem)
def test_no_config_takes_a_variant_that_it_does_not_have(path):
    """But for those whose variant is a folder, which may have any name."""
    with pytest.raises(UserError, match="'nonsense'.*choose" if variant_of(path) else "has no variants; leave out"):
        config.load(f"{path}:nonsense")
