"""From a config file to typed settings, or to one line that says what is wrong with it.

A config file is Python with `get_config(variant="...")` that returns an `ml_collections.ConfigDict`, usually
`config.defaults()` with some values changed. Values given on the command line are laid over it. The result must fit the
dataclasses of `settings/` exactly. A config stored with a run is JSON: it is data and is never executed.
"""

import ast
import copy
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import types
import typing
from pathlib import Path

from ddt_jax import settings
from ddt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Raw:
    """Text from the command line; read as whatever type its setting has."""

    text: str


def defaults(cls=settings.Experiment, **values):
    """The default settings of a class as a ConfigDict, to be changed and returned by a config file."""
    from ml_collections import ConfigDict

    tree = dump(cls(**values))
    return ConfigDict(tree, type_safe=False, convert_dict=True)


def dump(value):
    """Settings as plain dicts, lists and scalars (JSON)."""
    if dataclasses.is_dataclass(value):
        return {f.name: dump(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [dump(v) for v in value]
    return value


def to_json(experiment: settings.Experiment) -> str:
    return json.dumps(dump(experiment), indent=2) + "\n"


def from_dict(tree: dict) -> settings.Experiment:
    """Typed settings from plain dicts.

    Raises:
      UserError: for a key that is no setting, a value of the wrong type, or values that cannot go together.
    """
    experiment = _parse(settings.Experiment, tree, "")
    _check(experiment)
    return experiment


def typed(cls, tree: dict, name: str):
    """Settings of one class from plain dicts. name: what a message calls them; raises as `from_dict`."""
    return _parse(cls, tree, name)


def load(path: str, overrides: tuple[tuple[str, str], ...] = ()) -> settings.Experiment:
    """Reads `FILE.py` or `FILE.py:VARIANT`, or a run's config.json, lays `(dotted key, text)` overrides over it, and
    types the result.

    Raises:
      UserError: if the file is missing or fails, or as `from_dict`.
    """
    file, _, variant = path.partition(":")
    if not Path(file).is_file():
        known = sorted(str(p) for p in Path("configs").glob("*.py"))
        raise UserError(f"config: {file} does not exist{_nearest(file, known)}")
    try:
        if file.endswith(".json") and not variant:
            tree = json.loads(Path(file).read_text())
        else:
            module = _run(file)
            if variant and not inspect.signature(module.get_config).parameters:
                raise UserError(f"config: {file} has no variants; leave out :{variant}")
            tree = module.get_config(variant) if variant else module.get_config()
            tree = tree.to_dict()
    except UserError:
        raise
    except Exception as error:  # whatever the user's file did
        raise UserError(f"config: {path} failed with {type(error).__name__}: {error}".replace("\n", " ")) from error
    experiment = from_dict(override(tree, overrides))
    _check_sense(experiment)
    return experiment


def sibling(file: str, name: str):
    """The module of the config file NAME.py beside another one, for a config that says only what it changes.

    Args:
      file: `__file__` of the other one.
    """
    return _run(str(Path(file).with_name(f"{name}.py")))


def _run(file: str):
    """A config file as a module."""
    spec = importlib.util.spec_from_file_location("ddt_jax_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Settings that a run may change when it goes on: they decide neither what is learned nor from which examples.
_FREE = (
    "mesh.",
    "evaluate.",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "data.cache_dir",
    "data.eval_source",
    "data.max_bad_fraction",
    "data.retry_seconds",
    "sequences.eval_sources",
    "sequences.tokenizer",
)
_FREE += tuple(f"train.{k}" for k in ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "keep_every"))
_FREE += tuple(f"train.{k}" for k in ("tensorboard", "wandb", "max_bad_steps", "keep_best", "best_metric", "best_is"))
_FREE += tuple(f"train.{k}" for k in ("maintenance", "silence_limit", "profile_at", "profile_steps"))
_FREE += ("train.recheck_every", "train.accumulate")  # losses that micro-batches would change are refused when built
_FREE += ("optimizer.offload",)

# Settings that decide, with the weights, which codes an image gets, or where these weights lie in the state.
_CODES = ("data.image_size", "model.encoder")
_CODES += tuple(f"model.{k}" for k in ("kind", "num_tokens", "patch_size", "width", "heads", "mlp_ratio", "mix"))
_CODES += tuple(f"model.{k}" for k in ("qk_norm", "scan_layers", "causal", "vision.", "qformer."))
_CODEBOOK = tuple(f"model.quantizer.{k}" for k in ("code_dim", "codebook_size", "normalize_input"))
_LATENTS = tuple(f"model.codec.{k}" for k in ("kind", "preset", "sizes", "dtype"))


def decides_codes(kind: str, codebook: bool = True) -> tuple[str, ...]:
    """Beginnings of the names of settings that decide, with the weights, which codes an image gets, or where these
    weights lie in the state.

    Args:
      kind: of the model.
      codebook: whether those of the codebook are among them.
    """
    # SEED reads codes off pixels; its codec is of what its decoder draws.
    return (*_CODES, *(() if kind == "seed" else _LATENTS), *(_CODEBOOK if codebook else ()))


def difference(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Dotted names of the settings that differ, leaving out those that a run may change when it goes on."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        name, a, b = f"{prefix}{key}", before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += difference(a, b, f"{name}.")
        elif a != b and not name.startswith(_FREE):
            found.append(name)
    return found


def override(tree: dict, overrides: tuple[tuple[str, str], ...]) -> dict:
    """`tree` with `(dotted key, text)` laid over it; the text is read as the setting's type when the tree is typed.

    Raises:
      UserError: for a key that is no setting, naming the nearest one.
    """
    tree = copy.deepcopy(tree)
    # Kinds first, and of them the outermost: each brings the defaults of its group.
    kinds = [o for o in overrides if o[0].rpartition(".")[2] == "kind"]
    for key, text in (*sorted(kinds, key=lambda o: o[0].count(".")), *(o for o in overrides if o not in kinds)):
        _override(tree, key, text)
    return tree


def _override(tree, dotted, text):
    *parents, last = dotted.split(".")
    at = tree
    for i, key in enumerate(parents):
        if not isinstance(at, dict) or key not in at:
            raise _unknown(".".join(parents[: i + 1]), at, ".".join(parents[:i]))
        at = at[key]
    if not isinstance(at, dict) or last not in at:
        raise _unknown(dotted, at, ".".join(parents))
    if isinstance(at[last], dict):
        raise UserError(f"config: {dotted} is a group; set one of {', '.join(f'{dotted}.{k}' for k in at[last])}")
    if last == "kind" and (other := _of_other_kind(tree, parents, text)):
        at.clear()  # of settings with the same name, too, another kind has its own defaults
        at.update(other)
    else:
        at[last] = _Raw(text)


def _of_other_kind(tree, parents, kind):
    """The defaults of the kind that a group of settings is to become, where it is of another one; else None."""
    cls, at = settings.Experiment, tree
    for i, key in enumerate(parents):
        if not dataclasses.is_dataclass(cls) or not isinstance(at, dict):
            return None
        cls, at = typing.get_type_hints(cls).get(key), at.get(key)
        if typing.get_origin(cls) in (types.UnionType, typing.Union) and isinstance(at, dict):
            by_kind, now = _by_kind(typing.get_args(cls)), at.get("kind")
            now = now.text if isinstance(now, _Raw) else now
            if i + 1 == len(parents):
                return dump(by_kind[kind]()) if kind in by_kind and kind != now else None
            cls = by_kind.get(now)
    return None


def _nearest(word, known):
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else f"; known: {', '.join(known)}" if known else ""


def _unknown(dotted, group, prefix):
    keys = list(group) if isinstance(group, dict) else []
    known = [f"{prefix}.{k}" if prefix else k for k in keys]
    return UserError(f"config: {dotted} is not a setting{_nearest(dotted, known)}")


def _parse(kind, value, path):
    """`value` as a `kind` (a dataclass, a union of them, or a simple type)."""
    name = path or "the config"
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return _parse_union(typing.get_args(kind), value, path)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"config: {name} must be a group of settings, got {value!r}")
        types_by_name = typing.get_type_hints(kind)
        for key in value:
            if key not in types_by_name:
                raise _unknown(f"{path}.{key}".lstrip("."), dict.fromkeys(types_by_name), path)
        return kind(**{k: _parse(types_by_name[k], v, f"{path}.{k}".lstrip(".")) for k, v in value.items()})
    if isinstance(value, _Raw):
        value = _read(kind, value.text)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        if isinstance(value, bool) and "full" in choices:  # `remat` of runs from when it was yes or no
            value = "full" if value else "none"
        if value not in choices:
            raise UserError(f"config: {path}={value!r} is not one of {', '.join(map(repr, choices))}")
        return value
    if origin is tuple:
        items = typing.get_args(kind)
        if not isinstance(value, list | tuple):
            raise UserError(f"config: {path} must be a list, got {value!r}")
        if items[-1] is not Ellipsis and len(items) != len(value):
            raise UserError(f"config: {path} needs {len(items)} values, got {len(value)}")
        of = [items[0]] * len(value) if items[-1] is Ellipsis else items
        return tuple(_parse(t, v, f"{path}[{i}]") for i, (t, v) in enumerate(zip(of, value, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1023 else math.inf
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        raise UserError(f"config: {path} must be {_TYPE_NAMES[kind]}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"config: {path} must be finite, got {value!r}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def _by_kind(kinds):
    return {k.__dataclass_fields__["kind"].default: k for k in kinds}


def _parse_union(kinds, value, path):
    if not isinstance(value, dict) or "kind" not in value:
        raise UserError(f"config: {path} must be a group of settings with a kind, got {value!r}")
    by_kind = _by_kind(kinds)
    chosen = value["kind"].text if isinstance(value["kind"], _Raw) else value["kind"]
    if not isinstance(chosen, str) or chosen not in by_kind:
        raise UserError(f"config: {path}.kind={chosen!r} is not one of {', '.join(map(repr, by_kind))}")
    return _parse(by_kind[chosen], value, path)


def _read(kind, text):
    """Text from the command line as a Python value; text that is no literal stays text and fails the type check."""
    if kind is str or (typing.get_origin(kind) is typing.Literal and text in typing.get_args(kind)):
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # as its documentation warns
        return text


def _check(e: settings.Experiment):
    """Combinations that cannot work, each found before anything is built."""

    def need(ok, message):
        if not ok:
            raise UserError(f"config: {message}")

    t, m, d, o = e.train, e.model, e.data, e.optimizer
    quantizer = getattr(m, "quantizer", settings.Quantizer())
    for key, value in {
        "train.steps": t.steps,
        "train.batch_size": t.batch_size,
        "train.accumulate": t.accumulate,
        "train.log_every": t.log_every,
        "train.max_bad_steps": t.max_bad_steps,
        "train.keep_checkpoints": t.keep_checkpoints,
        "optimizer.guard_window": o.guard_window,
        "data.image_size": d.image_size,
        "data.prefetch": d.prefetch,
        "data.threads": d.threads,
        "data.frame_step": d.frame_step,
        "model.num_tokens": getattr(m, "num_tokens", 1),
        "model.patch_size": getattr(m, "patch_size", 1),
        "model.heads": getattr(m, "heads", 1),
        "model.quantizer.codebook_size": quantizer.codebook_size,
        "model.quantizer.code_dim": quantizer.code_dim,
        "evaluate.images": e.evaluate.images,
        "evaluate.batch_size": e.evaluate.batch_size,
        "evaluate.prompts": e.evaluate.prompts,
        "sequences.context": e.sequences.context,
        "sequences.vocab_multiple": e.sequences.vocab_multiple,
    }.items():
        need(value >= 1, f"{key} must be at least 1, got {value}")
    for key, value in {
        "train.checkpoint_every": t.checkpoint_every,
        "train.eval_every": t.eval_every,
        "train.keep_every": t.keep_every,
        "train.keep_best": t.keep_best,
        "train.recheck_every": t.recheck_every,
        "optimizer.spike_skip": o.spike_skip,
        "optimizer.clip_update": o.clip_update,
        "seed": e.seed,
        "evaluate.pictures": e.evaluate.pictures,
        "evaluate.probe_images": e.evaluate.probe_images,
        "evaluate.counterfactuals": e.evaluate.counterfactuals,
        "data.frames": d.frames,
        "data.retry_seconds": d.retry_seconds,
    }.items():
        need(value >= 0, f"{key} must not be negative, got {value}")
    for key, s in {"text_to_image": e.evaluate.text_to_image, "image_to_text": e.evaluate.image_to_text}.items():
        fits = s.tokens >= 0 and s.temperature >= 0 and s.top_k >= 0 and 0 < s.top_p <= 1 and 0 <= s.min_p <= 1
        need(fits, f"evaluate.{key} needs tokens, temperature and top_k of 0 or more, top_p in (0, 1], min_p in [0, 1]")
    need(
        t.batch_size % t.accumulate == 0,
        f"train.batch_size={t.batch_size} does not divide into train.accumulate={t.accumulate} parts",
    )
    need(o.lr > 0, f"optimizer.lr must be above 0, got {o.lr}")
    need(0 <= t.ema < 1, f"train.ema must lie in [0, 1), got {t.ema}")
    need(0 <= d.max_bad_fraction <= 1, f"data.max_bad_fraction must lie in [0, 1], got {d.max_bad_fraction}")
    need(
        not d.eval_source.startswith("latents:"),
        f"data.eval_source={d.eval_source} holds no images to compare with; name the images it was made of",
    )
    need(
        not (isinstance(m, settings.SEED) and "karpathy:" in d.eval_source and "each=caption" in d.eval_source),
        f"data.eval_source={d.eval_source} has a record of each caption, images are retrieved; leave out each=caption",
    )
    need(
        all(0 < v <= 1 for v in e.evaluate.visible),
        f"evaluate.visible holds shares in (0, 1], got {e.evaluate.visible}",
    )
    need(
        bool(e.evaluate.lpips_backbone_file) == bool(e.evaluate.lpips_heads_file),
        "evaluate.lpips_backbone_file and evaluate.lpips_heads_file go together; set both or neither",
    )
    if isinstance(m, settings.DDTTokenizer | settings.SelftokTokenizer):
        need(
            d.image_size % m.patch_size == 0,
            f"data.image_size={d.image_size} is not a multiple of model.patch_size={m.patch_size}",
        )
    need(
        not (e.evaluate.classifier and e.evaluate.verifier),
        "evaluate.verifier=True judges scenes and evaluate.classifier other pictures; leave one of them out",
    )
    need(
        not (isinstance(m, settings.VAE) and e.evaluate.verifier),
        "evaluate.verifier=True judges tokenizers, model.kind='vae' is none; set evaluate.verifier=False",
    )
    if isinstance(m, settings.DDTTokenizer):
        need(m.width % m.heads == 0, f"model.width={m.width} is not a multiple of model.heads={m.heads}")


def _check_sense(e: settings.Experiment):
    """Values that do nothing, or harm. Of a new config alone: a run that was trained with them can be read."""

    def need(ok, message):
        if not ok:
            raise UserError(f"config: {message}")

    t, m, o, quantizer = e.train, e.model, e.optimizer, getattr(e.model, "quantizer", settings.Quantizer())
    need(o.newton_schulz_steps >= 1, f"optimizer.newton_schulz_steps must be at least 1, got {o.newton_schulz_steps}")
    for key, value in {
        "train.silence_limit": t.silence_limit,
        "optimizer.warmup": o.warmup,
        "optimizer.weight_decay": o.weight_decay,
        "optimizer.clip_norm": o.clip_norm,
        "optimizer.discriminator.clip_norm": o.discriminator.clip_norm,
    }.items():
        need(value >= 0, f"{key} must not be negative, got {value}")
    for part in o.parts:
        need(part.times >= 0, f"optimizer.parts: times={part.times} of {part.part!r} must not be negative")
    for key, value in {"optimizer.eps": o.eps, "optimizer.discriminator.lr": o.discriminator.lr}.items():
        need(value > 0, f"{key} must be above 0, got {value}")
    for key, value in {
        "optimizer.b1": o.b1,
        "optimizer.b2": o.b2,
        "optimizer.momentum": o.momentum,
        "optimizer.discriminator.b1": o.discriminator.b1,
        "optimizer.discriminator.b2": o.discriminator.b2,
        "model.quantizer.decay": quantizer.decay,
    }.items():
        need(0 <= value < 1, f"{key} must lie in [0, 1), got {value}")
    for key in ("decay_fraction", "final_lr_fraction"):
        need(0 <= getattr(o, key) <= 1, f"optimizer.{key} must lie in [0, 1], got {getattr(o, key)}")
    if isinstance(flow := getattr(m, "flow", None), settings.Flow):
        need(flow.solver_steps >= 1, f"model.flow.solver_steps must be at least 1, got {flow.solver_steps}")
        for key in ("shift", "logit_std"):
            need(getattr(flow, key) > 0, f"model.flow.{key} must be above 0, got {getattr(flow, key)}")
        drop = flow.condition_drop
        need(0 <= drop <= 1, f"model.flow.condition_drop must lie in [0, 1], got {drop}")
        acts = m.decoder.kind != "renderer" and m.stage == "joint" and flow.time != "logit_normal"
        need(
            acts or not m.token_gradient_weights,
            "model.token_gradient_weights=True is for a flow decoder that learns with its codes at times that are "
            "uniform; set it to False",
        )
    if isinstance(prefixes := getattr(getattr(m, "decoder", None), "random_prefixes", None), float):
        need(0 <= prefixes <= 1, f"model.decoder.random_prefixes must lie in [0, 1], got {prefixes}")
    need(quantizer.commitment >= 0, f"model.quantizer.commitment must not be negative, got {quantizer.commitment}")
    variance = quantizer.init_variance
    need(0 < variance < 1, f"model.quantizer.init_variance must lie in (0, 1), got {variance}")
    need(
        not (isinstance(m, settings.SEED) and quantizer.diversity),
        f"model.quantizer.diversity={quantizer.diversity} is no part of SEED's loss; set it to 0",
    )
