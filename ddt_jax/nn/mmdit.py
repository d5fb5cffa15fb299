"""Blocks of the published Selftok networks (arXiv 2505.07538, released `modules.py` and `sd3/mmdit.py`).

Both condition tokens by their place, never by the noise level: token j has the sinusoids of the integer 1000 + 8 j, and
every block turns them into a modulation with weights of its own. Neither normalises queries and keys.

What the published checkpoints hold although nothing ever moves it is declared too, in the group "frozen", so that a
checkpoint can go both ways without a loss; `frozen` makes such parameters out of ordinary modules.

Legend: B batch, N patches, K tokens, S = K + N, D width (of the query stream in the encoder), I width of the encoder's
image stream, F sinusoids.
"""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax.nn import params, spans
from ddt_jax.nn.attention import attend
from ddt_jax.nn.blocks import HeadMerge, HeadProjection, JointBlock, Modulation, modulate
from ddt_jax.nn.layers import MLP, Dense, LayerNorm


def token_positions(num_tokens: int):
    """The integers [K] that stand for the tokens' places."""
    return 1000 + 8 * np.arange(num_tokens)


def frozen(module: type[nn.Module]) -> type[nn.Module]:
    """The same module, of which no optimizer takes a parameter. For modules that run at initialisation only.

    (What it puts out must go nowhere: `nn.map_variables` also fails when `apply` collects intermediates.)
    """

    def declare(variables):
        def one(box):
            return box.replace(declaration=replace(box.declaration, group="frozen", matrix=None, decay=False))

        return jax.tree.map(lambda x: one(x) if params.is_box(x) else x, variables, is_leaf=params.is_box)

    return nn.map_variables(module, "params", trans_out_fn=declare, init=True)


class Embedder(nn.Module):
    """Sinusoids [..., F] → [..., D] through an MLP with SiLU: of the time, or of the tokens' positions."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, features):
        h = Dense((self.width,), ("frequency", "embed_out"), dtype=self.dtype, name="up")(features)
        return Dense((self.width,), ("embed", "embed_out"), dtype=self.dtype, name="down")(nn.silu(h))


class QueryBlock(nn.Module):
    """Dual-stream encoder block in one direction: queries see the image, the image sees itself (§3.1, "Uni").

    The carry is (image [B, N, I], queries [B, K, D]). The image's keys and values for the queries come from the same
    normalised image tokens as its own, through a projection from I to D.

    Attributes:
      last: nothing reads the image that would come out, so its own weights are frozen and it passes unchanged.
    """

    image_heads: int
    heads: int
    mlp_ratio: int = 4
    last: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, carry, features_1KF):
        x_BNI, q_BKD = carry
        width, d = x_BNI.shape[-1], q_BKD.shape[-1]
        mod = Modulation(6, self.dtype, name="adaln")(Embedder(d, self.dtype, name="position")(features_1KF))
        norm = LayerNorm(affine=False, name="norm")
        h_BNI, h_BKD = norm(x_BNI), modulate(norm(q_BKD), mod[0], mod[1])
        lift = HeadProjection("kv", self.heads, False, self.dtype, width=d, name="image_to_query")
        project = HeadProjection("qkv", self.heads, False, self.dtype, name="query_project")
        image_k, image_v = lift(h_BNI)
        q, k, v = project(h_BKD)
        k, v = jnp.concatenate([image_k, k], axis=2), jnp.concatenate([image_v, v], axis=2)
        out = attend(q, k, v, spans.full(k.shape[2]))
        q_BKD = q_BKD + mod[2] * HeadMerge(d, self.dtype, name="query_output")(out)
        h_BKD = modulate(norm(q_BKD), mod[3], mod[4])
        q_BKD = q_BKD + mod[5] * MLP(self.mlp_ratio * d, self.dtype, name="query_mlp")(h_BKD)

        if self.last and not self.is_initializing():
            return x_BNI, q_BKD
        held = frozen if self.last else lambda module: module
        parts = held(HeadProjection)("qkv", self.image_heads, False, self.dtype, name="image_project")(h_BNI)
        out = attend(*parts, spans.full(x_BNI.shape[1]))
        y_BNI = x_BNI + held(HeadMerge)(width, self.dtype, name="image_output")(out)
        y_BNI = y_BNI + held(MLP)(self.mlp_ratio * width, self.dtype, name="image_mlp")(norm(y_BNI))
        return (x_BNI if self.last else y_BNI), q_BKD


class TokenJointBlock(nn.Module):
    """MMDiT block whose tokens are modulated by their position, patches by the time (released `time_adaln: pos_emb`).

    The carry is (tokens [B, K, D], patches [B, N, D]).

    Attributes:
      last: only the patches go on, and the tokens are modulated by the time. Two things stay that nothing reads: the
        embedder of positions, and the tokens' queries.
    """

    heads: int
    mlp_ratio: int = 4
    last: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, carry, features_1KF, condition_BD, visible):
        """visible: spans of all K + N rows; of the N patches' rows in the last block."""
        tokens_BKD, d = carry[0], carry[0].shape[-1]
        if self.last:
            token_condition = condition_BD
            if self.is_initializing():
                frozen(Embedder)(d, self.dtype, name="position")(features_1KF)
                frozen(HeadProjection)("q", self.heads, False, self.dtype, name="token_query")(tokens_BKD)
        else:
            token_condition = Embedder(d, self.dtype, name="position")(features_1KF)
        block = JointBlock(self.heads, self.mlp_ratio, False, self.last, self.dtype, name="joint")
        return block(carry, token_condition, condition_BD, visible)
