"""The whole state of a run: everything that a step changes, and nothing else.

It is abstract first: shapes and shardings are known before a number exists, and initialisation, restore and
ahead-of-time compilation all start from the same abstract state.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.nn import params as params_lib
from ddt_jax.training import offload, transfer
from ddt_jax.training import optimizer as optimizers
from ddt_jax.training.guards import sides, with_guards


@flax.struct.dataclass
class TrainState:
    """State between two optimizer steps.

    Attributes:
      step: int32, steps taken, bad ones included. It is also the position in the data.
      params: tree of arrays, at least float32.
      opt_state: of optax; with guards (`training/guards.py`), a Guarded.
      ema: running average of params, or None.
      extra: what a model keeps beside its parameters: codebook and usage, running normalisation.
      rng: uint32 [2], key data from which the key of each step is folded.
      bad_steps: int32 [2], steps skipped as not finite, or as spikes: in all, and in a row up to now.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    extra: Any
    rng: Any
    bad_steps: Any


def unbox(tree):
    """Values of a tree in which some leaves are boxed."""
    return jax.tree.map(lambda x: x.value if params_lib.is_box(x) else x, tree, is_leaf=params_lib.is_box)


def init_state(
    model, optimizer: optax.GradientTransformation, declarations, *, seed: int, use_ema: bool, guard: settings.Optimizer
) -> TrainState:
    """A fresh state. To be traced under jit with the shardings of `state_shardings`, or abstractly.

    Args:
      declarations: of the parameters, for the scale of their first values.
      guard: says which guards the optimizer state has.
    """
    init_key, step_key = jax.random.split(jax.random.key(seed))
    boxed, extra = model.init(init_key)
    params, extra = unbox(boxed), unbox(extra)
    scaled = lambda d, x: x if d.initial_scale == 1 else x * d.initial_scale  # noqa: E731
    params = jax.tree.map(scaled, declarations, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=with_guards(guard, optimizer.init(params), len(sides(params))),
        ema=jax.tree.map(jnp.copy, params) if use_ema else None,
        extra=extra,
        rng=jax.random.key_data(step_key),
        bad_steps=jnp.zeros((2,), jnp.int32),
    )


def shardings_of(boxed, mesh: Mesh) -> tuple[Any, list[meshes.Fallback]]:
    """Shardings of a boxed (abstract) tree, without boxes in its structure;
    a leaf without one is whole on every device.
    """
    fallbacks = []

    def one(path, leaf):
        if not params_lib.is_box(leaf):
            return meshes.replicated(mesh)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec, missed = meshes.partition(leaf.declaration.axes, leaf.value.shape, mesh, name)
        fallbacks.extend(missed)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=params_lib.is_box), fallbacks


def state_shardings(
    model, abstract: TrainState, mesh: Mesh, offloaded: bool = False
) -> tuple[TrainState, list[meshes.Fallback]]:
    """Where each array of the state lies. Optimizer moments and the average lie with their parameters.

    Args:
      offloaded: moments lie in the memory of the hosts.
    """
    boxed, boxed_extra = jax.eval_shape(model.init, jax.random.key(0))
    params, fallbacks = shardings_of(boxed, mesh)
    extra, more = shardings_of(boxed_extra, mesh)
    whole = meshes.replicated(mesh)
    moments = jax.tree.map(lambda sh: sh.with_memory_kind(offload.HOST), params) if offloaded else params
    opt_state = _beside_params(abstract.opt_state, abstract.params, moments, whole)
    ema = None if abstract.ema is None else params
    state = TrainState(whole, params, opt_state, ema, extra, whole, whole)
    return state, fallbacks + more


def abstract_state(s: settings.Experiment, model, mesh: Mesh, make_model: Callable[[settings.Experiment], Any]):
    """A run on a mesh before a number of it exists.

    Args:
      make_model: of settings, for the model at the width `optimizer.transfer_from`.

    Returns:
      (optimizer, declarations of the parameters, TrainState of ShapeDtypeStructs with shardings, dimensions that stay
      whole).

    Raises:
      UserError: as `transfer.narrowed` and `optimizer.with_part_rates`.
    """
    boxed, _ = jax.eval_shape(model.init, jax.random.key(0))
    _, declarations = params_lib.split(boxed)
    declarations = optimizers.with_part_rates(declarations, s.optimizer.parts)
    if narrow := transfer.narrowed(s):
        narrow_boxed, _ = jax.eval_shape(make_model(narrow).init, jax.random.key(0))
        declarations = transfer.scaled(declarations, unbox(boxed), unbox(narrow_boxed), s.optimizer)
    optimizer = optimizers.make_optimizer(s.optimizer, s.train.steps, declarations)
    abstract = jax.eval_shape(
        lambda: init_state(model, optimizer, declarations, seed=s.seed, use_ema=s.train.ema > 0, guard=s.optimizer)
    )
    shardings, fallbacks = state_shardings(model, abstract, mesh, s.optimizer.offload)
    abstract = jax.tree.map(lambda a, sh: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sh), abstract, shardings)
    return optimizer, declarations, abstract, fallbacks


def _beside_params(opt_state, params, shardings, otherwise):
    """Each array of an optimizer state takes the sharding of the parameter whose path its own path ends with.

    (optax's own tree_map_params does not work through `optax.partition`.)
    """
    key = lambda path: tuple(map(str, path))  # noqa: E731
    by_path = {
        key(path): (value.shape, sharding)
        for (path, value), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def one(path, leaf):
        for start in range(len(path)):
            shape, sharding = by_path.get(key(path[start:]), (None, otherwise))
            if shape == leaf.shape:
                return sharding
        return otherwise

    return jax.tree_util.tree_map_with_path(one, opt_state)
