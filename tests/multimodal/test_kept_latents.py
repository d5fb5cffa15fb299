"""Latents that were kept, in place of images: the same training, and never those of another codec."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import experiment, settings
from ddt_jax.data.array_record import write_array_record
from ddt_jax.errors import UserError
from ddt_jax.evaluation import asked
from ddt_jax.multimodal.model import make_multimodal
from ddt_jax.training import corpus, feed, latents

SIZE, N = 8, 24
CODEC = settings.VAECodec(
    preset="custom",
    random_weights=True,
    sample=True,
    sizes=settings.Autoencoder(block_out_channels=(4, 4), layers_per_block=1, latent_channels=2, norm_groups=2),
)
TRANSFORMER = settings.Transformer(vocab_size=0, width=16, depth=1, heads=1, kv_heads=1, mlp_width=16)
IMAGE = settings.DiffusionImages(codec=CODEC)


def run_of(tmp_path, *sources):
    """Settings of a small run on sources of pictures."""
    return settings.Experiment(
        data=settings.Data(image_size=SIZE, cache_dir=str(tmp_path / "cache"), max_bad_fraction=0.5),
        model=settings.Multimodal(transformer=TRANSFORMER, image=IMAGE),
        sequences=settings.Sequences(
            text_vocab_size=280, context=64, sources=tuple(settings.Pictures(source=source) for source in sources)
        ),
        train=settings.Train(steps=2, batch_size=8, log_every=1, tensorboard=False),
        optimizer=settings.Optimizer(name="adamw"),
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("pictures") / "images", np.random.default_rng(0)
    made = rng.integers(0, 256, (N, SIZE, SIZE, 3), np.uint8)
    write_array_record(path, [{"image": image, "caption": f"number {i}"} for i, image in enumerate(made)])
    return f"arrayrecord:{path}"


@pytest.fixture(scope="module")
def kept(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "kept"
    said = experiment.write_latents(run_of(folder.parent, images), str(folder), per_shard=20)
    assert (said["records"], said["shards"]) == (N, 2)
    return f"latents:{folder}"


@pytest.mark.slow
def test_the_loss_of_latents_is_that_of_the_images(images, kept, tmp_path):
    """Draws from the posterior included: the same keys make the same latents of it."""
    found = []
    for source in (images, kept):
        s, made = corpus.resolve(run_of(tmp_path, source))
        built = experiment.build(s, jax.devices()[:1])
        batch = corpus.open_rows(s, made, s.sequences.sources).batch_at(0)
        batch = {name: batch[name] for name in (*built.model.inputs, "slot")}
        state = built.init()
        sums, counts, _ = jax.jit(built.model.loss_fn)(state.params, state.extra, batch, jax.random.key(0))
        found.append({name: float(sums[name] / counts[name]) for name in ("next_token", "diffusion", "mse_t100")})
    assert found[0]["diffusion"] > 0.1
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.slow
def test_what_stands_for_images_is_told_before_a_run_begins(images, kept, tmp_path):
    s, found = corpus.resolve(run_of(tmp_path, kept))
    batch = corpus.open_rows(s, found, s.sequences.sources).batch_at(0)
    model = make_multimodal(s.model, SIZE)
    shape, dtype = feed.batch_shapes(s, model)["image_content"]
    assert (batch["image_content"].shape, batch["image_content"].dtype) == (shape, dtype)
    assert shape[2:] == (4, 4, 4) and found.form.shape == (SIZE, SIZE, 3)
    with pytest.raises(UserError, match="hold images in different forms; make latents of both"):
        both = run_of(tmp_path, images, kept)
        corpus.open_rows(both, corpus.resolve(both)[1], both.sequences.sources)


@pytest.mark.slow
def test_other_latents_are_refused(images, kept, tmp_path):
    s = run_of(tmp_path, kept)
    for wrong, message in (
        (replace(s, seed=1), "made with other model.codec.weights; write"),
        (replace(s, data=replace(s.data, crop="stretch")), r"other data.crop \(center, here stretch\)"),
    ):
        with pytest.raises(UserError, match=message):
            experiment.train(wrong, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
    held_out = replace(s, sequences=replace(s.sequences, eval_sources=s.sequences.sources))
    with pytest.raises(UserError, match="has no pictures to ask about; name the images"):
        asked.captioned(held_out, 1)


def test_which_images_are_kept_must_be_clear(images, tmp_path):
    assert feed.images_of(run_of(tmp_path, images)) == images
    with pytest.raises(UserError, match="has 2 sources of pictures; name one with --source"):
        feed.images_of(run_of(tmp_path, images, images))
    with pytest.raises(UserError, match="must be an autoencoder"):
        s = run_of(tmp_path, images)
        latents.identity(
            make_multimodal(
                replace(s.model, image=settings.DiffusionImages(), transformer=settings.Transformer()), SIZE
            ),
            s.data,
        )
