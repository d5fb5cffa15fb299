"""Losses of short trainings stay what they were.

A refactoring leaves them as they are. When a change is meant to move one, say in the commit why the new curve is right
(docs/testing.md, "Goldens"), and write it with

    DDT_JAX_UPDATE_GOLDENS=1 .venv/bin/python -m pytest tests/integration/test_goldens.py
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from ddt_jax import config, experiment
from ddt_jax import mesh as meshes
from ddt_jax.data.base import open_source
from ddt_jax.data.loader import Loader
from ddt_jax.training.tokenizer_step import STOP

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "losses"
STEPS = 20


@pytest.mark.smoke
@pytest.mark.parametrize("variant", ["linear", "ddt"])
def test_loss_curve_is_as_reviewed(variant):
    s = config.load(str(ROOT / "configs" / f"smoke.py:{variant}"))
    built = experiment.build(s, jax.devices()[:1])
    loader = Loader(open_source(s.data.source, image_size=s.data.image_size), s.data, batch_size=8, seed=s.seed)
    losses = []
    with jax.set_mesh(built.mesh):
        state = built.init()
        for step in range(STEPS):
            batch = loader.batch_at(step)
            rows = {"image": batch["image"], "slot": batch["slot"], STOP: np.zeros(8, np.int32)}
            state, metrics = built.step(state, meshes.put_batch(rows, built.mesh))
            losses.append(float(metrics["loss"]))
    golden = GOLDENS / f"smoke_{variant}.json"
    if os.environ.get("DDT_JAX_UPDATE_GOLDENS"):
        golden.write_text(json.dumps(losses, indent=2) + "\n")
    # Another CPU or JAX sums in another order: 1e-6 per step, amplified by the optimizer and by codes at a near tie.
    np.testing.assert_allclose(losses, json.loads(golden.read_text()), rtol=2e-3, err_msg=__doc__)
