"""Autoencoder weights in the format of diffusers: a safetensors file with `config.json` beside it, in and out.

Every array of the file has one place in the parameters of `nn/autoencoder.py` and the other way round, so a file that
was read and written again holds the same names and the same bytes. What does not fit is never skipped: all wrong names
come in one error.
"""

import json
import re
from collections.abc import Iterable

import jax
import ml_dtypes
import numpy as np
from etils import epath

from ddt_jax import config, settings
from ddt_jax.errors import UserError
from ddt_jax.io import atomic, json_object, safetensors_file
from ddt_jax.nn import autoencoder
from ddt_jax.nn.params import is_box

FILE = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))

# Ours → theirs, one step of a path each; applied in this order.
_RULES = (
    (r"^(encoder|decoder)/mid/", r"\1/mid_block/"),
    (r"/(down|up)_(\d+)/", r"/\1_blocks/\2/"),
    (r"/resnet_(\d+)/", r"/resnets/\1/"),
    (r"/attention/", r"/attentions/0/"),
    (r"/norm/", r"/group_norm/"),
    (r"/shortcut/", r"/conv_shortcut/"),
    (r"/norm_out/", r"/conv_norm_out/"),
    (r"/(down|up)sample/", r"/\1samplers/0/conv/"),
    (r"/query/", r"/to_q/"),
    (r"/key/", r"/to_k/"),
    (r"/value/", r"/to_v/"),
    (r"/out/", r"/to_out/0/"),
    (r"/(kernel|scale)$", r"/weight"),
)
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # before diffusers 0.15

# Settings of theirs that we read → ours; and those that must have one value.
_SIZES = {
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "latent_channels": "latent_channels",
    "norm_num_groups": "norm_groups",
    "use_quant_conv": "use_quant_conv",
    "scaling_factor": "scaling_factor",
    "shift_factor": "shift_factor",
}
# Where a file leaves one out, diffusers takes these.
_DEFAULTS = {
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
}
_FIXED = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}


def read(path, sizes: settings.Autoencoder) -> dict:
    """The parameters in a file.

    Args:
      path: a .safetensors file, or a folder with `diffusion_pytorch_model.safetensors`; local or remote. A
        `config.json` beside the file must agree with the sizes.
      sizes: of the autoencoder that the file is for.

    Returns:
      Nested dict of NumPy arrays in the file's own type, in the tree of `autoencoder.init`.

    Raises:
      UserError: if the file is missing or no safetensors file, or naming every array that is missing, left over or of
        another shape.
    """
    file = _file(path)
    beside = file.parent / CONFIG
    if beside.exists():
        _compare(sizes, read_sizes(file), beside)
    arrays = safetensors_file.load(file)
    strange = [f"{name} of type {x.dtype}" for name, x in arrays.items() if x.dtype not in _FLOATS]
    if strange:
        raise UserError(f"autoencoder: {file} holds arrays that are no floats: {', '.join(strange)}")
    return from_arrays(arrays, sizes, str(file))


def from_arrays(arrays: dict, sizes: settings.Autoencoder, source: str = "the arrays") -> dict:
    """As `read`, from a dict of arrays by their diffusers names. source: what an error calls them."""
    arrays, problems = _with_new_names(arrays)
    template = _template(sizes)
    wanted = {diffusers_name(ours): ours for ours in template}
    problems += [f"{name} is missing" for name in sorted(wanted.keys() - arrays.keys())]
    problems += [f"{name} has no place" for name in sorted(arrays.keys() - wanted.keys())]
    tree = {}
    for name, ours in wanted.items():
        if name not in arrays:
            continue
        shape = _transposed_shape(template[ours].shape)
        if tuple(arrays[name].shape) != shape:
            problems.append(f"{name} is {_by(arrays[name].shape)}, not {_by(shape)}")
            continue
        *parents, last = ours.split("/")
        at = tree
        for step in parents:
            at = at.setdefault(step, {})
        at[last] = _to_ours(arrays[name])
    if problems:
        raise UserError(
            f"autoencoder: {source} does not fit the sizes that are set ({len(problems)} of {len(template)} arrays): "
            + "; ".join(problems)
        )
    return tree


def write(folder, params, sizes: settings.Autoencoder, *, old_attention_names: bool = False):
    """Writes parameters as `diffusion_pytorch_model.safetensors` and `config.json`.

    Args:
      folder: local or remote.
      params: the tree of `autoencoder.init`, plain arrays. They are written in the type that they have.
      old_attention_names: with the names of files from before diffusers 0.15.

    Returns:
      The path of the weights.
    """
    folder = epath.Path(folder)
    config = {
        "_class_name": "AutoencoderKL",
        **_FIXED,
        **{theirs: _plain(getattr(sizes, ours)) for theirs, ours in _SIZES.items()},
        "use_post_quant_conv": sizes.use_quant_conv,
        "down_block_types": ["DownEncoderBlock2D"] * len(sizes.block_out_channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(sizes.block_out_channels),
    }
    arrays = to_arrays(params, old_attention_names=old_attention_names)
    path = safetensors_file.save(folder / FILE, arrays, {"format": "pt"})
    atomic.write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path


def to_arrays(params, *, old_attention_names: bool = False) -> dict[str, np.ndarray]:
    """Parameters as a dict of arrays by their diffusers names."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = diffusers_name(jax.tree_util.keystr(path, simple=True, separator="/"))
        if old_attention_names:
            name = _renamed(name, _OLD_ATTENTION)
        arrays[name] = _to_theirs(np.asarray(leaf))
    return arrays


def read_sizes(path) -> settings.Autoencoder:
    """The sizes in the `config.json` of a folder, or beside a file.

    Raises:
      UserError: if there is none, or it describes an autoencoder that `nn/autoencoder.py` cannot be.
    """
    path = _file(path).parent / CONFIG
    try:
        found = json_object.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"autoencoder: {path} cannot be read: {error}") from error
    try:
        return config.typed(settings.Autoencoder, config.dump(_sizes(found, path)), f"autoencoder: {path}")
    except (TypeError, ValueError) as error:
        raise UserError(f"autoencoder: {path} makes no sense: {error}; fetch it again") from error


def _sizes(found: dict, path) -> settings.Autoencoder:
    """Values of any type."""
    found = {"use_quant_conv": True, "use_post_quant_conv": True} | found  # theirs are on where they are left out
    fixed = _FIXED | {"use_post_quant_conv": found["use_quant_conv"]}  # we have both or none
    wrong = [f"{k}={found[k]!r} instead of {v!r}" for k, v in fixed.items() if found.get(k, v) != v]
    blocks = {*found.get("down_block_types", ()), *found.get("up_block_types", ())}
    wrong += [f"block type {b}" for b in sorted(blocks - {"DownEncoderBlock2D", "UpDecoderBlock2D"})]
    if wrong:
        raise UserError(f"autoencoder: {path} describes another kind of autoencoder: {', '.join(wrong)}")
    values = {ours: found.get(theirs, _DEFAULTS[theirs]) for theirs, ours in _SIZES.items()}
    values["block_out_channels"] = tuple(values["block_out_channels"])
    values["shift_factor"] = values["shift_factor"] or 0.0  # theirs has null for none
    return settings.Autoencoder(**values)


def diffusers_name(ours: str) -> str:
    """`encoder/down_0/resnet_1/conv1/kernel` → `encoder.down_blocks.0.resnets.1.conv1.weight`."""
    for pattern, replacement in _RULES:
        ours = re.sub(pattern, replacement, ours)
    return ours.replace("/", ".")


def _template(sizes) -> dict:
    boxed = jax.eval_shape(lambda: autoencoder.init(sizes, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda b: b.value, boxed, is_leaf=is_box))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _with_new_names(arrays: dict) -> tuple[dict, list[str]]:
    """Arrays under the present names of the attention, and a complaint about each name that is there twice."""
    renamed, problems = {}, []
    new_names = {old: new for new, old in _OLD_ATTENTION.items()}
    for name, array in arrays.items():
        new = _renamed(name, new_names)
        if new in renamed or (new != name and new in arrays):
            problems.append(f"{name} is there as {new} too")
        renamed[new] = array
    return renamed, problems


def _renamed(name: str, names: dict[str, str]) -> str:
    for before, after in names.items():
        name = re.sub(rf"(\.attentions\.\d+\.){re.escape(before)}\.", rf"\g<1>{after}.", name)
    return name


def _compare(wanted, found, path):
    wrong = [
        f"{name} is {getattr(found, name)}, not {getattr(wanted, name)}"
        for name in _SIZES.values()
        if getattr(found, name) != getattr(wanted, name)
    ]
    if wrong:
        raise UserError(f"autoencoder: {path} does not fit the sizes that are set: {'; '.join(wrong)}")


def _file(path):
    path = epath.Path(path)
    return path / FILE if path.is_dir() else path


def _to_ours(array: np.ndarray) -> np.ndarray:
    """[out, in, ...] → [..., in, out]."""
    return array.transpose(*range(2, array.ndim), 1, 0) if array.ndim > 1 else array


def _to_theirs(array: np.ndarray) -> np.ndarray:
    """The inverse."""
    return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2)) if array.ndim > 1 else array


def _transposed_shape(shape) -> tuple[int, ...]:
    return (*shape[:-3:-1], *shape[:-2]) if len(shape) > 1 else tuple(shape)


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
