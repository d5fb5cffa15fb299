"""How often a classifier is right on held-out images or clips, as they are: nothing erased, mixed or smoothed.

Legend: B rows of a batch on this process, N images of all processes that have a label, K classes.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from ddt_jax import mesh as meshes
from ddt_jax import settings as settings_lib
from ddt_jax.errors import UserError
from ddt_jax.evaluation import gather, metrics, tables
from ddt_jax.tokenizers.acdit_classifier import ACDiTClassifier
from ddt_jax.tokenizers.base import example_keys


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
      results: JSON values.
    """

    results: dict[str, Any]
    picture_name: ClassVar[str] = "classes"
    pictured: ClassVar[bool] = False

    def markdown(self) -> str:
        """A table for a person."""
        return tables.classes(self.results)


@functools.lru_cache(maxsize=4)
def program(model: ACDiTClassifier) -> Callable:
    """(params, extra, batch, seed) → logarithms of probabilities, f32 [B, K]; compiled once per model."""

    def run(params, extra, batch, seed):
        keys_B = example_keys(jax.random.key(seed), batch["slot"])
        return jax.nn.log_softmax(model.logits(params, extra, batch, keys_B))

    return jax.jit(run)


def evaluate_classes(
    model: ACDiTClassifier,
    params,
    extra,
    batches: Iterable[dict],
    settings: settings_lib.Evaluate,
    *,
    mesh,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Measures a classifier. Arguments as `drawing.evaluate_drawing`.

    Returns:
      A report. accuracy, with its 95 % interval; accuracy_chance: of who always says the commonest class;
      cross_entropy: of the labels, in nats.

    Raises:
      UserError: if no image has a label that the model knows.
    """
    name = "video" if model.frames else "image"
    rows, seen = [], 0
    for batch in batches:
        on_device = meshes.put_batch({name: batch[name], "slot": np.maximum(batch["index"], 0)}, mesh)
        found = program(model)(params, extra, on_device, np.uint32(settings.seed))
        logits_BK = gather.local_rows(found, by_rows=on_device[name].sharding)
        rows.append({"valid": batch["valid"], "logits": logits_BK, "label": batch["label"]})
        seen += int(batch["valid"].sum())
        if progress is not None:
            progress(seen)
    table = gather.valid_rows(rows)
    known = (table["label"] >= 0) & (table["label"] < model.classes)
    logits_NK, label_N = table["logits"][known].astype(np.float64), table["label"][known]
    n = len(label_N)
    if not n:
        raise UserError("data: no image of data.eval_source has a label of model.classes; name images with classes")
    right = int((logits_NK.argmax(1) == label_N).sum())
    return Report(
        {
            "n": n,
            "accuracy": right / n,
            "accuracy_interval": list(metrics.binomial_interval(right, n)),
            "accuracy_chance": float(np.bincount(label_N).max() / n),
            "cross_entropy": float(-logits_NK[np.arange(n), label_N].mean()),
        }
    )
