"""A tokenizer as a folder for PyTorch users: `model.safetensors`, `config.json` and `tokenizer.py`, which reads them.

`templates/tokenizer.py` is written for them: it is copied, never imported here, and needs only PyTorch. The weights
have PyTorch's shapes. What the networks hold without computing with it is left out; tables of positions are cut to the
patches of the image size.

Legend: D input width, H heads, R roles (of query, key, value), E head dimension.
"""

import json
import re
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddt_jax import config
from ddt_jax.errors import UserError
from ddt_jax.interop import diffusers_vae
from ddt_jax.io import atomic, safetensors_file
from ddt_jax.nn import blocks, embeddings
from ddt_jax.tokenizers.ddt import DDTTokenizer

TEMPLATE = Path(__file__).parent / "templates" / "tokenizer.py"
FORMAT = 1  # of config.json and the weights' names; the template checks it

# Ours → PyTorch, steps of a path; applied in this order.
_RULES = (
    (r"/(merge|modulate|joint|heads)/", "/"),
    (r"/block_(\d+)/", r"/\1/"),
    (r"/qk_norm/scale$", "/qk_norm"),
    (r"/(kernel|scale)$", "/weight"),
)
_READ_TWO = ("merge", "mix")  # kernels whose first two dimensions are read
_NETWORKS = ("encoder", "code_norm", "decoder")
# What the published networks hold and never compute with.
_IDLE = re.compile(
    r"/unused_|/token_query/|^encoder/last_block/image_(project|output|mlp)/|^decoder/last_block/position/"
)


def write(folder, tokenizer, params, extra, about: dict[str, Any]) -> list[str]:
    """Writes the three files.

    Args:
      folder: local or remote; made if missing.
      tokenizer: with its settings.
      params, extra: whole arrays.
      about: what else `config.json` tells of the run, plain data.

    Returns:
      names of the tensors.

    Raises:
      UserError: if there is no PyTorch counterpart of this tokenizer.
    """
    arrays = to_arrays(tokenizer, params, extra)
    model = config.dump(tokenizer.config)
    sizes = getattr(tokenizer.codec, "sizes", None)
    model["codec"] = {"kind": model["codec"]["kind"]} | ({"sizes": config.dump(sizes)} if sizes else {})
    tree = {"format": FORMAT, **about, "image_size": tokenizer.image_size, "model": model}
    safetensors_file.save(f"{folder}/model.safetensors", arrays, {"format": "pt"})
    atomic.write_text(f"{folder}/config.json", json.dumps(tree, indent=2) + "\n")
    atomic.write_text(f"{folder}/tokenizer.py", TEMPLATE.read_text(encoding="utf-8"))
    return list(arrays)


def to_arrays(tokenizer, params, extra) -> dict[str, np.ndarray]:
    """The weights by their names in PyTorch, float32. Raises UserError as `write`."""
    if not isinstance(tokenizer, DDTTokenizer):
        kind = getattr(getattr(tokenizer, "config", None), "kind", type(tokenizer).__name__)
        raise UserError(f"export: model.kind={kind!r} has no PyTorch counterpart; 'ddt' and 'selftok' have one")
    arrays = {}
    networks = {name: params[name] for name in _NETWORKS if name in params}
    for path, array in _leaves(blocks.unrolled(jax.tree.map(np.asarray, networks))):
        if not _IDLE.search(path):
            arrays[_name(path)] = _to_torch(path, array, tokenizer)
    book = extra["codebook"]
    kept = {"codebook": "codes", "feature_mean": "mean", "feature_var": "var"}
    arrays |= {theirs: book[ours] for theirs, ours in kept.items() if ours in book}
    appears = tokenizer.schedule.thresholds()
    arrays |= {} if appears is None else {"token_appears": appears}
    if "codec" in extra:
        arrays |= {f"codec.{name}": array for name, array in diffusers_vae.to_arrays(extra["codec"]).items()}
    return {_last_numbered(name, arrays): np.asarray(array, np.float32) for name, array in arrays.items()}


def _leaves(tree, path=()):
    if not isinstance(tree, dict):
        yield "/".join(path), tree
        return
    for name, value in tree.items():
        yield from _leaves(value, (*path, name))


def _name(path: str) -> str:
    for pattern, replacement in _RULES:
        path = re.sub(pattern, replacement, path)
    return path.replace("/", ".")


def _last_numbered(name: str, names) -> str:
    """`decoder.last_block.*` follows the other blocks: `decoder.blocks.3.*`."""
    network, last, rest = name.partition(".last_block.")
    if not last:
        return name
    before = {int(n.split(".")[2]) for n in names if n.startswith(f"{network}.blocks.")}
    return f"{network}.blocks.{len(before)}.{rest}"


def _to_torch(path: str, array: np.ndarray, tokenizer) -> np.ndarray:
    *_, parent, last = path.split("/")
    if parent == "heads":  # [D, H, R, E] → (R, H, E) by D
        if last == "kernel":
            return array.transpose(2, 1, 3, 0).reshape(-1, array.shape[0])
        return array.transpose(1, 0, 2).reshape(-1)
    if last == "kernel":
        read = prod(array.shape[: 2 if parent in _READ_TWO else 1])
        return array.reshape(read, -1).T
    if parent == "qk_norm":
        return array.reshape(-1, array.shape[-1])
    if last == "positions" and array.ndim == 3:
        side = tokenizer.image_size // tokenizer.codec.downsampling // tokenizer.config.patch_size
        return embeddings.centre_crop(array, side, side).reshape(side * side, -1)
    return array.reshape(-1) if last == "bias" else array
