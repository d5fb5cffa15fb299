"""A config that is not compiled for a TPU differs from the one that is compiled in its place by sizes and numbers."""

import pytest

from ddt_jax import config
from tests.tpu.test_compile import ALIKE, COMPILED, CONFIGS

# Settings that choose neither a layer nor a loss, at values that no small image makes large.
NUMBERS = {
    "data.flip",
    "data.source",
    "model.classes",
    "model.decoder_depth",
    "model.encoder_depth",
    "model.heads",
    "model.num_tokens",
    "model.quantizer.codebook_size",
    "model.quantizer.decay",
    "model.width",
    "name",
    "optimizer.decay_fraction",
    "optimizer.lr",
    "optimizer.newton_schulz_steps",
    "optimizer.warmup",
    "sequences.context",
    "sequences.images",
    "sequences.sources",
    "sequences.targets",
    "train.batch_size",
    "train.steps",
}


@pytest.mark.parametrize(("name", "compiled"), ALIKE.items())
def test_what_is_not_compiled_differs_by_numbers(name, compiled):
    assert compiled in COMPILED
    ours, theirs = (config.dump(config.load(str(CONFIGS / x))) for x in (name, compiled))
    found = set(config.difference(ours, theirs)) - NUMBERS
    assert not found, f"{name} differs from {compiled} in {found}: compile it too, by leaving it out of ALIKE"
