"""Batches of skipped steps can be found again."""

import ml_dtypes
import numpy as np

from ddt_jax.training import bad_batches
from ddt_jax.training.bad_batches import BadBatches

BATCH = {"latent_mean": np.full((2, 3), np.nan, ml_dtypes.bfloat16), "slot": np.arange(2, dtype=np.int32)}


def test_a_batch_comes_back_as_it_was(tmp_path):
    text = BadBatches(tmp_path, seed=7).keep(12, BATCH)
    assert "seed 7, step 12" in text and "step_00000012.0.safetensors" in text
    back = bad_batches.kept(tmp_path, 12)
    assert {n: (x.dtype, x.tobytes()) for n, x in back.items()} == {n: (x.dtype, x.tobytes()) for n, x in BATCH.items()}
    assert bad_batches.kept(tmp_path, 13) is None


def test_a_run_of_nothing_but_bad_batches_does_not_fill_the_disk(tmp_path):
    keeper = BadBatches(tmp_path, seed=0)
    texts = [keeper.keep(step, BATCH) for step in range(1, bad_batches.MOST + 3)]
    assert len(list((tmp_path / "bad_batches").iterdir())) == bad_batches.MOST
    assert "kept" in texts[bad_batches.MOST - 1] and texts[-1] == f"its batch: seed 0, step {bad_batches.MOST + 2}"
    assert "kept" in BadBatches(tmp_path, seed=0).keep(3, BATCH)  # again, after a restart


def test_a_disk_that_is_full_does_not_end_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bad_batches.safetensors_file, "save", full)
    assert "step 4 (not kept: " in BadBatches(tmp_path, seed=0).keep(4, BATCH)
