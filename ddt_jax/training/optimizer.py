"""The optimizer of a run, made from the declarations of its parameters:
Muon or AdamW by group, decay, rate and clipping.
"""

import fnmatch
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn.params import Declaration

MUON_RMS = 0.2  # size of a Muon update, so that it shares AdamW's learning rate (arXiv 2502.16982 eq. 4)


def learning_rate(s: settings.Optimizer, steps: int) -> optax.Schedule:
    """Rate at each optimizer step: linear warm-up from 0, then constant, linear fall over the last share, or cosine."""
    final = s.lr * s.final_lr_fraction
    warmup = min(s.warmup, steps)
    if s.schedule == "cosine":
        rest = optax.cosine_decay_schedule(s.lr, max(steps - warmup, 1), s.final_lr_fraction)
    elif s.schedule == "linear":
        fall = max(min(round(s.decay_fraction * steps), steps - warmup), 1)
        rest = optax.linear_schedule(s.lr, final, fall, transition_begin=steps - warmup - fall)
    else:
        rest = optax.constant_schedule(s.lr)
    return optax.join_schedules(
        [optax.linear_schedule(s.lr / max(warmup, 1), s.lr, max(warmup - 1, 1)), rest], [warmup]
    )


def with_part_rates(declarations, parts: tuple[settings.PartRate, ...]):
    """Declarations with the rates of `optimizer.parts` beside their own.

    Args:
      declarations: tree of `Declaration`.

    Raises:
      UserError: a part fits no name.
    """
    if not parts:
        return declarations
    paths, tree = jax.tree_util.tree_flatten_with_path(declarations)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    times = [1.0] * len(names)
    for part in parts:
        fits = [fnmatch.fnmatchcase(name, part.part) for name in names]
        if not any(fits):
            raise UserError(
                f"config: optimizer.parts: no parameter's name fits {part.part!r}; they are such as {names[0]}, and "
                "`ddt-jax train` lists all of them when a run begins"
            )
        times = [part.times if fit else t for fit, t in zip(fits, times, strict=True)]
    scaled = [replace(d, lr_scale=d.lr_scale * t) for (_, d), t in zip(paths, times, strict=True)]
    return jax.tree_util.tree_unflatten(tree, scaled)


def label(declaration: Declaration, s: settings.Optimizer) -> str:
    """Which optimizer takes a parameter: "muon", "adamw", "discriminator" (Adam) or "frozen"."""
    if declaration.group in ("discriminator", "frozen"):
        return declaration.group
    return "muon" if declaration.group == "matrix" and s.name == "muon" else "adamw"


def make_optimizer(s: settings.Optimizer, steps: int, declarations) -> optax.GradientTransformation:
    """Clipping, then the optimizer of each parameter's group, decoupled weight decay and the learning rate.

    A discriminator is clipped by itself: the size of neither side's gradient moves the other.

    Args:
      declarations: tree of `Declaration` in the structure of the parameters.
    """
    labels = jax.tree.map(lambda d: label(d, s), declarations)
    decays = jax.tree.map(_decays, declarations)

    def dimensions(updates):
        # Explicit for every leaf: without it optax leaves all but plain 2-D kernels to Adam, without a word.
        return jax.tree.map(
            lambda d, u: u if isinstance(u, optax.MaskedNode) else MuonDimensionNumbers(*d.matrix),
            declarations,
            updates,
        )

    groups = {
        "muon": optax.chain(_muon(s, dimensions), _scale_to_rms(dimensions)),
        "adamw": optax.scale_by_adam(s.b1, s.b2, s.eps),
        "frozen": optax.set_to_zero(),
    }
    clip = _clip(s.clip_norm)
    if "discriminator" in jax.tree.leaves(labels):
        d = s.discriminator
        groups["discriminator"] = optax.chain(_clip(d.clip_norm), optax.scale_by_adam(d.b1, d.b2, s.eps))
        clip = optax.masked(clip, jax.tree.map(lambda name: name != "discriminator", labels))
    return optax.chain(
        clip,
        _scaled(optax.partition(groups, labels), declarations),
        optax.add_decayed_weights(s.weight_decay, decays),
        optax.stateless(lambda updates, _: jax.tree.map(lambda d, u: u * _rate(d, s), declarations, updates)),
        optax.scale_by_learning_rate(learning_rate(s, steps)),
    )


def _muon(s: settings.Optimizer, dimensions) -> optax.GradientTransformation:
    """optax's, with its Newton-Schulz steps as a loop: written out one after another for every matrix, as optax does
    with one set of coefficients for all steps, they are a quarter to a half of what a train step takes to compile.
    """
    muon = scale_by_muon(ns_steps=s.newton_schulz_steps, beta=s.momentum, weight_dimension_numbers=dimensions)

    def update(updates, state, params=None):
        # Only for the call: in the state there is one set, as in the checkpoints of older runs.
        of_each_step = jnp.tile(state.ns_coeffs, (s.newton_schulz_steps, 1))
        updates, new = muon.update(updates, state._replace(ns_coeffs=of_each_step), params)
        return updates, new._replace(ns_coeffs=state.ns_coeffs)

    return optax.GradientTransformation(muon.init, update)


def _scaled(optimizers: optax.GradientTransformation, declarations) -> optax.GradientTransformation:
    """Updates times what `Declaration.update_scale` says: in front of weight decay, which it leaves as it is."""

    def update(updates, state, params=None):
        updates, state = optimizers.update(updates, state, params)
        one = lambda d, u: u if d.update_scale == 1 else u * d.update_scale  # noqa: E731
        return jax.tree.map(one, declarations, updates), state

    return optax.GradientTransformation(optimizers.init, update)


def _clip(norm: float) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(norm) if norm else optax.identity()


def _decays(d: Declaration) -> bool:
    return d.decay and d.group not in ("discriminator", "frozen")


def _rate(d: Declaration, s: settings.Optimizer) -> float:
    """Factor on the learning rate."""
    return d.lr_scale * s.discriminator.lr / s.lr if d.group == "discriminator" else d.lr_scale


def _scale_to_rms(dimensions):
    """Gives an orthogonal update the root mean square MUON_RMS: times that and √max(fan in, fan out)."""

    def scale(update, dims):
        fan_in, fan_out = (jnp.prod(jnp.array([update.shape[i] for i in axes])) for axes in dims)
        return update * MUON_RMS * jnp.sqrt(jnp.maximum(fan_in, fan_out))

    def update(updates, _):
        is_dims = lambda x: isinstance(x, MuonDimensionNumbers)  # noqa: E731
        return jax.tree.map(
            lambda dims, u: scale(u, dims) if is_dims(dims) else u, dimensions(updates), updates, is_leaf=is_dims
        )

    return optax.stateless(update)


def table(params, declarations, shardings, s: settings.Optimizer) -> str:
    """What happens to each parameter: shape, optimizer, decay, rate, sharding; with `transfer_from` also the factor on
    its first value. For the start of a run. Decay goes by the rate without the factor that is in `update_scale`.

    Equal parameters of equal blocks share a line, with `*` for the block's number.
    """
    rows = {}  # row → how many parameters it stands for
    leaves = zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(declarations),
        jax.tree.leaves(shardings),
        strict=True,
    )
    for (path, value), d, sharding in leaves:
        spec = ", ".join("-" if axis is None else str(axis) for axis in sharding.spec)
        decay = s.weight_decay if _decays(d) else 0.0
        shape = "x".join(map(str, value.shape)) or "scalar"
        name = re.sub(r"_\d+(?=/)", "_*", jax.tree_util.keystr(path, simple=True, separator="/"))
        starts = (f"x{d.initial_scale:.3g}",) if s.transfer_from else ()
        rate = f"x{_rate(d, s) * d.update_scale:.3g}"
        row = (name, shape, label(d, s), f"{decay:g}", rate, *starts, f"({spec})")
        rows[row] = rows.get(row, 0) + 1
    starts = ("start",) if s.transfer_from else ()
    lines = [("parameter", "shape", "optimizer", "decay", "rate", *starts, "sharding")]
    lines += [(f"{name} ({n})" if n > 1 else name, *rest) for (name, *rest), n in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)
