"""Attention over a mesh: each device has its examples and heads, and of a row whose positions lie over `context` its
queries.

Keys and values of a row are gathered over that axis, in each layer anew, so that a device holds those of one layer at a
time; their gradients are added up and scattered. Queries, and all that a layer does beside attention, stay where they
are. Heads of keys and values are few, which makes this the cheap side to move (MaxText's context parallelism, LLaMA-3,
arXiv 2407.21783 §3.3.2).

Legend: B batch, H heads, G heads of keys and values, S queries, T keys, E head dimension.
"""

import jax
from jax.sharding import PartitionSpec

from ddt_jax import mesh as meshes
from ddt_jax.nn.attention_chunked import SAVED


def spread(run, q_BHSE, k_BGTE, v_BGTE, rows, planned=None):
    """run(q, k, v, rows, planned) on every device of the mesh that is set, if it has several: [B, H, S, E].

    Args:
      rows: tree of what belongs to queries, arrays [B or 1, S or 1].
      planned: tree of what a kernel plans ahead for blocks of queries, arrays [1, N, ...], N a multiple of the parts of
        a row.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(q_BHSE, k_BGTE, v_BGTE, rows, planned)
    batch, context = meshes.batch_axes(q_BHSE.shape[0], mesh), meshes.position_axis(q_BHSE.shape[2], k_BGTE.shape[2])
    heads = meshes.RULES["kv_heads"]
    heads = heads if k_BGTE.shape[1] % mesh.shape[heads] == 0 else None

    def gathered(q, k, v, rows, planned):
        k, v = (jax.lax.all_gather(x, context, axis=2, tiled=True) for x in (k, v))
        return run(q, k, v, rows, planned)

    local = run
    if context:  # what was gathered is not kept for the gradient, but gathered again
        kept = jax.checkpoint_policies.save_only_these_names(SAVED)
        local = jax.checkpoint(gathered, policy=kept, prevent_cse=False)

    def of_row(x):
        return PartitionSpec(batch if x.shape[0] > 1 else None, context if x.shape[1] > 1 else None)

    by_head = PartitionSpec(batch, heads, context)
    specs = jax.tree.map(of_row, rows), jax.tree.map(lambda _: PartitionSpec(None, context), planned)
    spread = jax.shard_map(local, in_specs=(by_head, by_head, by_head, *specs), out_specs=by_head, check_vma=False)
    return spread(q_BHSE, k_BGTE, v_BGTE, rows, planned)
