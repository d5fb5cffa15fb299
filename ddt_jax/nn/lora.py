"""Low-rank updates of linear maps (LoRA, arXiv 2106.09685): y = x kernel + alpha / rank · (x a) b.

`layers.Dense` declares `lora_a` and `lora_b` beside its kernel. To train them without the rest, `split` takes them, and
what is trained whole beside them, out of the parameters; what is frozen then lies in `extra`. `merge` makes ordinary
kernels of them.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn.params import declare

NAMES = ("lora_a", "lora_b")


def update(dense, x_ND, read: tuple[int, ...]):
    """What the update adds to the output of a Dense; zero at initialisation. x_ND: its input, flat, in its type."""
    n, rank = dense.inputs, dense.lora.rank
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=tuple(range(n)), out_axis=-1)
    a = dense.param("lora_a", declare(init, (*dense.axes[:n], "rank")), (*read, rank))
    b = dense.param("lora_b", declare(nn.initializers.zeros, ("rank", *dense.axes[n:])), (rank, *dense.features))
    a, b = a.reshape(-1, rank).astype(x_ND.dtype), b.reshape(rank, -1).astype(x_ND.dtype)
    return (x_ND @ a) @ b * (dense.lora.alpha / rank)


def split(params: dict, whole: tuple[str, ...] = ()) -> tuple[dict, dict]:
    """Parameters as (what is trained, all others); `join` puts them together again. Works on boxed trees too.

    Args:
      whole: what is trained beside the updates, see `settings.LoRA.whole`.
    """
    trained, others = {}, {}
    for name, value in params.items():
        if name in (*NAMES, *whole) or ("norms" in whole and name.endswith("norm")):
            trained[name] = value
        elif isinstance(value, dict):
            inner = split(value, whole)
            trained |= {name: inner[0]} if inner[0] else {}
            others |= {name: inner[1]} if inner[1] else {}
        else:
            others[name] = value
    return trained, others


def join(trained: dict, others: dict) -> dict:
    """The inverse of `split`."""
    both = {name: join(trained[name], others[name]) for name in trained.keys() & others.keys()}
    return others | trained | both


def merge(params: dict, s: settings.LoRA) -> dict:
    """Parameters without updates, these added to the kernels; also of scanned stacks."""
    rest = {name: merge(x, s) if isinstance(x, dict) else x for name, x in params.items() if name not in NAMES}
    if "lora_a" in params:
        a, b, kernel = params["lora_a"], params["lora_b"], params["kernel"]
        stacked = a.ndim + b.ndim - 2 - kernel.ndim  # layer axes in front of all three
        read, write = a.shape[stacked:-1], b.shape[stacked + 1 :]
        flat_a = a.reshape(*a.shape[:stacked], math.prod(read), s.rank)
        flat_b = b.reshape(*b.shape[:stacked], s.rank, math.prod(write))
        delta = jnp.matmul(flat_a, flat_b).reshape(kernel.shape) * (s.alpha / s.rank)
        rest["kernel"] = (kernel + delta).astype(kernel.dtype)
    return rest
