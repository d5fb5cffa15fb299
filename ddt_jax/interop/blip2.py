"""The Q-Former of BLIP-2 in the names of Hugging Face, and in those of SEED's published checkpoints, in and out.

What reads text in their weights (its embeddings, the MLP of its rows) has no place here and is left alone.
"""

import jax
import numpy as np

from ddt_jax import settings
from ddt_jax.interop import hf_layers
from ddt_jax.io.weights_folder import Lazy
from ddt_jax.nn.params import split
from ddt_jax.nn.qformer import QFormer
from ddt_jax.training import weights

NAMES = ("huggingface", "seed")
# Hugging Face's names → those of SEED's checkpoints (and LAVIS's), one step of a path each.
_SEED = {
    "qformer.layernorm.": "Qformer.bert.embeddings.LayerNorm.",
    "qformer.encoder.": "Qformer.bert.encoder.",
    "attention.attention.": "attention.self.",
}


def from_arrays(
    found: dict[str, Lazy], c: settings.QFormer, num_queries: int, memory_width: int, source: str = "blip2"
):
    """The parameters of `nn.qformer.QFormer`, NumPy float32.

    Args:
      found: arrays by their names, of either kind.
      memory_width: of what its cross-attention sees.
      source: what an error calls them.

    Raises:
      UserError: naming what is missing or has another size.
    """
    if any(name.startswith("Qformer.") for name in found):
        found = {_to_hugging_face(name): array for name, array in found.items()}
    abstract = abstract_params(c, num_queries, memory_width)
    shapes = {name: leaf.shape for name, leaf in weights.unrolled_arrays(abstract).items()}
    return weights.restore(hf_layers.to_ours(table(c), shapes, found, source), abstract)


def to_arrays(params, c: settings.QFormer, names: str = "huggingface") -> dict[str, np.ndarray]:
    """Parameters as arrays by their names. names: one of NAMES; "seed": those of its checkpoints."""
    arrays = hf_layers.to_theirs(table(c), weights.unrolled_arrays(params))
    arrays["query_tokens"] = arrays["query_tokens"][None]
    return arrays if names == "huggingface" else {_renamed(name, _SEED): array for name, array in arrays.items()}


def abstract_params(c: settings.QFormer, num_queries: int, memory_width: int):
    """The tree of `nn.qformer.QFormer` as ShapeDtypeStructs."""
    memory = jax.ShapeDtypeStruct((1, 1, memory_width), "float32")
    return split(jax.eval_shape(QFormer(c, num_queries, True).init, jax.random.key(0), memory)["params"])[0]


def table(c: settings.QFormer) -> hf_layers.Table:
    """Our arrays → theirs. Only norms behind the sums, as published, have places for all of theirs."""
    rows = {"queries": ("query_tokens", "plain")} | hf_layers.norm("embed_norm", "qformer.layernorm")
    rows |= hf_layers.norm("norm", "qformer.norm")  # of norm="pre", which they don't know
    groups = c.depth // c.cross_every
    for i in range(c.depth):
        group, place = divmod(i, c.cross_every)
        ours = f"groups/block_{group}" if group < groups else "last_group"
        ours, theirs = f"{ours}/layer_{place}", f"qformer.encoder.layer.{i}"
        for our_part, their_part in {"attention": "attention", "cross_attention": "crossattention"}.items():
            for role in ("query", "key", "value"):
                rows |= hf_layers.layer(f"{ours}/{our_part}/{role}", f"{theirs}.{their_part}.attention.{role}", "heads")
            rows |= hf_layers.layer(f"{ours}/{our_part}/output", f"{theirs}.{their_part}.output.dense")
            rows |= hf_layers.norm(f"{ours}/{our_part}_norm", f"{theirs}.{their_part}.output.LayerNorm")
        rows |= hf_layers.layer(f"{ours}/mlp/up", f"{theirs}.intermediate_query.dense")
        rows |= hf_layers.layer(f"{ours}/mlp/down", f"{theirs}.output_query.dense")
        rows |= hf_layers.norm(f"{ours}/mlp_norm", f"{theirs}.output_query.LayerNorm")
    return rows


def _to_hugging_face(name: str) -> str:
    return _renamed(name, {theirs: ours for ours, theirs in _SEED.items()})


def _renamed(name: str, names: dict[str, str]) -> str:
    for before, after in names.items():
        name = name.replace(before, after)
    return name
