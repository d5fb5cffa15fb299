"""CLIP in the format of Hugging Face: a folder with `config.json`, safetensors files and `tokenizer.json`."""

import json
from dataclasses import replace

import jax
from etils import epath

from ddt_jax import config, settings
from ddt_jax.errors import UserError
from ddt_jax.interop import hf_layers, hf_vision
from ddt_jax.io import weights_folder
from ddt_jax.nn import clip
from ddt_jax.nn.params import split
from ddt_jax.training import weights

_SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "length",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "norm_epsilon",
}


def read_sizes(folder) -> clip.Sizes:
    """The sizes in the `config.json` of a folder.

    Raises:
      UserError: if there is none, or it describes something else.
    """
    path = epath.Path(folder) / hf_vision.CONFIG
    vision = replace(hf_vision.read_settings(folder), final_norm=True)  # of the class token, which alone is compared
    found = json.loads(path.read_text())
    try:
        sizes = config.typed(clip.Sizes, config.dump(_sizes(found, vision, path)), f"clip: {path}")
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"clip: {path} makes no sense: {error}; fetch it again") from error
    if min(sizes.heads, sizes.length - 2) < 1 or sizes.width % sizes.heads or sizes.image_size % vision.patch_size:
        raise UserError(
            f"clip: {path} makes no sense: heads of {sizes.heads} divide a width of {sizes.width}, patches of "
            f"{vision.patch_size} an image of {sizes.image_size}, texts have 3 ids or more; fetch it again"
        )
    return sizes


def _sizes(found: dict, vision: settings.ViT, path) -> clip.Sizes:
    """Values of any type."""
    text = found.get("text_config") or {}
    missing = [f"text_config.{name}" for name in (*_SIZES, "hidden_act") if name not in text]
    missing += [name for name in ("projection_dim",) if name not in found]
    missing += [name for name in ("image_size",) if name not in found.get("vision_config", {})]
    if found.get("model_type") != "clip" or missing or text["hidden_act"] not in hf_vision.GELU:
        raise UserError(
            f"clip: {path} describes no CLIP (model_type {found.get('model_type')!r}"
            f"{', without ' + ', '.join(missing) if missing else ''}); name a folder such as clip-vit-large-patch14"
        )
    return clip.Sizes(
        vision=vision,
        image_size=found["vision_config"]["image_size"],
        gelu=hf_vision.GELU[text["hidden_act"]],
        features=found["projection_dim"],
        **{ours: text[theirs] for theirs, ours in _SIZES.items()},
    )


def read(folder, sizes: clip.Sizes):
    """The parameters of `nn.clip.Clip`, NumPy float32.

    Args:
      folder: theirs.
      sizes: of `read_sizes`.

    Raises:
      UserError: if there is no such model, or its arrays are missing or of other sizes.
    """
    inputs = _pixels(sizes.image_size), _ids(1), jax.ShapeDtypeStruct((1,), "int32")
    table = {f"image/{ours}": row for ours, row in _image(sizes.vision).items()}
    table |= {f"text/{ours}": row for ours, row in _text(sizes).items()}
    table |= hf_layers.layer("text_projection", "text_projection", bias=False)
    return _read(folder, clip.Clip(sizes), inputs, table)


def read_target(c: settings.CLIPText | settings.CLIPImage):
    """The parameters of `nn.clip.Text` or `Image`, NumPy float32, of the folder c.weights.

    Raises:
      UserError: as `read_sizes` and `read`, or the model in the folder has other sizes.
    """
    sizes = read_sizes(c.weights)
    if isinstance(c, settings.CLIPText):
        theirs = replace(c, gelu=sizes.gelu, **{name: getattr(sizes, name) for name in _SIZES.values()})
    else:
        layout = {"scan_layers": c.vision.scan_layers, "remat": c.vision.remat}
        theirs = replace(c, vision=replace(sizes.vision, **layout), image_size=sizes.image_size, width=sizes.features)
    if differing := config.difference(config.dump(c), config.dump(theirs)):
        named = ", ".join(f"model.clip.{name}" for name in differing)
        raise UserError(f"config: {c.weights} has other sizes than are set: {named}; set them as there")
    if isinstance(c, settings.CLIPText):
        return _read(c.weights, clip.Text(c), (_ids(c.length),), _text(c))
    return _read(c.weights, clip.Image(c.vision, c.width), (_pixels(c.image_size),), _image(c.vision))


def _read(folder, module, inputs, table: hf_layers.Table):
    found = weights_folder.load(folder)
    abstract = split(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])[0]
    shapes = {name: leaf.shape for name, leaf in weights.unrolled_arrays(abstract).items()}
    return weights.restore(hf_layers.to_ours(table, shapes, found, f"clip: {folder}"), abstract)


def _pixels(side: int):
    return jax.ShapeDtypeStruct((1, side, side, 3), "float32")


def _ids(length: int):
    return jax.ShapeDtypeStruct((1, length), "int32")


def _image(vision: settings.ViT) -> hf_layers.Table:
    table = {f"vision/{ours}": row for ours, row in hf_vision.table(vision, "vision_model.").items()}
    return table | hf_layers.layer("projection", "visual_projection", bias=False)


def _text(sizes: clip.Sizes | settings.CLIPText) -> hf_layers.Table:
    names = "text_model.embeddings"
    table = {
        "embed": (f"{names}.token_embedding.weight", "plain"),
        "positions": (f"{names}.position_embedding.weight", "plain"),
    }
    return table | hf_layers.norm("norm", "text_model.final_layer_norm") | hf_vision.layers("text_model.", sizes.depth)
