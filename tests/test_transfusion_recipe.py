"""configs/transfusion_256.py says what arXiv 2408.11039 publishes: rates, amounts, proportions, sizes."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddt_jax import config, experiment, settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal.records import FORMATS
from ddt_jax.training import corpus
from ddt_jax.training import optimizer as optimizers

CONFIG = str(Path(__file__).parents[1] / "configs" / "transfusion_256.py")


@pytest.mark.parametrize(("variant", "steps", "tokens"), [("7b", 250_000, 0.5e12), ("large", 500_000, 2e12)])
def test_rates_and_amounts(variant, steps, tokens):
    s = config.load(f"{CONFIG}:{variant}")
    assert s.train.steps == steps
    assert s.train.batch_size * s.sequences.context * steps == pytest.approx(tokens, rel=0.08)  # M are 2^20
    rate = optimizers.learning_rate(s.optimizer, steps)
    assert float(rate(0)) == pytest.approx(3e-4 / 4000) and float(rate(3999)) == pytest.approx(3e-4)
    middle = 4000 + (steps - 4000) // 2
    assert float(rate(middle)) == pytest.approx((3e-4 + 1.5e-5) / 2, rel=1e-4)
    assert float(rate(steps)) == pytest.approx(1.5e-5, rel=1e-5)
    third = 4000 + (steps - 4000) // 3
    cosine = 1.5e-5 + (3e-4 - 1.5e-5) * (1 + math.cos(math.pi / 3)) / 2
    assert float(rate(third)) == pytest.approx(cosine, rel=1e-4)
    o = s.optimizer
    assert (o.name, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == ("adamw", 0.9, 0.95, 1e-8, 0.1, 1.0)


def test_an_error_of_the_first_prediction_does_not_grow_beyond_what_images_are():
    """At t = 1 the signal is 5e-5: x0 implied by a predicted noise that is off by 0.03 is off by 600."""
    from ddt_jax.diffusion.process import make_process

    image = config.load(f"{CONFIG}:7b").model.image
    rng = np.random.default_rng(0)
    x0, noise, error = rng.normal(size=(3, 64, 64)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), len(x0))
    for solver in ("ddpm", "ddim", "dpmpp_2m"):
        process = make_process(replace(image.diffusion, solver=solver, solver_steps=50))

        def predict(x, t, process=process):
            a, s = process.scales(t)
            return (x - a * x0) / s + jnp.where(t == 1, 0.03 * error, 0)

        drawn = process.solve(predict, noise, keys)
        assert np.isfinite(drawn).all() and 0.8 < float(np.std(drawn)) < 1.3


def test_half_of_the_tokens_are_text_and_four_of_five_captions_come_first(tmp_path):
    """The recipe's weights and formats on small data: sources in turn, formats exact, rows of both full."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{n}" for n in rng.integers(0, 90, rng.integers(20, 90))) for _ in range(400)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    s = config.load(f"{CONFIG}:160m")
    text, pairs = s.sequences.sources
    text = replace(text, source=f"parquet:{tmp_path}/a.parquet")
    pairs = replace(pairs, source="scenes:train", records=400)
    sequences = replace(s.sequences, text="", text_vocab_size=400, context=900, sources=(text, pairs), eval_sources=())
    image = replace(s.model.image, codec=settings.IdentityCodec(), patch_size=4)  # 64 patches
    s = replace(s, sequences=sequences, model=replace(s.model, image=image), seed=3)
    s = replace(s, data=settings.Data(image_size=32, cache_dir=str(tmp_path)), train=settings.Train(batch_size=10))
    s, found = corpus.resolve(s)
    batcher = corpus.open_rows(s, found, s.sequences.sources).batcher
    sources = np.array([batcher.source_of(row)[0] for row in range(200)])
    for count in range(1, 201):
        assert abs((sources[:count] == 0).sum() - count / 2) <= 0.5
    held = np.array([batcher.contents(row) for row in range(200)])  # marks, text tokens, images
    positions = held[:, 0] + held[:, 1] + held[:, 2] * (64 + 2)
    by_source = [positions[sources == n].sum() for n in (0, 1)]
    assert by_source[0] / by_source[1] == pytest.approx(1, abs=0.06)  # rows of few long pairs are less full
    assert not held[sources == 0, 2].any() and held[sources == 1, 2].all()

    numbers = np.arange(1000)
    formats = batcher._sources[1].format_of(numbers % 400, numbers)
    counts = {name: int((formats == FORMATS.index(name)).sum()) for name in FORMATS}
    assert counts == {"text_to_image": 720, "image_only": 80, "image_to_text": 200, "text_only": 0, "own": 0}
    batch, errors = batcher.make(0)
    assert not errors and set(batch["source"]) == {0, 1}
    assert (batch["image_start"][batch["source"] == 0] < 0).all()


def test_the_model_is_that_of_the_published_size():
    """What U-Nets add is in tests/multimodal/test_published_sizes.py."""
    s = config.load(f"{CONFIG}:160m")
    s = replace(s, model=replace(s.model, transformer=replace(s.model.transformer, vocab_size=32_000)))
    built = experiment.build(s, jax.devices()[:1], to_train=False)
    count = sum(x.size for x in jax.tree.leaves(built.abstract.params))
    assert count / 1e6 == pytest.approx(162.4 + 0.84, rel=1e-3)
    assert built.model.form.rows == 256
    large = config.load(f"{CONFIG}:large").model
    assert large.transformer.width == 4096 and large.image.coder == settings.UNetCoder(remat=True)
    assert s.model.image.noise_limit == 1.0 and large.image.noise_limit == 0.5


def test_unknown_sizes_are_named():
    with pytest.raises(UserError, match="has no variant '3b'; choose from 160m, 370m"):
        config.load(f"{CONFIG}:3b")
