"""SD3-medium (arXiv 2403.03206) as a start for the published Selftok decoder: its image stream, not its text stream.

The filter is that of the released code: all that agrees in name and shape is taken, but for `context_embedder` and
the `context_block`s. Here the image stream has to agree whole, or nothing is taken. Two layouts are read, the single
file of the original release, whose names Selftok's files have too, and diffusers' folder `transformer`.

diffusers keeps scale before shift where a norm is followed by a linear map alone (`AdaLayerNormContinuous`: behind the
last block, and for the text of the last block); the original and we have shift before scale.
"""

import re
from collections.abc import Iterable

import numpy as np
from etils import epath

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.interop import layout, names
from ddt_jax.io import safetensors_file, weights_folder

_PREFIX = "model.diffusion_model."  # of the transformer in the original file, beside autoencoder and text encoders
_OURS = "model."  # of the decoder in Selftok's files
_UNUSED = "y_embedder."  # held by Selftok's files and never used: what agrees is taken, as in the released code
_STEM = "diffusion_pytorch_model"  # of the names of diffusers' files

# diffusers → original, a name without its last part.
_RULES = (
    (r"^pos_embed\.proj$", "x_embedder.proj"),
    (r"^pos_embed$", ""),  # pos_embed.pos_embed
    (r"^time_text_embed\.timestep_embedder\.linear_1$", "t_embedder.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2$", "t_embedder.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1$", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2$", "y_embedder.mlp.2"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1"),
    (r"^proj_out$", "final_layer.linear"),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear$", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (r"^transformer_blocks\.(\d+)\.norm1_context\.linear$", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0$", r"joint_blocks.\1.x_block.attn.proj"),
    (r"^transformer_blocks\.(\d+)\.attn\.to_add_out$", r"joint_blocks.\1.context_block.attn.proj"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj$", r"joint_blocks.\1.x_block.mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2$", r"joint_blocks.\1.x_block.mlp.fc2"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj$", r"joint_blocks.\1.context_block.mlp.fc1"),
    (r"^transformer_blocks\.(\d+)\.ff_context\.net\.2$", r"joint_blocks.\1.context_block.mlp.fc2"),
)
# Three tensors of theirs that are one of the original: pattern of the first, the other two, the original.
_PACKED = (
    (r"^transformer_blocks\.(\d+)\.attn\.to_q$", "to_{}", "qkv", r"joint_blocks.\1.x_block.attn.qkv"),
    (r"^transformer_blocks\.(\d+)\.attn\.add_q_proj$", "add_{}_proj", "qkv", r"joint_blocks.\1.context_block.attn.qkv"),
)


def read(path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The transformer in a file.

    Args:
      path: a .safetensors file in either layout, or diffusers' folder (`transformer`, or the one it is in), whose
        weights may be cut into several files; local or remote.

    Returns:
      Arrays by their original names, and the names of what else the file has.

    Raises:
      UserError: if it cannot be read or holds no such transformer.
    """
    path = epath.Path(path)
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        arrays = {name: np.asarray(x) for name, x in weights_folder.load(folder, _STEM).items()}
    else:
        arrays = safetensors_file.load(path)
    if any(name.startswith("transformer_blocks.") for name in arrays):
        return from_diffusers(arrays), []
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in arrays) else ""
    if not any(name.startswith(f"{prefix}joint_blocks.") for name in arrays):
        raise UserError(f"sd3: {path} has neither joint_blocks nor transformer_blocks; it is no SD3 transformer")
    found = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return found, [name for name in arrays if not name.startswith(prefix)]


def from_diffusers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays under their original names, packed and ordered as there. What has none keeps its name."""
    found, done = {}, set()
    for name in arrays:
        stem, _, kind = name.rpartition(".")
        for pattern, part, roles, theirs in _PACKED:
            parts = [f"{stem.rpartition('.')[0]}.{part.format(role)}.{kind}" for role in roles]
            if re.match(pattern, stem) and all(p in arrays for p in parts):
                found[f"{re.sub(pattern, theirs, stem)}.{kind}"] = np.concatenate([arrays[p] for p in parts])
                done.update(parts)
    for name, array in arrays.items():
        if name in done:
            continue
        stem, _, kind = name.rpartition(".")
        for pattern, theirs in _RULES:
            if re.match(pattern, stem):
                stem = re.sub(pattern, theirs, stem)
                break
        if stem == "final_layer.adaLN_modulation.1" or _is_short(stem, array, arrays):
            array = np.concatenate(np.split(array, 2)[::-1])
        found[f"{stem}.{kind}" if stem else kind] = array
    return found


def _is_short(stem, array, arrays) -> bool:
    """Whether it modulates the text of the last block: two parts instead of six."""
    width = arrays.get("proj_out.weight", np.zeros((0, 0))).shape[-1]
    return stem.endswith("context_block.adaLN_modulation.1") and len(array) == 2 * width


def select(
    arrays: dict[str, np.ndarray], model: settings.SelftokTokenizer, tensors: list[layout.Tensor], source: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What of a transformer starts our decoder.

    Args:
      arrays: by their original names.
      tensors: of `selftok.decoder_layout`.
      source: what an error calls the arrays.

    Returns:
      Arrays by the names of Selftok's files, for `layout.fill`; and why each other one is left out.

    Raises:
      UserError: naming all tensors of the image stream that are missing, left over, of another shape or no floats.
    """
    if isinstance(model.decoder, settings.SelftokRenderer):
        raise UserError(
            "sd3: model.decoder.kind='renderer' starts from a trained decoder, not from SD3; set it to 'mmdit'"
        )
    wanted = {tensor.key.removeprefix(_OURS): tensor for tensor in tensors}
    wanted = {name: tensor for name, tensor in wanted.items() if not _is_text(name)}
    chosen, left, problems = {}, {}, []
    for name in sorted(wanted.keys() - arrays.keys()):
        if not name.startswith(_UNUSED):
            problems.append(f"{name} is missing")
    for name, array in arrays.items():
        wrong = layout.misfit(array, wanted[name]) if name in wanted else "has no place"
        if _is_text(name):
            left[name] = "of the text stream"
        elif not wrong:
            chosen[_OURS + name] = array
        elif name.startswith(_UNUSED):
            left[name] = wrong
        else:
            problems.append(f"{name} {wrong}")
    if problems:
        raise UserError(
            f"sd3: {source} does not fit model.decoder, {len(problems)} tensors (original names): "
            f"{'; '.join(names.folded(problems))}; SD3-medium has depth 24, width 1536 and position_grid 192"
        )
    return chosen, left


def _is_text(name: str) -> bool:
    return name.startswith("context_") or "context_block" in name


def report(chosen: Iterable[str], left: dict[str, str], others: list[str], tensors: list[layout.Tensor]) -> str:
    """What was copied, what not and why, and what of our decoder is fresh: a few lines that name every tensor."""
    copied = [key.removeprefix(_OURS) for key in chosen]
    fresh = [t.key.removeprefix(_OURS) for t in tensors if t.key not in set(chosen)]
    beside: dict[str, int] = {}
    for name in others:
        beside[name.split(".")[0]] = beside.get(name.split(".")[0], 0) + 1
    skipped = names.folded(f"{name} ({reason})" for name, reason in left.items())
    skipped += [f"{count:,} of {name} (not the transformer)" for name, count in beside.items()]
    return "\n".join(
        [
            f"copied, {len(copied):,} tensors: {', '.join(names.folded(copied))}",
            f"not copied, {len(left) + len(others):,} tensors: {', '.join(skipped) or 'none'}",
            f"not from the file, {len(fresh):,} tensors: {', '.join(names.folded(fresh))}",
        ]
    )
