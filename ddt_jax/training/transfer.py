"""A learning rate that holds at other widths: maximal update parametrization (muP, arXiv 2203.03466), by the spectral
condition of Yang, Simon and Bernstein (arXiv 2310.17813). docs/scaling.md has the rules as a table.

A map from fan-in to fan-out numbers must begin, and must move, with a largest singular value of the order of
√(fan-out / fan-in); then every activation is of the same size at every width, and so is its change by a step. What an
optimizer makes without us:

- Adam moves every element by about the rate, the whole by the rate times √(fan-in fan-out): too far by the fan-in.
- Muon's update is orthogonal, of size 0.2 √max(fan-in, fan-out) here (arXiv 2502.16982): too far by the root of that
  times the root of fan-in / fan-out, which for a map between two widths is the root of the width.
- Tables that are looked up, gains and biases read no width, and are moved by the same at every one.
- Maps start with a spread of 1 / √fan-in, which is right but where no width is written: there the spread is to fall
  as 1 / fan-in, as that of a head does.

Which dimensions grow is not a list of names: the same model is declared at the width where the rate was found, and each
dimension is compared with its own size there. No activation gets a factor, so what is exported stays an ordinary
transformer; and so no parameter may be both a table and a head.
"""

import math
from dataclasses import replace

import jax

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn.params import Declaration

_KEPT = ("discriminator", "frozen")  # groups whose sizes do not follow the width


def narrowed(s: settings.Experiment) -> settings.Experiment | None:
    """The settings with the model as it is at the width `optimizer.transfer_from`, heads of the same size; None where
    that is 0.

    Raises:
      UserError: the rules do not hold for this model, or do not for weights from elsewhere.
    """
    width, m = s.optimizer.transfer_from, s.model
    if not width:
        return None
    if width < 0:
        raise UserError(f"config: optimizer.transfer_from={width} is no width; 0 scales nothing")
    if s.init_from:
        raise _unfit(width, f"init_from={s.init_from}, whose weights began elsewhere")
    if isinstance(m, settings.Multimodal):
        t, coder = m.transformer, getattr(m.image, "coder", None)
        if t.lora.rank:
            raise _unfit(width, f"model.transformer.lora.rank={t.lora.rank}, which trains beside frozen weights")
        if t.tied_head:
            raise _unfit(width, "model.transformer.tied_head=True: a table and a head need rates of their own")
        if coder is not None and coder.kind != "linear":
            raise _unfit(width, f"model.image.coder.kind={coder.kind!r}, whose channels do not follow the width")
    elif not isinstance(m, settings.DDTTokenizer):
        raise _unfit(width, f"model.kind={m.kind!r}; it is for multimodal and ddt")
    return replace(s, model=at_width(m, width))


def _unfit(width, what) -> UserError:
    return UserError(f"config: optimizer.transfer_from={width} does not go with {what}; set it to 0")


def at_width(m: settings.Multimodal | settings.DDTTokenizer, width: int) -> settings.Multimodal | settings.DDTTokenizer:
    """The model at another width: as many heads of the same size as fit, and the MLP in proportion.

    Raises:
      UserError: that is no whole number of heads.
    """
    if isinstance(m, settings.DDTTokenizer):
        return replace(m, width=width, heads=_heads(m, "heads", width, "model"))
    t = m.transformer
    sizes = {name: _heads(t, name, width, "model.transformer") for name in ("heads", "kv_heads")}
    mlp_width = max(1, round(t.mlp_width * width / t.width))
    return replace(m, transformer=replace(t, width=width, mlp_width=mlp_width, **sizes))


def _heads(sizes, name: str, width: int, place: str) -> int:
    here = getattr(sizes, name)
    if here * width % sizes.width:
        raise UserError(
            f"config: {place}.{name}={here} at width {sizes.width} would be {here * width / sizes.width:g} at width "
            f"{width} (optimizer.transfer_from); let their number grow with the width, not their size"
        )
    return here * width // sizes.width


def scaled(declarations, params, narrow, s: settings.Optimizer):
    """Declarations with `update_scale` and `initial_scale` for these parameters.

    Args:
      params, narrow: trees of anything with a shape, here and at the width where the rate was found.
    """

    def one(d: Declaration, here, there):
        if d.group in _KEPT:
            return d
        muon = d.group == "matrix" and s.name == "muon"
        update = _muon_scale(d, here.shape, there.shape) if muon else 1 / grown(d, here.shape, there.shape)[0]
        return replace(d, update_scale=update, initial_scale=_initial_scale(d, here.shape, there.shape))

    return jax.tree.map(one, declarations, params, narrow)


def _dimensions(d: Declaration, shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which dimensions a map reads and writes, counted from the end; of an AdamW map, all others are written."""
    if d.matrix:
        return d.matrix
    return d.reads, tuple(i for i in range(-len(shape), 0) if i not in d.reads)


def grown(d: Declaration, here, there) -> tuple[float, float]:
    """How many times as much a map reads and writes as there; what is no map reads nothing that grows."""
    return tuple(math.prod(here[i] / there[i] for i in dims) for dims in _dimensions(d, here))


def _muon_scale(d: Declaration, here, there) -> float:
    def too_far(shape):
        fan_in, fan_out = (math.prod(shape[i] for i in dims) for dims in d.matrix)
        return math.sqrt(max(fan_in, fan_out) * fan_in / fan_out)

    return too_far(there) / too_far(here)


def _initial_scale(d: Declaration, here, there) -> float:
    if not (d.matrix or d.reads):
        return 1.0
    reads, writes = grown(d, here, there)
    wanted = min(1.0, math.sqrt(writes / reads)) / math.sqrt(reads)
    return wanted if d.fixed_spread else wanted * math.sqrt(reads)
