"""The decoder-only transformer under every way in which an image enters a sequence.

Embeddings go in and hidden states come out. So an image mode can put patches among the rows that went through `embed`,
and logits are made of those rows only that have a text target. Positions are given, never counted: copies of an image
at a document's tail carry the positions of their clean twins.

Legend: B batch, S sequence, D width, V vocabulary, T slots of the cache.
"""

import functools
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.mesh import constrain_positions, look_up
from ddt_jax.nn import blocks, kv_cache, lora, rope, spans
from ddt_jax.nn.cross_entropy import cross_entropy
from ddt_jax.nn.decoder import DecoderBlock, head_dim
from ddt_jax.nn.layers import RMSNorm, compute_dtype
from ddt_jax.nn.params import declare

_LLAMA31 = settings.RopeScaling(kind="llama3")
# Sizes of published models, with their own vocabularies.
PRESETS = {
    "tiny": settings.Transformer(),
    **{
        # Transfusion (arXiv 2408.11039) table 2 gives depth, width and heads; the MLP is LLaMA's 8/3 of the width,
        # rounded up to a multiple of 256.
        f"transfusion_{name}": settings.Transformer(
            vocab_size=32_000,
            width=width,
            depth=depth,
            heads=heads,
            kv_heads=heads,
            mlp_width=-(-8 * width // 3 // 256) * 256,
            rope_theta=10_000.0,
        )
        for name, depth, width, heads in (
            ("160m", 16, 768, 12),
            ("370m", 24, 1024, 16),
            ("760m", 24, 1536, 24),
            ("1.4b", 24, 2048, 16),
            ("7b", 32, 4096, 32),
        )
    },
    "llama3.2_1b": settings.Transformer(
        vocab_size=128_256,
        width=2048,
        depth=16,
        heads=32,
        kv_heads=8,
        mlp_width=8192,
        tied_head=True,
        rope_scaling=replace(_LLAMA31, factor=32.0),
    ),
    "llama3_8b": settings.Transformer(vocab_size=128_256, width=4096, depth=32, heads=32, kv_heads=8, mlp_width=14_336),
    "llama3.1_8b": settings.Transformer(
        vocab_size=128_256, width=4096, depth=32, heads=32, kv_heads=8, mlp_width=14_336, rope_scaling=_LLAMA31
    ),
}


def preset(name: str, **changes) -> settings.Transformer:
    """A published size, with some settings changed: `preset("llama3_8b", vocab_size=193_920, remat="full")`."""
    if name not in PRESETS:
        raise UserError(f"transformer: there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


def check(c: settings.Transformer) -> None:
    """Raises UserError for sizes that do not go together."""
    if not c.head_dim and c.width % c.heads:
        raise UserError(f"transformer: width={c.width} does not divide by heads={c.heads}; set head_dim")
    if c.heads % c.kv_heads:
        raise UserError(f"transformer: heads={c.heads} must be a multiple of kv_heads={c.kv_heads}")
    if head_dim(c) % 2:
        raise UserError(f"transformer: the head dimension {head_dim(c)} is odd; rotary positions turn pairs")
    if not 0 <= c.dropout < 1:
        raise UserError(f"transformer: dropout={c.dropout} must be at least 0 and below 1")
    if not 0 <= c.lora.dropout < 1:
        raise UserError(f"transformer: lora.dropout={c.lora.dropout} must be at least 0 and below 1")
    if c.tied_head and "head" in c.lora.whole:
        raise UserError(
            "transformer: lora.whole has head, which tied_head=True makes the table of embeddings; take embed"
        )


class Backbone(nn.Module):
    """See the module's docstring. `init` makes its parameters."""

    config: settings.Transformer

    def setup(self):
        c = self.config
        table = declare(nn.initializers.normal(0.02), ("vocab", "embed"), decay=False)
        self.table = self.param("embed", table, (c.vocab_size, c.width))
        if not c.tied_head:
            head = declare(nn.initializers.normal(0.02), ("vocab", "embed"), reads=(-1,), fixed_spread=True)
            self.own_head = self.param("head", head, (c.vocab_size, c.width))
        self.norm = RMSNorm(axis="embed", epsilon=c.norm_epsilon)
        make = functools.partial(DecoderBlock, c, compute_dtype(c.dtype))
        self.blocks = blocks.Stack(make, c.depth, c.scan_layers, c.remat)
        self.frequencies = rope.frequencies(head_dim(c), c.rope_theta, c.rope_scaling)

    def embed(self, ids_BS):
        """Rows of the table, [B, S, D] in the type of activations. ids_BS: int32 in [0, V)."""
        table = jnp.asarray(self.table)  # NumPy cannot be indexed by what is traced
        dtype = compute_dtype(self.config.dtype) or table.dtype
        return constrain_positions(look_up(table, ids_BS, ("vocab", "embed"), dtype))

    def __call__(self, x_BSD, positions_BS, visible, cache=None, dropout_keys_B=None, rows_BR=None):
        """Hidden states behind the last norm.

        Args:
          x_BSD: embeddings.
          positions_BS: int32, for rotary positions.
          visible: spans, which rows each row sees; with a cache, which slots. The new rows are behind `cache.length`.
          cache: kv_cache.Cache, or None.
          dropout_keys_B: a key for each example, by its number in the global batch; None: no dropout.
          rows_BR: int32, the rows that are wanted, of which the last block then makes no others unless it is one of a
            scan's; None: all.

        Returns:
          (hidden [B, S, D] or, of wanted rows, [B, R, D]; the cache with all rows in it, or None).
        """
        rotation = rope.rotation(positions_BS, self.frequencies)
        first = jnp.int32(0) if self.config.scan_layers else 0
        size, scanned = x_BSD.shape[1], self.config.scan_layers
        last = () if rows_BR is None or scanned else (rows_BR,)
        x_BSD, _, cache = self.blocks((x_BSD, first, cache), rotation, visible, dropout_keys_B, last=last)
        if rows_BR is not None and scanned:
            x_BSD = jnp.take_along_axis(x_BSD, rows_BR[..., None], axis=1)
        return self.norm(x_BSD), None if cache is None else cache.advanced(size)

    def head(self):
        """[V, D]."""
        return self.table if self.config.tied_head else self.own_head

    def logits(self, h, more=None):
        """At least fp32 [..., V] of hidden states [..., D]: for the few rows of a decoder, never for a loss.

        Args:
          more: (hidden states [..., C], table [V, C]), further columns; None: there are none.
        """
        c, wide = self.config, jnp.promote_types(h.dtype, jnp.float32)
        h, head = _wider(h, self.head(), more)
        logits = jnp.matmul(h, head.astype(h.dtype).T, preferred_element_type=wide)
        return c.logit_soft_cap * jnp.tanh(logits / c.logit_soft_cap) if c.logit_soft_cap else logits

    def loss(self, h_BRD, targets_BR, weights_BR, more=None):
        """See `cross_entropy`: next-token loss of gathered rows, with the soft-cap and z-loss of the settings. more: as
        for `logits`.
        """
        c = self.config
        h_BRD, head = _wider(h_BRD, self.head(), more)
        options = {"z_loss": c.z_loss, "soft_cap": c.logit_soft_cap, "chunk": c.loss_chunk}
        return cross_entropy(h_BRD, head, targets_BR, weights_BR, **options)

    def everything(self, ids_BS, positions_BS, visible):
        """Logits of every row; declares all parameters."""
        return self.logits(self(self.embed(ids_BS), positions_BS, visible)[0])


def _wider(h, head, more):
    """Hidden states and head with further columns."""
    if more is None:
        return h, head
    return tuple(jnp.concatenate([x, y.astype(x.dtype)], axis=-1) for x, y in zip((h, head), more, strict=True))


def init(c: settings.Transformer, rng) -> Any:
    """Fresh parameters, a tree of `params.Box`."""
    check(c)
    ids = jnp.zeros((1, 2), jnp.int32)
    return Backbone(c).init(rng, ids, ids, spans.causal(2), method="everything")["params"]


def empty_cache(c: settings.Transformer, batch: int, slots: int) -> kv_cache.Cache:
    dtype = compute_dtype(c.dtype) or jnp.float32
    return kv_cache.empty(c.depth, (batch, c.kv_heads, slots, head_dim(c)), dtype, stacked=c.scan_layers)


def decoder(c: settings.Transformer) -> settings.Transformer:
    """Settings for generation: unrolled, which a loop over tokens runs in place. A step of it has one query, which the
    kernel that attention="splash" names does not take.
    """
    attention = "auto" if c.attention == "splash" else c.attention
    return replace(c, scan_layers=False, remat="none", dropout=0.0, attention=attention, lora=settings.LoRA())


def for_decoding(c: settings.Transformer, params, *, computed: bool = False) -> tuple[settings.Transformer, Any]:
    """Settings and parameters (plain arrays) of `decoder`. computed: they are those of `as_computed`."""
    if c.lora.rank:
        params = lora.merge(params, c.lora)  # before they are rounded: most updates are less than a weight's last bit
    if computed:
        params = as_computed(c, params)
    return decoder(c), blocks.unrolled(params) if c.scan_layers else params


def as_computed(c: settings.Transformer, params):
    """Parameters in the type that they are computed with, where that is another one than they are kept in: what a layer
    would make of them at every step, once. Norms and biases, which are small and partly kept exact, stay.

    Leaves may be ShapeDtypeStructs.
    """
    dtype = compute_dtype(c.dtype)

    def cast(path, x):
        if dtype is None or path[-1].key in ("scale", "bias"):
            return x
        return x.update(dtype=dtype) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x, dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def count_parameters(c: settings.Transformer) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init(c, jax.random.key(0)))))
