"""The Q-Former of BLIP-2 (arXiv 2301.12597), causal as in SEED (arXiv 2307.08041 §2.2): learned queries that attend to
each other and, in every `cross_every`-th layer, to the rows of an image.

Whether a query sees the ones behind it is said by `causal`, never by how many there are. There is no dropout: what a
frozen one gives is the same in every step. Text has a tower of its own (`nn/text_tower.py`), so the branch that reads
text in the published weights is left out.

Legend: B batch, N queries, D width, T rows of the memory, M its width.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import blocks, embeddings, layers, multihead, spans


def check(c: settings.QFormer, name: str) -> None:
    """Raises UserError for sizes that do not go together. name: of the settings."""
    if c.width % c.heads:
        raise UserError(f"config: {name}.width={c.width} is not a multiple of {name}.heads={c.heads}")
    if c.depth < 1 or c.cross_every < 1:
        raise UserError(f"config: {name}.depth={c.depth} and {name}.cross_every={c.cross_every} must be at least 1")


class Layer(nn.Module):
    """Attention among queries, to the memory if `cross`, and an MLP, each with its norm before or behind the sum."""

    config: settings.QFormer
    cross: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BND, memory_BTM, own, of_memory):
        """own, of_memory: spans over queries and over the memory."""
        c = self.config

        def add(x, name, part):
            norm = layers.LayerNorm(epsilon=c.norm_epsilon, name=f"{name}_norm")
            return x + part(norm(x)) if c.norm == "pre" else norm(x + part(x))

        attention = multihead.Attention(c.heads, dtype=self.dtype, name="attention")
        x_BND = add(x_BND, "attention", lambda x: attention(x, own))
        if self.cross:
            to_memory = multihead.Attention(c.heads, dtype=self.dtype, name="cross_attention")
            x_BND = add(x_BND, "cross_attention", lambda x: to_memory(x, of_memory, memory_BTM))
        return add(x_BND, "mlp", multihead.MLP(c.mlp_width, dtype=self.dtype, name="mlp"))


class Group(nn.Module):
    """A layer that sees the memory and those behind it that do not: what a deep Q-Former repeats."""

    config: settings.QFormer
    size: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x_BND, *rest):
        for i in range(self.size):
            x_BND = Layer(self.config, i == 0, self.dtype, name=f"layer_{i}")(x_BND, *rest)
        return x_BND


class QFormer(nn.Module):
    """Rows of a memory → [B, N, D].

    Attributes:
      num_queries: N.
      causal: query i sees queries 0 to i, and all of the memory.
    """

    config: settings.QFormer
    num_queries: int
    causal: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, memory_BTM, of_memory=None, queries_BND=None):
        """of_memory: which of its rows are seen; None: all. queries_BND: in place of the learned ones."""
        c = self.config
        learned_ND = embeddings.learned(self, "queries", self.num_queries, c.width)
        if queries_BND is None:
            queries_BND = jnp.broadcast_to(learned_ND, (len(memory_BTM), *learned_ND.shape))
        queries_BND = queries_BND.astype(self.dtype or queries_BND.dtype)
        n = queries_BND.shape[1]
        own = spans.causal(n) if self.causal else spans.full(n)
        rest = (memory_BTM, own, spans.full(memory_BTM.shape[1]) if of_memory is None else of_memory)
        x_BND = layers.LayerNorm(epsilon=c.norm_epsilon, name="embed_norm")(queries_BND)
        groups, left = divmod(c.depth, c.cross_every)
        make = functools.partial(Group, c, c.cross_every, self.dtype)
        x_BND = blocks.Stack(make, groups, c.scan_layers, c.remat, name="groups")(x_BND, *rest)
        if left:
            x_BND = Group(c, left, self.dtype, name="last_group")(x_BND, *rest)
        return x_BND if c.norm == "post" else layers.LayerNorm(epsilon=c.norm_epsilon, name="norm")(x_BND)
