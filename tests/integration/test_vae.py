"""An autoencoder from training to the codec of a tokenizer: verbs, export in diffusers' layout, and back."""

import json
import re

import jax
import numpy as np
import pytest

from ddt_jax import cli, config, experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.interop import diffusers_vae
from ddt_jax.nn import lpips
from ddt_jax.nn.codec import make_codec
from ddt_jax.training import feed

pytestmark = pytest.mark.slow

CONFIG = """
from ddt_jax import config, settings
def get_config():
    c = config.defaults()
    c.model = config.defaults(settings.VAE)
    c.model.sizes.block_out_channels = (8, 8)
    c.model.sizes.layers_per_block, c.model.sizes.norm_groups, c.model.sizes.latent_channels = 1, 4, 2
    c.model.image_loss.discriminator.width, c.model.image_loss.discriminator.layers = 8, 2
    c.model.image_loss.discriminator.norm_groups = 4
    c.model.image_loss.late_from = 2
    c.data.image_size, c.data.source, c.data.eval_source = 16, "digits:train", "digits:test"
    c.optimizer.name = "adamw"
    c.train.steps, c.train.batch_size, c.train.log_every = 4, 8, 2
    c.evaluate.images, c.evaluate.batch_size, c.evaluate.pictures = 16, 8, 4
    return c
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("vae")
    (root / "vae.py").write_text(CONFIG)
    assert cli.main(["train", "--config", str(root / "vae.py"), "--workdir", str(root / "run")]) == 0
    return root


def test_a_run_says_that_it_goes_without_lpips(tmp_path, capsys):
    (tmp_path / "vae.py").write_text(CONFIG)
    start = ["train", "--config", str(tmp_path / "vae.py"), "--config.train.steps=1"]
    assert cli.main([*start, "--workdir", str(tmp_path / "a")]) == 0
    assert "WITHOUT LPIPS" in capsys.readouterr().err
    missing = [f"--config.model.image_loss.lpips_{name}_file=/nowhere/{name}.pth" for name in ("backbone", "heads")]
    assert cli.main([*start, "--workdir", str(tmp_path / "b"), *missing]) == cli.EXIT_USER
    assert "/nowhere/backbone.pth" in capsys.readouterr().err
    assert not (tmp_path / "b").exists(), "the directory is left to the run with the right files"


def test_verbs_work_without_codes(trained, tmp_path, capsys):
    from PIL import Image

    run = str(trained / "run")
    assert cli.main(["evaluate", "--workdir", run]) == 0
    results = json.loads((trained / "run" / "results.json").read_text())
    assert {"psnr", "ssim", "kl", "latent_mean", "latent_std"} <= results.keys()
    Image.new("RGB", (20, 20), (200, 10, 10)).save(tmp_path / "a.png")
    assert cli.main(["reconstruct", "--workdir", run, str(tmp_path / "a.png")]) == 0
    assert (trained / "run" / "reconstruct.png").exists()
    capsys.readouterr()
    assert cli.main(["export", "selftok", "--workdir", run, "--to", str(tmp_path / "x.pth")]) == cli.EXIT_USER


def test_what_was_exported_is_the_codec_of_a_tokenizer(trained, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert cli.main(["export", "vae", "--workdir", str(trained / "run"), "--to", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    namespace = {"config": config, "settings": settings, "c": config.defaults()}
    exec("\n".join(line.strip() for line in lines if re.match(r"\s+c\.model\.codec", line)), namespace)
    s = config.from_dict(namespace["c"].to_dict())
    codec = make_codec(s.model.codec)
    params = diffusers_vae.read(codec.weights, codec.sizes)

    built, state = experiment.restore(str(trained / "run"))
    average = jax.device_get(state.ema)
    assert "discriminator" in average and "discriminator" not in params
    for name in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, params[name], average[name])

    # Latents of the images it was measured on: zero mean, unit deviation of draws.
    batches = list(feed.open_images(built.settings, built.settings.data.eval_source).eval_batches(16, 8))
    images = np.concatenate([b["image"] for b in batches]) / np.float32(127.5) - 1
    posterior = built.model.encode(average, images)
    draws = posterior.mean + np.exp(posterior.logvar / 2) * np.random.default_rng(0).normal(size=posterior.mean.shape)
    latents = (draws - codec.sizes.shift_factor) * codec.sizes.scaling_factor
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.05  # of 2,048 drawn numbers
    np.testing.assert_allclose(
        codec.encode(params, images),
        (posterior.mean - codec.sizes.shift_factor) * codec.sizes.scaling_factor,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        codec.decode(params, codec.encode(params, images)), built.model.decode(average, posterior.mean), atol=1e-4
    )


def test_diffusers_reads_what_was_exported(trained, tmp_path, oracle):
    torch, diffusers = oracle("torch"), oracle("diffusers")
    assert cli.main(["export", "vae", "--workdir", str(trained / "run"), "--to", str(tmp_path)]) == 0
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    built, state = experiment.restore(str(trained / "run"))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        found = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).sample.numpy()
    params = built.model.autoencoder_params(state.ema)
    ours = built.model.decode(params, built.model.encode(params, images).mean)
    np.testing.assert_allclose(found.transpose(0, 2, 3, 1), ours, atol=1e-4)


def test_lpips_is_read_from_torch_files_into_a_run(tmp_path, oracle):
    torch = oracle("torch")
    rng, shapes = np.random.default_rng(0), lpips.abstract("alexnet")
    features = {}
    for i, conv in zip((0, 3, 6, 8, 10), shapes["features"], strict=True):
        h, w, n, out = conv["kernel"].shape
        features[f"features.{i}.weight"] = torch.from_numpy(rng.normal(size=(out, n, h, w)).astype(np.float32))
        features[f"features.{i}.bias"] = torch.zeros(out)
    heads = {f"lin{i}.model.1.weight": torch.ones(1, *s.shape, 1, 1) for i, s in enumerate(shapes["heads"])}
    torch.save(features, tmp_path / "alexnet.pth")
    torch.save(heads, tmp_path / "heads.pth")
    loss = settings.ImageLoss(
        lpips_backbone="alexnet",
        lpips_backbone_file=str(tmp_path / "alexnet.pth"),
        lpips_heads_file=str(tmp_path / "heads.pth"),
        adversarial_weight_late=0.0,
    )
    sizes = settings.Autoencoder(block_out_channels=(8,), layers_per_block=1, latent_channels=2, norm_groups=4)
    model = settings.VAE(sizes=sizes, image_loss=loss)
    built = experiment.build(settings.Experiment(model=model, train=settings.Train(steps=2, batch_size=8)))
    state = built.init()
    kernel = features["features.3.weight"].numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(state.extra["lpips"]["features"][1]["kernel"], kernel)
    assert built.model.image_loss.notes == ()
    images = rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    with jax.set_mesh(built.mesh):
        batch = {"image": images, "slot": np.arange(8, dtype=np.int32), "stop": np.zeros(8, np.int32)}
        state, metrics = built.step(state, meshes.put_batch(batch, built.mesh))
    assert metrics["lpips"] > 0 and metrics["bad_step"] == 0
    np.testing.assert_array_equal(state.extra["lpips"]["features"][1]["kernel"], kernel)
