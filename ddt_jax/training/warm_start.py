"""A fresh run that begins with what another one has learned: parameters and `extra`, where name and shape agree.

What is copied, what stays fresh and what is left behind is decided from shapes alone, before an array is read. Step,
optimizer and counters are the new run's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ddt_jax import config, settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import code_embedding, diffusion_model
from ddt_jax.multimodal.row_model import FROZEN
from ddt_jax.nn import lora
from ddt_jax.training import checkpoint, weights
from ddt_jax.training.state import TrainState, abstract_state

_LISTED = 6  # names in one line
_OF_IMAGES = (code_embedding.PARAMS, diffusion_model.PARAMS)  # what imported transformers know nothing of


@dataclass(frozen=True)
class Plan:
    """Names of arrays ("params/encoder/embed/kernel"), each in one of three lists."""

    copied: tuple[str, ...]
    fresh: tuple[str, ...]  # this run's alone
    left: tuple[str, ...]  # the other run's alone

    def __str__(self):
        parts = {}
        for name in self.copied:
            part = "/".join(name.split("/")[:2])
            parts[part] = parts.get(part, 0) + 1
        copied = ", ".join(f"{part} ({n})" for part, n in parts.items())
        return f"  copied: {copied}\n  fresh: {_list(self.fresh)}\n  left behind: {_list(self.left)}"


@dataclass(frozen=True)
class FirstStage:
    """A run that another one begins with.

    Attributes:
      workdir: its own.
      settings: its own.
      abstract: its state, laid out on the mesh of the run that begins.
      plan: what goes over.
    """

    workdir: str
    settings: settings.Experiment
    abstract: TrainState
    plan: Plan

    def give(self, state: TrainState, note: Callable[[str], None]) -> TrainState:
        """A fresh state with what is copied, from the newest checkpoint that verifies. To be called under the mesh.

        The weight average, where the new run has one, starts at the parameters.

        Raises:
          UserError: if no checkpoint verifies.
        """
        points = checkpoint.Checkpoints(self.workdir, self.settings.train, note, read_only=True)
        a = self.abstract
        # Nobody looks at its optimizer, nor at parameters beside an average.
        wanted = a.replace(opt_state=None, params=a.params if a.ema is None else None)
        source = points.restore(wanted, partial=True)
        points.close()
        which = "parameters" if source.ema is None else "average"
        note(f"init_from: {self.workdir} at step {int(source.step):,}, its {which}\n{self.plan}")
        theirs, copied = _named(source), set(self.plan.copied)

        def take(path, value):
            name = _name(path)
            return jax.device_put(theirs[name], value.sharding) if name in copied else value

        new = jax.tree_util.tree_map_with_path(take, {"params": state.params, "extra": state.extra})
        ema = None if state.ema is None else jax.tree.map(jnp.copy, new["params"])
        return state.replace(**new, ema=ema)


@dataclass(frozen=True)
class Imported:
    """Imported weights that a multimodal run begins with: all of its transformer.

    Attributes:
      folder: where they are.
      arrays: by unrolled path.
      lora: of the run.
    """

    folder: str
    arrays: dict
    lora: settings.LoRA

    def give(self, state: TrainState, note: Callable[[str], None]) -> TrainState:
        """See `FirstStage.give`. Updates of LoRA, and what takes images into the model and out of it, are fresh."""
        of_images = {name: value for name, value in state.params.items() if name in _OF_IMAGES}
        own = {name: value for name, value in state.params.items() if name not in _OF_IMAGES}
        extra = state.extra
        if FROZEN in extra:
            updates, whole = lora.split(own)
            trained, frozen = lora.split(self._read(lora.join(whole, extra[FROZEN]), note), self.lora.whole)
            own, extra = lora.join(updates, trained), extra | {FROZEN: frozen}
        else:
            own = self._read(own, note)
        new = own | of_images
        ema = None if state.ema is None else jax.tree.map(jnp.copy, new)
        return state.replace(params=new, extra=extra, ema=ema)

    def _read(self, abstract, note):
        found = weights.restore(self.arrays, abstract)
        note(f"init_from: {len(self.arrays)} arrays of {self.folder}")
        return found


# What may differ between imported settings and a run's: nothing of it changes what the weights compute.
_LAYOUT = ("scan_layers", "remat", "attention", "loss_chunk", "dtype", "dropout", "z_loss", "lora")


def _imported(s: settings.Experiment) -> Imported:
    arrays, about = weights.load(s.init_from)
    ours, theirs = config.dump(s.model.transformer), about["settings"]
    differing = [k for k in ours if k not in _LAYOUT and ours[k] != theirs.get(k)]
    if differing:
        named = ", ".join(f"{k}={theirs.get(k)!r} there, {ours[k]!r} here" for k in differing[:4])
        hint = "; import it with --vocab-size" if "vocab_size" in differing else "; set model.transformer as there"
        raise UserError(f"init_from: {s.init_from} has other settings ({named}){hint}")
    return Imported(s.init_from, arrays, s.model.transformer.lora)


def find(s: settings.Experiment, model, mesh, abstract: TrainState, make_model) -> FirstStage | Imported | None:
    """The run, or imported weights, in `init_from`; None where none is named and none is needed.

    Args:
      s, model, mesh, abstract: of the run that begins.
      make_model: settings → model, without arrays.

    Raises:
      UserError: if there is no such run, or it does not fit; or if this one can't do without.
    """
    if not s.init_from:
        if model.inherited:
            raise UserError(
                f"config: model.stage={s.model.stage!r} goes on from what another run has learned, which stands; "
                "set init_from to the workdir of that run"
            )
        return None
    if isinstance(s.model, settings.Multimodal) and weights.holds(s.init_from):
        return _imported(s)
    theirs = config.from_dict(checkpoint.saved_config(s.init_from, "init_from"))
    if not checkpoint.saved_steps(s.init_from):
        raise UserError(f"init_from: {s.init_from} has no checkpoint yet; train that run first")
    differing = config.difference(config.dump(theirs), config.dump(s))
    # A codebook that is trained here may be another one than there.
    decisive = (*config.decides_codes(s.model.kind, "extra/codebook" in model.inherited), "model.dtype")
    if model.inherited and (differing := [name for name in differing if name.startswith(decisive)]):
        raise UserError(
            f"init_from: {s.init_from} makes other codes than this run would; set as there: {', '.join(differing)}"
        )
    if _stands(theirs) != _stands(s):
        raise UserError(
            f"init_from: in {s.init_from} other weights stand still than here; set model.transformer.lora.rank and "
            "whole as there, or merge its updates by `ddt-jax export llama` and `import llama`"
        )
    if _reads_codes(s) and _reads_codes(theirs):
        there, here = config.dump(theirs.model.image), config.dump(s.model.image)
        differing = [name for name in here if here[name] != there.get(name)]
        if asked := [name for name in differing if name in ("code_vectors", "code_places")]:
            named = ", ".join(f"model.image.{name}={there[name]}" for name in asked)
            raise UserError(f"init_from: {s.init_from} was trained with {named}; set it as there")
        if differing:
            raise UserError(
                f"init_from: {s.init_from} was trained on other codes than sequences.sources; use those of one"
            )
    source = abstract_state(theirs, make_model(theirs), mesh, make_model)[2]
    return FirstStage(s.init_from, theirs, source, plan(source, abstract, model.inherited))


def _stands(s: settings.Experiment) -> set[str] | None:
    """What LoRA leaves to be trained whole; None: there is no LoRA, all is trained."""
    c = s.model.transformer.lora if isinstance(s.model, settings.Multimodal) else settings.LoRA()
    return set(c.whole) if c.rank else None


def _reads_codes(s: settings.Experiment) -> bool:
    return isinstance(s.model, settings.Multimodal) and isinstance(s.model.image, settings.CodeImages)


def plan(source: TrainState, state: TrainState, inherited: tuple[str, ...] = ()) -> Plan:
    """What of a run goes over into another.

    Args:
      source, state: of the two runs, abstract.
      inherited: names of parts of `state` that have to be found, see `tokenizers.base.ImageTokenizer`.

    Raises:
      UserError: if an array has another shape there, a part that has to be found is not, or there is nothing to copy.
    """
    theirs, ours = _named(source), _named(state)
    shared = [name for name in ours if name in theirs]
    other = [n for n in shared if (theirs[n].shape, theirs[n].dtype) != (ours[n].shape, ours[n].dtype)]
    if other:
        shapes = [f"{n} {_shape(theirs[n])} there, {_shape(ours[n])} here" for n in other[:3]]
        raise UserError(f"init_from: {len(other)} arrays have other shapes ({'; '.join(shapes)}); use the same sizes")
    fresh = [name for name in ours if name not in theirs]
    missing = [name for name in fresh if f"{name}/".startswith(tuple(f"{part}/" for part in inherited))]
    if missing:
        raise UserError(f"init_from: lacks {_list(missing)}, not trained here either; use the same kind of model")
    if not any(name.startswith("params/") for name in shared):
        raise UserError("init_from: no parameter there has a name that this run knows; use the same kind of model")
    return Plan(tuple(shared), tuple(fresh), tuple(name for name in theirs if name not in ours))


def _named(state: TrainState) -> dict[str, Any]:
    """Weights (the average where there is one) and extra state by name."""
    tree = {"params": state.params if state.ema is None else state.ema, "extra": state.extra}
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shape(x):
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"


def _list(names):
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "") if names else "nothing"
