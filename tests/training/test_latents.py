"""A cache of latents: the same training as on the images it was made of, and never that of another codec."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import cli, config, experiment, looking, settings
from ddt_jax.data import latents as store
from ddt_jax.data.array_record import write_array_record
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.loader import Loader
from ddt_jax.errors import UserError
from ddt_jax.nn import params as declared
from ddt_jax.nn.codec import make_codec
from ddt_jax.training import latents

N, SIZE, K = 20, 8, 2
CODEC = settings.VAECodec(
    preset="custom",
    random_weights=True,
    sizes=settings.Autoencoder(block_out_channels=(4, 4), layers_per_block=1, latent_channels=2, norm_groups=2),
)
MODEL = settings.DDTTokenizer(
    num_tokens=K,
    patch_size=2,
    width=8,
    heads=1,
    encoder_depth=1,
    decoder_depth=1,
    mlp_ratio=1,
    quantizer=settings.Quantizer(code_dim=2, codebook_size=4),
    codec=CODEC,
)


PIXELS = settings.ImageLoss(lpips_weight=0, lpips_weight_late=0, adversarial_weight_late=0)
RENDERER = replace(MODEL, decoder=settings.Renderer(), image_loss=PIXELS)


def write_images(path, bad=()):
    rng = np.random.default_rng(0)
    records = []
    for i in range(N):
        image = rng.integers(0, 256, (SIZE + 2, SIZE, 3), np.uint8)
        records.append({"image": b"nothing" if i in bad else image, "label": i % 3})
        if i % 2:
            records[-1]["caption"] = f"number {i}"
    write_array_record(path, records)


def settings_for(tmp_path, **data):
    return settings.Experiment(
        data=settings.Data(source=f"arrayrecord:{tmp_path}/images", image_size=SIZE, max_bad_fraction=1.0, **data),
        model=MODEL,
        train=settings.Train(steps=2, batch_size=8, log_every=1, tensorboard=False),
        optimizer=settings.Optimizer(name="adamw"),
        evaluate=settings.Evaluate(batch_size=8),
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(settings of training on images, folder of their latents, what the writer said)."""
    root = tmp_path_factory.mktemp("latents")
    write_images(root / "images")
    s = settings_for(root)
    return s, root / "kept", experiment.write_latents(s, str(root / "kept"), per_shard=9)


def on_latents(s, folder):
    return replace(s, data=replace(s.data, source=f"latents:{folder}"))


def test_every_image_has_its_latent_with_what_is_known_of_it(kept):
    s, folder, said = kept
    assert said == {"images": N, "records": N, "unreadable": 0, "shards": 3, "written": 3}
    assert sorted(p.name for p in folder.iterdir()) == [*(store.shard_name(i, 3) for i in range(3)), "latents.json"]
    source, images = open_source(f"latents:{folder}"), open_source(s.data.source)
    assert len(source) == N
    assert [source[i]["label"] for i in range(N)] == [i % 3 for i in range(N)]
    assert source[3]["caption"] == "number 3" and "caption" not in source[4]
    assert source[7]["meta"] == {"index": 7} and "latents-00001" in source.describe(9)
    built = experiment.build(s, jax.devices()[:1])
    cropped = images[7]["image"][1:-1]
    mean, logvar = built.model.codec.posterior(built.init_codec(), cropped[None] / np.float32(127.5) - 1)
    np.testing.assert_allclose(source[7]["latent_mean"], mean[0], atol=1e-5)
    np.testing.assert_allclose(source[7]["latent_logvar"], logvar[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sample", [True, False])
def test_the_loss_is_that_of_training_on_the_images(kept, sample):
    s, folder, _ = kept
    s = replace(s, model=replace(MODEL, codec=replace(CODEC, sample=sample)))
    built = experiment.build(s, jax.devices()[:1])
    loss = jax.jit(built.model.loss_fn)
    state = built.init()
    jax.tree.map(np.testing.assert_array_equal, built.init_codec(), state.extra["codec"])
    batches = []
    for data in (s.data, on_latents(s, folder).data):
        batch = Loader(open_source(data.source), data, batch_size=8, seed=3).batch_at(1)
        batches.append({name: x for name, x in batch.items() if name != "label"})
    assert set(batches[1]) == {"latent_mean", "latent_logvar", "slot", "index"}
    np.testing.assert_array_equal(batches[0]["index"], batches[1]["index"])
    sums = [loss(state.params, state.extra, batch, jax.random.key(1)) for batch in batches]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *sums)
    other = loss(state.params, state.extra, batches[1], jax.random.key(2))[0]["flow"]
    # An untrained x0-prediction is zero whatever the noise: only a drawn latent can move its loss.
    assert (abs(float(other - sums[1][0]["flow"])) > 1e-3) == sample


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant_conv", [True, False])
def test_what_is_stored_is_all_there_is(dtype, quant_conv):
    codec = make_codec(replace(CODEC, dtype=dtype, sizes=replace(CODEC.sizes, use_quant_conv=quant_conv)))
    params = declared.split(codec.init(jax.random.key(0))["codec"])[0]
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, SIZE, SIZE, 3)), jnp.float32)
    for x in jax.jit(codec.posterior)(params, images):
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(x).astype(store.TYPES[dtype]).astype(np.float32), x)


@pytest.mark.slow
def test_a_run_trains_on_latents_and_goes_on(kept, tmp_path, capfd):
    s, folder, _ = kept
    s = on_latents(s, folder)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), experiment.abstract_batch(experiment.build(s)))
    batch = Loader(open_source(s.data.source), s.data, batch_size=8, seed=0).batch_at(0)
    del expected["stop"]
    assert expected == {name: (batch[name].shape, batch[name].dtype) for name in expected}
    assert experiment.train(s, str(tmp_path / "run"))["finished"]
    assert f"{N} images from latents:{folder}" in capfd.readouterr().err


@pytest.mark.slow
def test_an_interrupted_writer_goes_on_with_what_is_missing(kept, tmp_path, monkeypatch):
    s, folder, _ = kept
    to, calls, whole = tmp_path / "again", [], store.write_shard

    def interrupted(path, records):
        if calls:
            next(iter(records))
            raise KeyboardInterrupt
        calls.append(path)
        return whole(path, records)

    monkeypatch.setattr(store, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.write_latents(s, str(to), per_shard=9)
    with pytest.raises(UserError, match="has 1 of 3 shards; the same"):
        open_source(f"latents:{to}")
    monkeypatch.setattr(store, "write_shard", whole)
    before = calls[0].stat().mtime
    said = experiment.write_latents(s, str(to), per_shard=9)
    assert said["written"] == 2 and said["records"] == N and calls[0].stat().mtime == before
    again, first = open_source(f"latents:{to}"), open_source(f"latents:{folder}")
    for i in range(N):
        np.testing.assert_allclose(again[i]["latent_mean"], first[i]["latent_mean"], atol=1e-5)
    (to / store.shard_name(1, 3)).unlink()
    with pytest.raises(UserError, match="holds 11 latents, not the 20"):
        open_source(f"latents:{to}")
    assert experiment.write_latents(s, str(to), per_shard=9)["written"] == 1
    with pytest.raises(UserError, match="begun with per_shard=9, now it is 5"):
        experiment.write_latents(s, str(to), per_shard=5)


@pytest.mark.slow
def test_images_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    write_images(tmp_path / "images", bad=(0, 13))
    said = experiment.write_latents(settings_for(tmp_path), str(tmp_path / "kept"))
    assert (said["records"], said["unreadable"], said["shards"]) == (N - 2, 2, 1)
    source = open_source(f"latents:{tmp_path}/kept")
    assert [source[i]["meta"]["index"] for i in (0, 11, 12)] == [1, 12, 14]


@pytest.mark.slow
def test_latents_of_another_codec_or_preprocessing_are_refused(kept, tmp_path):
    s, folder, _ = kept
    s = on_latents(s, folder)
    half = replace(MODEL, codec=replace(CODEC, dtype="bfloat16"))
    for wrong, message in (
        (replace(s, seed=1), "made with other model.codec.weights; write"),
        (replace(s, data=replace(s.data, image_size=16)), r"other data.image_size \(8, here 16\)"),
        (replace(s, data=replace(s.data, crop="stretch")), r"other data.crop \(center, here stretch\)"),
        (replace(s, model=half), r"other model.codec.dtype \(float32, here bfloat16\)"),
        (replace(s, data=replace(s.data, flip=True)), "data.flip=False and data.crop=center"),
        (replace(s, data=replace(s.data, crop="random")), "data.flip=False and data.crop=center"),
        (replace(s, model=replace(MODEL, codec=settings.IdentityCodec())), "model.codec has no latents"),
        (replace(s, model=RENDERER), "a renderer learns from images, and data.source=latents:.* has none"),
    ):
        with pytest.raises(UserError, match=message) as error:
            experiment.train(wrong, str(tmp_path / "run"))
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="holds no pictures"):
        looking.look_at_data(s, "train", 1, str(tmp_path / "x.png"))
    with pytest.raises(UserError, match="data.eval_source=latents:x holds no images"):
        config.from_dict(config.override(config.dump(s), (("data.eval_source", "latents:x"),)))


def test_the_weights_count_only_once_they_are_known(kept):
    s = kept[0]
    model = experiment.build(s, jax.devices()[:1]).model
    assert "model.codec.weights" not in latents.identity(model, s.data)
    trees = [{"a": jnp.arange(3.0)}, {"a": jnp.arange(3.0) + 1e-7}]
    known = [latents.identity(model, s.data, tree)["model.codec.weights"] for tree in trees]
    assert len(known[0]) == 64 and known[0] != known[1]


def test_what_is_no_folder_of_latents_is_said_so(kept, tmp_path):
    with pytest.raises(UserError, match="has no latents.json; write it with"):
        open_source(f"latents:{tmp_path}")
    right = {"identity": {}, "source": "x", "shape": [2, 2, 2], "dtype": "float32", "shards": 1, "counts": {"0": 1}}
    wrong_shapes = [right | {"shape": shape} for shape in (None, [2], [50_000_000, 2, 4])]
    for wrong in ({"shape": []}, right | {"dtype": []}, right | {"counts": {"0": "1"}}, *wrong_shapes):
        (tmp_path / "latents.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="cannot be read as the index"):
            open_source(f"latents:{tmp_path}")
    whole = kept[1]
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    store.write_shard(tmp_path / store.shard_name(2, 3), [b"\xc1", store.pack(np.zeros(3), np.zeros(3), index=0)])
    source = open_source(f"latents:{tmp_path}")
    assert len(source) == N and source[0]["latent_mean"].shape == (4, 4, 2)
    for index in (18, 19):
        with pytest.raises(BadRecord, match="not a latent"):
            source[index]


@pytest.mark.slow
def test_the_verb_says_what_it_did(kept, tmp_path, capsys):
    s, folder, _ = kept
    file = tmp_path / "c.py"
    file.write_text(
        "from ddt_jax import config\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({config.dump(s)!r})\n"
    )
    arguments = ["latents", "--config", str(file), "--to", str(folder)]
    assert cli.main([*arguments, "--per-shard", "9", "--json", str(tmp_path / "r.json")]) == 0
    assert f"{N} latents of {N} images in 3 shards: {folder}" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["written"] == 0
    assert cli.main([*arguments, "--per-shard", "0"]) == cli.EXIT_USER
    assert cli.main([*arguments[:-1], "/proc/none", "--per-shard", "9"]) == cli.EXIT_USER
    assert "cannot write to /proc/none" in capsys.readouterr().err
