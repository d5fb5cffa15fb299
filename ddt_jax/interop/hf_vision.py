"""Vision transformers in the format of Hugging Face: CLIP, SigLIP and that of BLIP-2 (EVA-CLIP-g).

A folder has `config.json` and safetensors files, of the vision model alone or of a larger one that holds it.
"""

import jax
from etils import epath

from ddt_jax import config, settings
from ddt_jax.errors import UserError
from ddt_jax.interop import hf_layers
from ddt_jax.io import json_object, weights_folder
from ddt_jax.io.weights_folder import Lazy
from ddt_jax.nn.params import split
from ddt_jax.nn.vit import ViT
from ddt_jax.training import weights

CONFIG = "config.json"
_PREFIXES = ("vision_model.", "model.vision_model.", "vision_tower.", "")
_FAMILIES = {"clip": "clip", "siglip": "siglip", "siglip2": "siglip", "blip-2": "eva"}
GELU = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "quick_gelu": "quick"}
_SIZES = {
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "norm_epsilon",
}


def read_settings(folder) -> settings.ViT:
    """The settings in the `config.json` of a folder.

    Raises:
      UserError: if there is none, or it describes something else.
    """
    path = epath.Path(folder) / CONFIG
    try:
        found = json_object.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"vision: {path} cannot be read: {error}") from error
    try:
        return config.typed(settings.ViT, config.dump(_settings(found, path)), f"vision: {path}")
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"vision: {path} makes no sense: {error}; fetch it again") from error


def _settings(found: dict, path) -> settings.ViT:
    """Values of any type."""
    kind = str(found.get("model_type", "")).removesuffix("_vision_model").replace("blip_2", "blip-2")
    found = found.get("vision_config") or found
    missing = [k for k in (*_SIZES, "hidden_act") if k not in found]
    if kind not in _FAMILIES or missing or found["hidden_act"] not in GELU:
        raise UserError(
            f"vision: {path} describes no vision transformer of CLIP, SigLIP or BLIP-2 (model_type {kind!r}"
            f"{', without ' + ', '.join(missing) if missing else ''})"
        )
    family = settings.vit("B", _FAMILIES[kind], found["patch_size"])
    values = {ours: found[theirs] for theirs, ours in _SIZES.items()} | {"gelu": GELU[found["hidden_act"]]}
    if kind == "blip-2" and not found.get("qkv_bias", True):
        values["qkv_bias"] = "none"
    return settings.ViT(**{**vars(family), **values})


def read(folder, c: settings.ViT, image_size: int):
    """The parameters of `nn.vit.ViT`, NumPy float32.

    Args:
      folder: theirs.
      c: settings, of `read_settings` but for layout.
      image_size: which their table of positions must be for.

    Raises:
      UserError: if there is no such model, or its arrays are missing or of other sizes.
    """
    found = weights_folder.load(folder)
    return from_arrays(found, c, image_size, f"vision: {folder}")


def from_arrays(found: dict[str, Lazy], c: settings.ViT, image_size: int, source: str = "vision"):
    """As `read`, from arrays by their names."""
    prefix = next((p for p in _PREFIXES if f"{p}embeddings.patch_embedding.weight" in found), None)
    if prefix is None:
        raise UserError(f"{source}: holds no vision transformer (embeddings.patch_embedding.weight)")
    abstract = abstract_params(c, image_size)
    fused = any(".self_attn.qkv." in name for name in found)
    shapes = {name: leaf.shape for name, leaf in weights.unrolled_arrays(abstract).items()}
    arrays = hf_layers.to_ours(table(c, prefix, fused), shapes, found, source)
    return weights.restore(arrays, abstract)


def abstract_params(c: settings.ViT, image_size: int):
    """The tree of `nn.vit.ViT` as ShapeDtypeStructs."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), "float32")
    return split(jax.eval_shape(ViT(c).init, jax.random.key(0), images)["params"])[0]


def table(c: settings.ViT, prefix: str, fused: bool = False) -> hf_layers.Table:
    """Where the arrays of a model lie. fused: queries, keys and values in one array (BLIP-2)."""
    found = hf_layers.layer("embed", f"{prefix}embeddings.patch_embedding", "patches", c.patch_bias)
    found["class_token"] = (f"{prefix}embeddings.class_embedding", "plain")
    positions = "embeddings.position_embedding" + ("" if fused else ".weight")
    found["positions"] = (f"{prefix}{positions}", "plain")
    found |= hf_layers.norm("pre_norm", f"{prefix}pre_layrnorm") | hf_layers.norm("norm", f"{prefix}post_layernorm")
    return found | layers(prefix, c.depth, fused)


def layers(prefix: str, depth: int, fused: bool = False) -> hf_layers.Table:
    """Where the arrays of `nn.vit.Block`s lie, in transformers of pictures and of text."""
    found: hf_layers.Table = {}
    for i in range(depth):
        ours, theirs = f"blocks/block_{i}", f"{prefix}encoder.layers.{i}"
        for part in ("query", "key", "value"):
            their_part = ("self_attn.qkv", part) if fused else (f"self_attn.{part[0]}_proj", "heads")
            found |= hf_layers.layer(f"{ours}/attention/{part}", f"{theirs}.{their_part[0]}", their_part[1])
        merged = "self_attn.projection" if fused else "self_attn.out_proj"
        found |= hf_layers.layer(f"{ours}/attention/output", f"{theirs}.{merged}")
        found |= hf_layers.norm(f"{ours}/attention_norm", f"{theirs}.layer_norm1")
        found |= hf_layers.norm(f"{ours}/mlp_norm", f"{theirs}.layer_norm2")
        found |= hf_layers.layer(f"{ours}/mlp/up", f"{theirs}.mlp.fc1")
        found |= hf_layers.layer(f"{ours}/mlp/down", f"{theirs}.mlp.fc2")
    return found
