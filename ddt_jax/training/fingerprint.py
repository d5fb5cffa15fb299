"""Which tokenizer made a set of codes: a digest that differs whenever an image could get other codes, or they would
stand in another order. A decoder that is trained further, or anew, for codes that stand does not change it.
"""

import hashlib
import json

import jax

from ddt_jax import config, settings
from ddt_jax.training import checkpoint


def fingerprint(s: settings.Experiment, model, params, extra, order: str) -> str:
    """SHA-256 of what makes codes.

    Args:
      model: the tokenizer, which names the parts of its state that codes come from.
      params, extra: arrays of any sharding.
      order: in which codes are written ("coarse_to_fine", "fine_to_coarse", "none").
    """
    leaves = jax.tree_util.tree_leaves_with_path({"params": params, "extra": extra})
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if model.code_parts:
        parts = tuple(f"{part}/" for part in model.code_parts)
        named = {name: leaf for name, leaf in named.items() if f"{name}/".startswith(parts)}
    names = (*config.decides_codes(s.model.kind), "model.dtype")
    decisive = {k: v for k, v in _flat(config.dump(s)) if k.startswith(names)}
    what = {"settings": decisive, "order": order, "arrays": checkpoint.digest(named)}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _flat(tree, prefix=""):
    """(dotted name, value) of all settings in a tree."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
