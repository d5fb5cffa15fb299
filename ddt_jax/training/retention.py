"""Which checkpoints may go. Numbers only: `training/checkpoint.py` does the removing."""

import math

from ddt_jax import settings


def superfluous(
    steps: list[int], newest_read_back: int, train: settings.Train, metrics: dict[int, float | None]
) -> list[int]:
    """Steps whose checkpoints may be removed.

    Kept are the last `train.keep_checkpoints` up to the newest one that has been read back, every one that
    `train.keep_every` divides, the best `train.keep_best` by `train.best_metric`, and all that are newer than the one
    read back: they do not count as saved yet, so they push nothing out.

    Args:
      steps: of all checkpoints.
      metrics: value of `train.best_metric` at some of the steps; without one, or if it is not finite, a checkpoint is
        never among the best.
    """
    settled = sorted(s for s in steps if s <= newest_read_back)
    keep = set(settled[-train.keep_checkpoints :])
    if train.keep_every:
        keep |= {s for s in settled if s % train.keep_every == 0}
    if train.keep_best:
        sign = 1 if train.best_is == "lowest" else -1
        known = {s: sign * v for s in settled if (v := metrics.get(s)) is not None and math.isfinite(v)}
        keep |= set(sorted(known, key=lambda s: (known[s], -s))[: train.keep_best])  # of equals the newer
    return [s for s in settled if s not in keep]
