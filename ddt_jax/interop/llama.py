"""LLaMA in the format of Hugging Face, in and out: `config.json` and safetensors files, one tensor at a time.

Every tensor of theirs is one array of our unrolled model (`training/weights.py`), in the type that it has, so what was
imported is exported with the same names and bits. Their tokenizer's files travel along.

Legend: D width, H heads, E head dimension, V vocabulary.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod

import jax
import numpy as np
from etils import epath

from ddt_jax import config, settings
from ddt_jax.errors import UserError
from ddt_jax.io import atomic, json_object, weights_folder
from ddt_jax.io.weights_folder import Lazy
from ddt_jax.multimodal import backbone
from ddt_jax.nn.decoder import head_dim
from ddt_jax.nn.params import split
from ddt_jax.training import weights

CONFIG, GENERATION = "config.json", "generation_config.json"
KIND = "llama"  # of the weights that an import writes
_COPIED = ("*token*", "*vocab*", "merges.txt", GENERATION, "chat_template*", CONFIG)
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_width",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied_head",
}
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # where a file leaves one out
_FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context",
}
# Ours → theirs in a block; a kernel [in..., out...] is their [out, in], flat.
_BLOCK = {
    "attention_norm/scale": "input_layernorm.weight",
    "query/kernel": "self_attn.q_proj.weight",
    "key/kernel": "self_attn.k_proj.weight",
    "value/kernel": "self_attn.v_proj.weight",
    "output/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "gate/kernel": "mlp.gate_proj.weight",
    "up/kernel": "mlp.up_proj.weight",
    "down/kernel": "mlp.down_proj.weight",
}
_WHOLE = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight", "norm/scale": "model.norm.weight"}


def read_settings(folder) -> settings.Transformer:
    """The settings in the `config.json` of a folder.

    Raises:
      UserError: if there is none, or it describes something that our backbone is not.
    """
    path = epath.Path(folder) / CONFIG
    if not path.parent.is_dir():
        raise UserError(f"llama: {folder} is no folder; download the model and name its folder")
    if not path.exists():
        raise UserError(f"llama: {folder} holds no {CONFIG}; name a folder in the format of Hugging Face")
    try:
        found = json_object.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"llama: {path} cannot be read: {error}") from error
    try:
        c = _settings(found, path)
        c = config.typed(settings.Transformer, config.dump(c), f"llama: {path}")
        backbone.check(c)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"llama: {path} makes no sense: {error}; fetch it again") from error
    return c


def _settings(found: dict, path) -> settings.Transformer:
    """Values of any type."""
    wrong = [f"{k}={found[k]!r} instead of {v!r}" for k, v in _FIXED.items() if found.get(k, v) != v]
    wrong += [f"no {k}" for k in _SIZES if k not in {*found, *_DEFAULTS, "num_key_value_heads", "head_dim"}]
    # Older files have the base outside, and no entry without scaling.
    rope = {"rope_theta": found.get("rope_theta", 10_000.0), **(found.get("rope_scaling") or {})}
    rope |= found.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        wrong.append(f"rotary positions of kind {kind!r}")
    if wrong:
        raise UserError(f"llama: {path} describes another model than LLaMA: {', '.join(wrong)}")
    values = {ours: found.get(theirs, _DEFAULTS.get(theirs)) for theirs, ours in _SIZES.items()}
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    values["head_dim"] = values["head_dim"] or 0
    given = {ours: rope[theirs] for theirs, ours in _SCALING.items() if theirs in rope}
    scaling = settings.RopeScaling() if kind == "default" else settings.RopeScaling(kind=kind, **given)
    return settings.Transformer(**values, rope_theta=float(rope["rope_theta"]), rope_scaling=scaling)


def read(folder, c: settings.Transformer, abstract=None):
    """Parameters in a folder of theirs.

    Args:
      c: settings, of `read_settings` but for layout and type.
      abstract: tree of ShapeDtypeStruct, see `weights.restore`; None for NumPy arrays of float32.
    """
    if abstract is None:
        abstract = split(jax.eval_shape(lambda: backbone.init(c, jax.random.key(0))))[0]
    return weights.restore(_to_ours(weights_folder.load(folder), c, str(folder)), abstract)


def import_folder(folder, out, *, vocab_size: int = 0, seed: int = 0) -> settings.Transformer:
    """Writes their model as our weights, never holding more of it than a tensor or two.

    Args:
      folder: theirs.
      out: where `weights.load` will find ours.
      vocab_size: at least theirs; new ids get rows as `extended` makes them. 0 for theirs.

    Returns:
      The settings, with the new vocabulary.
    """
    folder, out = epath.Path(folder), epath.Path(out)
    c = read_settings(folder)
    if vocab_size and vocab_size < c.vocab_size:
        raise UserError(f"llama: vocab_size={vocab_size} is smaller than the model's own, {c.vocab_size}")
    arrays = _to_ours(weights_folder.load(folder), c, str(folder))
    if vocab_size > c.vocab_size:
        for i, name in enumerate(n for n in ("embed", "head") if n in arrays):
            arrays[name] = extended(arrays[name], vocab_size, seed + i)
        c = replace(c, vocab_size=vocab_size)
    _copy_beside(folder, out / weights.BESIDE)
    weights.save(out, arrays, {"kind": KIND, "settings": asdict(c)})
    return c


def load(folder) -> tuple[dict[str, Lazy], settings.Transformer]:
    """What `import_folder` has written: arrays by unrolled path, and settings.

    Raises:
      UserError: if there is nothing, or it is another kind of model.
    """
    arrays, about = weights.load(folder)
    if about["kind"] != KIND:
        raise UserError(f"llama: {folder} holds weights of kind {about['kind']!r}, not {KIND!r}")
    return arrays, config.typed(settings.Transformer, about["settings"], f"{folder}: settings")


def export_folder(
    arrays: dict,
    c: settings.Transformer,
    out,
    *,
    beside=None,
    special: Mapping[str, int] | None = None,
    context: int = 0,
    file_bytes=weights_folder.FILE_BYTES,
):
    """Writes a folder that transformers opens.

    Args:
      arrays: by unrolled path: `load(folder)[0]` or `weights.unrolled_arrays(params)`.
      beside: folder of imported weights whose tokenizer and other settings go along; None for none.
      special: ids of BOS, EOS and PAD in what the weights have learned; None: what lies beside says them.
      context: positions of a row that they have learned from; 0: likewise.

    Raises:
      UserError: if the settings have what a LLaMA has not, or what lies beside cannot be read.
    """
    own = {"qk_norm": c.qk_norm, "attention_soft_cap": c.attention_soft_cap, "logit_soft_cap": c.logit_soft_cap}
    own["lora.rank"] = c.lora.rank
    strange = [name for name, value in own.items() if value]
    if strange:
        raise UserError(f"llama: a LLaMA has no {', '.join(strange)}; merge updates, or train without the others")
    out, source = epath.Path(out), None if beside is None else epath.Path(beside) / weights.BESIDE
    before, generation = _said(source, CONFIG), _said(source, GENERATION)
    ids = {f"{name.lower()}_token_id": special[name] for name in ("BOS", "EOS", "PAD")} if special else {}
    dtype = str(np.dtype(arrays["embed"].dtype))
    values = before | _config(c, dtype, before) | _positions(c, context, before, source)
    theirs = {}
    for ours, name, shape in _names(c):
        array = arrays[ours]
        theirs[name] = Lazy(shape, np.dtype(array.dtype), lambda a=array, n=ours, s=shape: _theirs(n, np.asarray(a), s))
    weights_folder.save(out, theirs, file_bytes=file_bytes)
    if source is not None and source.exists():
        _copy_beside(source, out)
    _write(out / CONFIG, _with_ids(values, ids))
    if (stops := _with_ids(generation, ids)) != generation:
        _write(out / GENERATION, stops)


def extended(table: Lazy, vocab_size: int, seed: int, rows: int = 4096) -> Lazy:
    """A table of embeddings with new rows behind its own, drawn from the normal distribution that fits those.

    So a new id looks like any other to the model, and takes from the others' probability no more than they would.
    """
    v, d = table.shape

    def make():
        own = np.asarray(table)
        mean, square = np.zeros(d), np.zeros((d, d))
        for i in range(0, v, rows):
            part = own[i : i + rows].astype(np.float32)
            mean += part.sum(0, dtype=np.float64) / v
            square += (part.T @ part).astype(np.float64) / v
        covariance = square - np.outer(mean, mean)
        covariance[np.diag_indices(d)] += 1e-6 * np.trace(covariance) / d + 1e-20  # fewer rows than columns
        factor = np.linalg.cholesky(covariance).astype(np.float32)
        out = np.empty((vocab_size, d), own.dtype)
        out[:v] = own
        rng = np.random.default_rng(seed)
        for i in range(v, vocab_size, rows):
            n = min(rows, vocab_size - i)
            out[i : i + n] = mean.astype(np.float32) + rng.standard_normal((n, d), np.float32) @ factor.T
        return out

    return Lazy((vocab_size, d), table.dtype, make)


def _names(c: settings.Transformer):
    """(our unrolled path, their name, their shape) of every tensor, in their order."""
    d, f = c.width, c.mlp_width
    wide, narrow = c.heads * head_dim(c), c.kv_heads * head_dim(c)
    shapes = {"query": (wide, d), "key": (narrow, d), "value": (narrow, d), "output": (d, wide)}
    shapes |= {"gate": (f, d), "up": (f, d), "down": (d, f)}
    yield "embed", _WHOLE["embed"], (c.vocab_size, d)
    for i in range(c.depth):
        for ours, theirs in _BLOCK.items():
            shape = shapes.get(ours.split("/")[0], (d,))
            yield f"blocks/block_{i}/{ours}", f"model.layers.{i}.{theirs}", shape
    yield "norm/scale", _WHOLE["norm/scale"], (d,)
    if not c.tied_head:
        yield "head", _WHOLE["head"], (c.vocab_size, d)


def _to_ours(found: dict[str, Lazy], c, source) -> dict[str, Lazy]:
    wanted = {theirs: (ours, shape) for ours, theirs, shape in _names(c)}
    if c.tied_head:
        found = {name: x for name, x in found.items() if name != _WHOLE["head"]}  # some files hold the table twice
    # Old files hold the frequencies of rotary positions, which follow from the settings.
    found = {name: x for name, x in found.items() if not name.endswith("rotary_emb.inv_freq")}
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} has no place" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {found[name].shape}, not {shape}"
        for name, (_, shape) in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:4])
        raise UserError(f"llama: {source} does not fit its {CONFIG}, {len(problems)} tensors: {shown}")
    arrays = {}
    for theirs, (ours, _) in wanted.items():
        lazy, shape = found[theirs], _our_shape(ours, c)
        make = lambda lazy=lazy, ours=ours, shape=shape: _ours(ours, np.asarray(lazy), shape)  # noqa: E731
        arrays[ours] = Lazy(shape, lazy.dtype, make)
    return arrays


def _our_shape(ours, c):
    e = head_dim(c)
    heads = {"query": c.heads, "key": c.kv_heads, "value": c.kv_heads}
    kind = ours.split("/")[-2] if "/" in ours else ours
    if kind in heads:
        return (c.width, heads[kind], e)
    flat = {"gate": (c.width, c.mlp_width), "up": (c.width, c.mlp_width), "down": (c.mlp_width, c.width)}
    flat |= {"output": (c.heads, e, c.width), "embed": (c.vocab_size, c.width), "head": (c.vocab_size, c.width)}
    return flat.get(kind, (c.width,))


def _ours(ours, array, shape):
    return array.T.reshape(shape) if ours.endswith("/kernel") else array


def _theirs(ours, array, shape):
    return array.reshape(prod(shape) // shape[0], shape[0]).T if ours.endswith("/kernel") else array


def _config(c, dtype, before) -> dict:
    """Their config of our settings. before: that of the model which was imported."""
    values = {theirs: getattr(c, ours) for theirs, ours in _SIZES.items()} | {"head_dim": head_dim(c)}
    rope = _rope(c)
    both = {"rope_parameters": rope | {"rope_theta": c.rope_theta}}
    both |= {"rope_theta": c.rope_theta, "rope_scaling": None if rope["rope_type"] == "default" else rope}
    # New releases read the first, old ones the other two; what was imported keeps its own form.
    form = {k: v for k, v in both.items() if not before or k in before} or both
    names = {"dtype": dtype, "torch_dtype": dtype}
    types = {k: v for k, v in names.items() if k in before} or names
    return {"architectures": ["LlamaForCausalLM"], **_FIXED, **values, **form, **types}


def _rope(c) -> dict:
    kind = {"none": "default"}.get(c.rope_scaling.kind, c.rope_scaling.kind)
    used = {"default": (), "linear": ("factor",), "llama3": tuple(_SCALING)}[kind]
    return {theirs: getattr(c.rope_scaling, _SCALING[theirs]) for theirs in used} | {"rope_type": kind}


def _positions(c, context, before, source) -> dict:
    """How long a row may be: as in training, or as imported where that is more and positions turn as they did."""
    if not context:
        return {}
    told = before.get("max_position_embeddings")
    if isinstance(told, int) and told > context:
        imported = _settings(before, source / CONFIG)
        if (imported.rope_theta, _rope(imported)) == (c.rope_theta, _rope(c)):
            context = told
    return {"max_position_embeddings": context}


def _with_ids(said: dict, ids: dict) -> dict:
    """Settings that name these ids. A list that holds one of them stays: text may end in more ways than one."""
    kept = {name for name, i in ids.items() if isinstance(said.get(name), list) and i in said[name]}
    return said | {name: i for name, i in ids.items() if name not in kept}


def _said(source, name) -> dict:
    """What a file beside imported weights says, {} if there is none."""
    path = None if source is None else source / name
    if path is None or not path.exists():
        return {}
    try:
        return json_object.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"llama: {path} cannot be read: {error}; put it back from the model's own folder") from error


def _write(path, values: dict) -> None:
    atomic.write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _copy_beside(source, target):
    target.mkdir(parents=True, exist_ok=True)
    for path in {path for pattern in _COPIED for path in source.glob(pattern)}:
        if path.is_file() and not path.name.endswith(".safetensors"):
            path.copy(target / path.name, overwrite=True)
