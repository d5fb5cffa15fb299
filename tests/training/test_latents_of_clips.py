"""Kept latents of clips: the same parts of the same clips as are read of the videos, whatever part is asked for."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from ddt_jax import experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.data.base import open_source
from ddt_jax.errors import UserError
from ddt_jax.tokenizers.base import example_keys, make_tokenizer
from ddt_jax.training import feed, latents
from ddt_jax.training.state import unbox
from tests.tokenizers.acdit_small import SIZE, small

LENGTHS = (3, 9, 2, 6, 4, 7, 5)  # frames; one clip is too short for three, one has exactly as many
CODEC = settings.VAECodec(
    preset="custom",
    random_weights=True,
    sizes=settings.Autoencoder(block_out_channels=(4, 4), layers_per_block=1, latent_channels=2, norm_groups=2),
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(settings of training on the clips, model, its codec's parameters, folder of latents, what the writer said)."""
    root, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    for i, frames in enumerate(LENGTHS):
        folder = root / "clips" / f"class{i % 2}" / f"clip{i}"
        folder.mkdir(parents=True)
        for t in range(frames):
            Image.fromarray(rng.integers(0, 256, (SIZE + 2, SIZE, 3), np.uint8)).save(folder / f"{t:02}.png")
    s = settings.Experiment(
        data=settings.Data(
            source=f"video:{root}/clips", image_size=SIZE, frames=3, clip_start="random", max_bad_fraction=1.0
        ),
        model=small(patch_size=2, block_size=4, heads=1, classes=2, codec=CODEC),
        train=settings.Train(batch_size=8),
        evaluate=settings.Evaluate(batch_size=8),
    )
    model = make_tokenizer(s.model, SIZE, 8, 3)
    params = unbox(jax.jit(model.codec.init)(jax.random.key(0)))["codec"]
    return s, model, params, root / "kept", write(s, model, params, root / "kept")


def write(s, model, params, folder):
    """Four frames at a time: the first three clips have nine."""
    mesh = meshes.make_mesh(settings.Mesh(), jax.devices()[:1])
    source = open_source(s.data.source, clips=True)
    with jax.set_mesh(mesh):
        return latents.write(epath.Path(folder), source, s.data, model, params, mesh=mesh, batch_size=4, per_shard=3)


def loaders(kept, **data):
    """Of the clips and of their latents."""
    s, _, _, folder, _ = kept
    s = replace(s, data=replace(s.data, **data))
    return [feed.open_images(s, spec) for spec in (s.data.source, f"latents:{folder}")]


def test_every_frame_of_every_clip_has_its_latent(kept):
    s, model, params, folder, said = kept
    n = len(LENGTHS)
    assert said == {"images": n, "records": n, "unreadable": 0, "shards": 3, "written": 3}
    source, clips = open_source(f"latents:{folder}", clips=True), open_source(s.data.source, clips=True)
    order = [int(clips.describe(i)[-1]) for i in range(n)]  # by class, then by number
    assert [len(source[i]["latent_mean"]) for i in range(n)] == [LENGTHS[k] for k in order]
    assert [source[i]["label"] for i in range(n)] == [k % 2 for k in order]
    frames = np.stack(clips[1]["video"].read(range(LENGTHS[order[1]]), s.data))[:, 1:-1]
    encode = jax.jit(model.codec.posterior)
    posterior = encode(params, frames / np.float32(127.5) - 1)
    for name, expected in zip(("latent_mean", "latent_logvar"), posterior, strict=True):
        np.testing.assert_allclose(source[1][name], expected, atol=1e-5)
    with pytest.raises(UserError, match=r"holds clips; set data.frames"):
        open_source(f"latents:{folder}")
    assert write(s, model, params, folder)["written"] == 0


@pytest.mark.parametrize("data", [{}, {"frames": 2, "frame_step": 3}, {"clip_start": "middle"}])
def test_batches_are_those_of_the_clips(kept, data):
    _, model, params, _, _ = kept
    encode = jax.jit(model.codec.posterior)
    for step in (0, 3):
        of_clips, of_latents = (loader.batch_at(step) for loader in loaders(kept, **data))
        for name in ("index", "label", "slot"):
            np.testing.assert_array_equal(of_clips[name], of_latents[name])
        video = of_clips["video"]
        mean, logvar = encode(params, video.reshape(-1, SIZE, SIZE, 3) / np.float32(127.5) - 1)
        for name, expected in (("latent_mean", mean), ("latent_logvar", logvar)):
            assert of_latents[name].shape[:2] == video.shape[:2]
            np.testing.assert_allclose(of_latents[name], np.reshape(expected, of_latents[name].shape), atol=1e-5)


def test_a_step_learns_from_them_what_it_learns_from_the_clips(kept):
    s, model, params, folder, _ = kept
    codec = {"codec": params}
    batches = [loader.batch_at(0) for loader in loaders(kept)]
    draw = jax.jit(model.draw)
    keys = example_keys(jax.random.key(1), batches[0]["slot"])
    clean, kept_clean = (draw(codec, batch, keys)[0] for batch in batches)
    np.testing.assert_allclose(clean, kept_clean, atol=1e-4)
    assert float(np.abs(draw(codec, batches[1], keys[::-1])[0] - kept_clean).max()) > 0.01  # drawn, by the row's key
    s = replace(s, data=replace(s.data, source=f"latents:{folder}"))
    for name, (shape, dtype) in feed.batch_shapes(s, model).items():
        assert (batches[1][name].shape, batches[1][name].dtype) == (shape, dtype)
    latents.check(open_source(s.data.source, clips=True), model, s.data, lambda: params)


@pytest.mark.slow
def test_the_whole_way(kept, tmp_path):
    s, n = kept[0], len(LENGTHS)
    said = experiment.write_latents(s, str(tmp_path / "kept"))
    assert said == {"images": n, "records": n, "unreadable": 0, "shards": 1, "written": 1}
    s = replace(s, data=replace(s.data, source=f"latents:{tmp_path}/kept"), train=replace(s.train, steps=2))
    assert experiment.train(s, str(tmp_path / "run"))["finished"]
