"""Transformer blocks: plain (encoder), adaLN-zero with tokens as extra keys and values, and dual-stream joint (MMDiT).

All take (carry, *rest) and return the carry, so that `Stack` can run any of them unrolled or under a scan.

Legend: B batch, S sequence, N patches, K tokens, D width, H heads, E head dimension.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax.mesh import constrain_positions
from ddt_jax.nn.attention import attend
from ddt_jax.nn.attention_chunked import SAVED
from ddt_jax.nn.layers import MLP, Dense, LayerNorm, RMSNorm, zeros_dense


class HeadProjection(nn.Module):
    """D → some of q, k, v, each [B, H, S, E]; every one of them is its own matrix to Muon.

    Attributes:
      roles: subset of "qkv" in that order.
      qk_norm: RMS norm with a learned scale on each head's q and k.
      width: of all heads together; 0 for that of the input.
    """

    roles: str
    heads: int
    qk_norm: bool
    dtype: Any = None
    width: int = 0

    @nn.compact
    def __call__(self, x_BSD):
        d = self.width or x_BSD.shape[-1]
        # Heads come first, so that the kernel keeps its sharding over heads when Dense flattens it.
        shape = (self.heads, len(self.roles), d // self.heads)
        axes = ("embed", "heads", None, "head_dim")
        y_BSHRE = Dense(shape, axes, matrix=((-4,), (-3, -1)), dtype=self.dtype, name="heads")(x_BSD)
        y_RBHSE = y_BSHRE.transpose(3, 0, 2, 1, 4)
        normed = len(self.roles.rstrip("v")) if self.qk_norm else 0
        if not normed:
            return list(y_RBHSE)
        return [*RMSNorm((normed, 1, 1, 1), name="qk_norm")(y_RBHSE[:normed]), *y_RBHSE[normed:]]


class HeadMerge(nn.Module):
    """[B, H, S, E] → [B, S, D]."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BHSE):
        merge = Dense(
            (self.width,),
            ("heads", "head_dim", "embed"),
            inputs=2,
            matrix=((-3, -2), (-1,)),
            dtype=self.dtype,
            name="merge",
        )
        return merge(x_BHSE.swapaxes(1, 2))


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and MLP."""

    heads: int
    mlp_ratio: int = 4
    qk_norm: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BSD, spans):
        d = x_BSD.shape[-1]
        h_BSD = LayerNorm(name="attention_norm")(x_BSD)
        qkv = HeadProjection("qkv", self.heads, self.qk_norm, self.dtype, name="project")(h_BSD)
        x_BSD = x_BSD + HeadMerge(d, self.dtype, name="output")(attend(*qkv, spans))
        h_BSD = LayerNorm(name="mlp_norm")(x_BSD)
        return x_BSD + MLP(self.mlp_ratio * d, self.dtype, name="mlp")(h_BSD)


class Modulation(nn.Module):
    """adaLN-zero: `parts` vectors of width D from a condition, all zero at initialisation (DiT, arXiv 2212.09748).

    Its kernel is AdamW's: it maps one vector per example, and orthogonalising its parts one by one is slow on CPU.
    """

    parts: int
    dtype: Any = None

    @nn.compact
    def __call__(self, condition):
        d = condition.shape[-1]
        dense = zeros_dense((self.parts, d), ("embed", None, "embed_out"), dtype=self.dtype, name="modulate")
        # [B, parts, D] → parts of [B, 1, D]; a condition per row [B, S, D] keeps its rows.
        y = dense(nn.silu(condition))
        return [part if condition.ndim == 3 else part[:, None] for part in jnp.moveaxis(y, -2, 0)]


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def _plain_norm(x):
    return LayerNorm(affine=False)(x)


class CrossBlock(nn.Module):
    """adaLN-zero block over patches that see tokens as extra keys and values. The tokens themselves are not updated."""

    heads: int
    mlp_ratio: int = 4
    qk_norm: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BND, tokens_BKD, condition_BD, spans):
        d = x_BND.shape[-1]
        mod = Modulation(6, self.dtype, name="adaln")(condition_BD)
        h_BND = modulate(_plain_norm(x_BND), mod[0], mod[1])
        q, k, v = HeadProjection("qkv", self.heads, self.qk_norm, self.dtype, name="project")(h_BND)
        token_k, token_v = HeadProjection("kv", self.heads, self.qk_norm, self.dtype, name="token_project")(tokens_BKD)
        k, v = jnp.concatenate([token_k, k], axis=2), jnp.concatenate([token_v, v], axis=2)
        x_BND = x_BND + mod[2] * HeadMerge(d, self.dtype, name="output")(attend(q, k, v, spans))
        h_BND = modulate(_plain_norm(x_BND), mod[3], mod[4])
        return x_BND + mod[5] * MLP(self.mlp_ratio * d, self.dtype, name="mlp")(h_BND)


class JointBlock(nn.Module):
    """Dual-stream block (MMDiT, arXiv 2403.03206): own weights for tokens and patches, one attention over both.

    The carry is (tokens [B, K, D], patches [B, N, D]). With pre_only the tokens give keys and values and pass
    unchanged: the last block's tokens would go nowhere.
    """

    heads: int
    mlp_ratio: int = 4
    qk_norm: bool = True
    pre_only: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, carry, token_condition, condition_BD, spans):
        tokens_BKD, x_BND = carry
        k = tokens_BKD.shape[1]
        token_mod = Modulation(2 if self.pre_only else 6, self.dtype, name="token_adaln")(token_condition)
        mod = Modulation(6, self.dtype, name="adaln")(condition_BD)
        roles = "kv" if self.pre_only else "qkv"
        h_BKD = modulate(_plain_norm(tokens_BKD), token_mod[0], token_mod[1])
        token_parts = HeadProjection(roles, self.heads, self.qk_norm, self.dtype, name="token_project")(h_BKD)
        h_BND = modulate(_plain_norm(x_BND), mod[0], mod[1])
        parts = HeadProjection("qkv", self.heads, self.qk_norm, self.dtype, name="project")(h_BND)
        keys, values = (jnp.concatenate([token_parts[i], parts[i]], axis=2) for i in (-2, -1))
        queries = parts[0] if self.pre_only else jnp.concatenate([token_parts[0], parts[0]], axis=2)
        out = attend(queries, keys, values, spans)
        if not self.pre_only:
            tokens_BKD = self._finish(tokens_BKD, out[:, :, :k], token_mod, "token_")
            out = out[:, :, k:]
        return tokens_BKD, self._finish(x_BND, out, mod, "")

    def _finish(self, x, attended, mod, prefix):
        d = x.shape[-1]
        x = x + mod[2] * HeadMerge(d, self.dtype, name=f"{prefix}output")(attended)
        h = modulate(_plain_norm(x), mod[3], mod[4])
        return x + mod[5] * MLP(self.mlp_ratio * d, self.dtype, name=f"{prefix}mlp")(h)


# What a block keeps for its gradient, by name; all else is computed again.
REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of linear maps
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
}
REMAT["dots_attention"] = jax.checkpoint_policies.save_from_both_policies(REMAT["dots"], REMAT["attention"])


class _Scanned(nn.Module):
    make: Callable

    @nn.compact
    def __call__(self, carry, *rest):
        return self.make(name="block")(_by_rows(carry), *rest), None


def _by_rows(carry):
    """The carry [B, S, D], or a tuple with such, as its batch lies: rows over the batch axes, positions over context.

    Tables, whose width is split, would else draw it to their side: each device then multiplies its part of the width of
    all rows, and adds up the products.
    """
    return jax.tree.map(lambda x: constrain_positions(x) if getattr(x, "ndim", 0) == 3 else x, carry)


class Stack(nn.Module):
    """`depth` equal blocks in a row.

    Attributes:
      make: (name=…) → block.
      scan: one compiled body for all blocks, with parameters stacked along a first axis; `scanned` and `unrolled`
        convert between the two layouts.
      remat: blocks are computed again for the gradient but for what one of `REMAT` keeps; "none": they are not. make
        must be a functools.partial of the block's class.
    """

    make: Callable
    depth: int
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, carry, *rest, last=()):
        """last: further arguments of the last block alone, which has no body of its own under a scan."""
        make = self.make
        if self.remat != "none":
            # Under a scan nothing could merge the two computations anyway.
            block = nn.remat(make.func, prevent_cse=not self.scan, policy=REMAT[self.remat])
            make = functools.partial(block, *make.args, **make.keywords)
        if not self.scan or self.depth == 0:
            for i in range(self.depth):
                carry = make(name=f"block_{i}")(_by_rows(carry), *rest, *(last if i == self.depth - 1 else ()))
            return carry
        if last:
            raise ValueError("a scan's blocks are all called alike")
        body = nn.scan(
            _Scanned,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        return body(make, name="scanned")(carry, *rest)[0]


def scanned(params):
    """Parameters (plain arrays) of unrolled stacks → of scanned ones, everywhere in a tree."""
    if not isinstance(params, dict):
        return params
    names = sorted((n for n in params if re.fullmatch(r"block_\d+", n)), key=lambda n: int(n.split("_")[1]))
    rest = {n: scanned(v) for n, v in params.items() if n not in names}
    if not names:
        return rest
    return rest | {"scanned": {"block": jax.tree.map(lambda *xs: jnp.stack(xs), *(params[n] for n in names))}}


def unrolled(params):
    """The inverse of `scanned`."""
    if not isinstance(params, dict):
        return params
    rest = {n: unrolled(v) for n, v in params.items() if n != "scanned"}
    if "scanned" not in params:
        return rest
    stacked = params["scanned"]["block"]
    depth = jax.tree.leaves(stacked)[0].shape[0]
    return rest | {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth)}
