"""Both stages as a user runs them: codes stay what they are while the renderer learns."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ddt_jax import config, experiment, judging
from ddt_jax.tokenizers.base import to_float

SMOKE = str(Path(__file__).parents[2] / "configs" / "smoke.py")
FIRST = (("train.steps", "6"), ("train.checkpoint_every", "3"), ("train.log_every", "3"))
SECOND = (
    ("model.decoder.kind", "renderer"),
    ("model.stage", "decoder"),
    ("model.image_loss.lpips_weight_late", "0"),
    ("model.image_loss.late_from", "2"),  # the discriminator joins within the test
    ("model.image_loss.discriminator.width", "4"),
    ("model.image_loss.discriminator.norm_groups", "4"),
)


def trained(workdir, overrides):
    """The run's model, its newest state, and the codes of some images by the weights that are evaluated."""
    assert experiment.train(config.load(SMOKE, overrides), str(workdir))["finished"]
    built, state = experiment.restore(str(workdir), whole=True)
    image = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    with jax.set_mesh(built.mesh):
        codes = built.model.encode(experiment.weights(state), state.extra, to_float(jax.numpy.asarray(image)))
    return state, np.asarray(codes)


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.slow
def test_codes_are_those_of_the_first_stage_bit_for_bit_and_the_decoder_moves(tmp_path, capsys):
    first, codes = trained(tmp_path / "first", FIRST)
    init = ("init_from", str(tmp_path / "first"))
    second, again = trained(tmp_path / "second", (*FIRST, *SECOND, init))
    assert len(np.unique(codes)) > 4
    np.testing.assert_array_equal(again, codes)
    for mine in (second.params, second.ema):
        jax.tree.map(np.testing.assert_array_equal, mine["encoder"], first.ema["encoder"])
    jax.tree.map(np.testing.assert_array_equal, second.extra["codebook"], first.extra["codebook"])
    moved = second.params["decoder"]["final"]["kernel"] - first.ema["decoder"]["final"]["kernel"]
    assert np.abs(moved).max() > 1e-4
    held = names(second.opt_state)
    assert not [name for name in held if "/encoder/" in name]
    assert [name for name in held if "/decoder/" in name] and [name for name in held if "/discriminator/" in name]
    said = capsys.readouterr().err
    assert "at step 6, its average" in said and "left behind: params/decoder/embed/bias" in said
    results = judging.evaluate(str(tmp_path / "second"))["results"]
    assert results["n"] == 64 and "commitment_distance" not in results
