"""Which tokenizer made a set of codes: a digest that differs whenever codes would mean something else."""

import hashlib
import json

from ddt_jax import config, settings
from ddt_jax.training import checkpoint

_HOW_IT_RUNS = ("scan_layers", "remat")  # settings of a model that change neither codes nor images
_WHERE_IT_IS = "weights"  # of a codec: its arrays are part of the digest


def fingerprint(s: settings.Experiment, params, extra, order: str) -> str:
    """SHA-256 of a tokenizer: its arrays, codebook and codec among them, settings, image size, and the order of codes.

    Args:
      params, extra: arrays of any sharding.
      order: in which codes are written ("coarse_to_fine", "fine_to_coarse", "none").
    """
    model = {name: value for name, value in config.dump(s.model).items() if name not in _HOW_IT_RUNS}
    if isinstance(model.get("codec"), dict):
        model["codec"] = {name: value for name, value in model["codec"].items() if name != _WHERE_IT_IS}
    arrays = checkpoint.digest({"params": params, "extra": extra})
    parts = {"model": model, "image_size": s.data.image_size, "order": order, "arrays": arrays}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
