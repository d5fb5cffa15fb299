"""Cross-entropy over a large vocabulary, whose logits never exist for more than a chunk of rows.

The gradient is made in the same pass as the loss, while a chunk's logits are there: three products of matrices per
chunk instead of four, and the head travels once. Under a mesh every device takes its own rows, those of an example over
the axis context: it gathers the head over fsdp before its loop over chunks, adds up a gradient of the head of its own,
and that is reduced and scattered after the loop. Left to the compiler, both would happen in every chunk.

Legend: B examples, R rows, N = B R rows of a device, C rows of a chunk, D width, V vocabulary (a device's part of it,
where tensor splits it).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ddt_jax import mesh as meshes

# Where no chunk is set: rows at least, and as many more as have so many logits.
_LEAST, _LOGITS = 256, 2**22


class Rows(NamedTuple):
    """What is known of each row, without gradient: [B, R].

    Attributes:
      nll: negative logarithm of the target's probability, at least fp32.
      right: whether no other id is more likely than the target, bool.
    """

    nll: Any
    right: Any


class _Options(NamedTuple):
    z_loss: float
    soft_cap: float
    chunk: int


def cross_entropy(h_BRD, head_VD, targets_BR, weights_BR, *, z_loss=0.0, soft_cap=0.0, chunk=0):
    """Σ weight · (nll + z_loss · log² Σ exp logits), with gradients for hidden states and head.

    Args:
      h_BRD: hidden states; the products run in their type.
      head_VD: float, laid out as axes ("vocab", "embed") say.
      targets_BR: int32 in [0, V).
      weights_BR: float; rows of weight 0 (padding) count for nothing, as long as they are finite. Has no gradient.
      soft_cap: c > 0 bends logits x to c tanh(x / c).
      chunk: rows whose logits exist at once, on a device; 0: 256, or as many as have four million logits.

    Returns:
      (the sum, at least fp32; `Rows`).
    """
    wide = jnp.promote_types(h_BRD.dtype, jnp.float32)
    weights_BR = weights_BR.astype(wide)
    return _total(h_BRD, head_VD, targets_BR, weights_BR, _Options(z_loss, soft_cap, chunk))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _total(h, head, targets, weights, options):
    return _spread(h, head, targets, weights, options, False)[:2]


def _save(h, head, targets, weights, options):
    total, rows, d_h, d_head = _spread(h, head, targets, weights, options, True)
    return (total, rows), (d_h, d_head, jnp.zeros((0,), head.dtype))


def _backward(options, saved, cotangents):
    d_h, d_head, like = saved
    scale = cotangents[0]
    return (d_h * scale).astype(d_h.dtype), (d_head * scale).astype(like.dtype), None, None


_total.defvjp(_save, _backward)


def _spread(h_BRD, head_VD, targets_BR, weights_BR, options, gradient):
    """`_local` on every device of the mesh that is set, if one is."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = () if mesh.empty else meshes.batch_axes(h_BRD.shape[0], mesh)
    if mesh.empty or mesh.size == 1 or not rows:
        return _local(h_BRD, head_VD, targets_BR, weights_BR, options, gradient, None, None, ())
    head_spec = meshes.partition(("vocab", "embed"), head_VD.shape, mesh)[0]
    context = meshes.position_axis(h_BRD.shape[1])
    row_spec, whole = PartitionSpec(rows, context), PartitionSpec()
    several = lambda axis: axis if axis and mesh.shape[axis] > 1 else None  # noqa: E731 - one device says nothing
    local = functools.partial(
        _local,
        options=options,
        gradient=gradient,
        vocabulary_axis=several(head_spec[0]),
        width_axis=several(head_spec[1]),
        row_axes=tuple(filter(several, (*rows, context))),
    )
    return jax.shard_map(
        local,
        in_specs=(row_spec, head_spec, row_spec, row_spec),
        out_specs=(whole, Rows(row_spec, row_spec), *((row_spec, head_spec) if gradient else (None, None))),
        check_vma=False,
    )(h_BRD, head_VD, targets_BR, weights_BR)


def _local(h_BRD, head_VD, targets_BR, weights_BR, options, gradient, vocabulary_axis, width_axis, row_axes):
    """The sum over all devices, a device's rows and its part of the gradients (None without `gradient`).

    Args:
      vocabulary_axis, width_axis: mesh axes that split the head, or None.
      row_axes: mesh axes that split the rows.
    """
    b, r, d = h_BRD.shape
    wide = weights_BR.dtype
    head_VD = head_VD.astype(h_BRD.dtype)
    if width_axis:
        head_VD = jax.lax.all_gather(head_VD, width_axis, axis=1, tiled=True)
    v = head_VD.shape[0]
    first = jax.lax.axis_index(vocabulary_axis) * v if vocabulary_axis else 0
    over_vocabulary = {
        name: functools.partial(operation, axis_name=vocabulary_axis) if vocabulary_axis else lambda x: x
        for name, operation in (("max", jax.lax.pmax), ("sum", jax.lax.psum))
    }
    n = b * r
    c = min(options.chunk or max(_LEAST, _LOGITS // v), n)
    padding = -n % c

    def chunks(x):
        x = x.reshape(n, *x.shape[2:])
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, c, *x.shape[1:])

    def one(carry, chunk):
        total, d_head_VD = carry
        h_CD, targets_C, weights_C = chunk
        logits_CV = jnp.matmul(h_CD, head_VD.T, preferred_element_type=wide)
        if options.soft_cap:
            logits_CV = options.soft_cap * jnp.tanh(logits_CV / options.soft_cap)
        peak_C = over_vocabulary["max"](logits_CV.max(-1))
        is_target_CV = jnp.arange(v, dtype=jnp.int32) == (targets_C - first)[:, None]
        parts = jnp.stack([jnp.exp(logits_CV - peak_C[:, None]).sum(-1), jnp.where(is_target_CV, logits_CV, 0).sum(-1)])
        sum_C, target_C = over_vocabulary["sum"](parts)
        log_total_C = peak_C + jnp.log(sum_C)
        nll_C = log_total_C - target_C
        total = total + jnp.sum(weights_C * (nll_C + options.z_loss * jnp.square(log_total_C)))
        rows = nll_C, target_C >= peak_C
        if not gradient:
            return (total, None), (rows, None)
        d_CV = jnp.exp(logits_CV - log_total_C[:, None]) * (1 + 2 * options.z_loss * log_total_C)[:, None]
        d_CV = weights_C[:, None] * (d_CV - is_target_CV)
        if options.soft_cap:
            d_CV = d_CV * (1 - jnp.square(logits_CV / options.soft_cap))
        d_CV = d_CV.astype(h_CD.dtype)
        d_head_VD = d_head_VD + jnp.matmul(d_CV.T, h_CD, preferred_element_type=wide)
        return (total, d_head_VD), (rows, jnp.matmul(d_CV, head_VD, preferred_element_type=wide))

    start = (jnp.zeros((), wide), jnp.zeros((v, d), wide) if gradient else None)
    (total, d_head_VD), (rows, d_h) = jax.lax.scan(one, start, tuple(map(chunks, (h_BRD, targets_BR, weights_BR))))
    total = jax.lax.psum(total, row_axes) if row_axes else total
    rows = Rows(*(x.reshape(-1)[:n].reshape(b, r) for x in rows))
    if not gradient:
        return total, rows, None, None
    d_h = over_vocabulary["sum"](d_h).reshape(-1, d)[:n].reshape(b, r, d).astype(h_BRD.dtype)
    if width_axis:
        d_head_VD = jax.lax.psum_scatter(d_head_VD, width_axis, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in row_axes if axis != width_axis)
    return total, rows, d_h, jax.lax.psum(d_head_VD, rest) if rest else d_head_VD
