"""How evenly codes are used at each token position: the diversity loss of Selftok and what depends on the same usage.

Released `quantizer.py` of Selftok (arXiv 2505.07538 §3.1), with its constants. Two choices are ours: the running usage
starts uniform, so that what its entropy is taken of is a distribution from the first step on, and the usage in the
loss contains the current batch already. A table of tokens x codes never exists: probabilities are averaged over the
batch in pieces, and the backward pass computes each piece again.

Legend: B batch, K tokens, D code dimension, V codes, G groups of neighbouring tokens, N rows in one sequence.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import mesh as meshes

SHARPNESS = 10.0  # softmax over codes of 10 cos
RUNNING_SHARE = 0.8  # running one-hot usage against the batch's soft probabilities, which alone carry gradients
USAGE_DECAY, FIRST_DECAY = 0.99, 0.3
MAX_WEIGHT = 0.5
POSITION_SHARPNESS = 10.0
_TINY = 1e-30  # below the least softmax of cosines: exp(-20) / V


def mean_probability(z_BKD, codes_VD, max_table: int = 1 << 24):
    """Batch mean of softmax(10 cos) over codes, [K, V]; gradients to both arguments.

    Args:
      z_BKD: unit features.
      codes_VD: unit codes.
      max_table: similarities that a device holds at once, forwards and backwards (but at least one image and token).
    """
    b, k, d = z_BKD.shape
    v = codes_VD.shape[0]
    own = b // meshes.batch_parts(b)  # images of a device
    # Cut along tokens first, then along images so that each piece has rows of all devices: no row has to move.
    parts = next(p for p in range(1, own + 1) if own % p == 0 and (own // p * v <= max_table or p == own))
    width = next(w for w in range(k, 0, -1) if k % w == 0 and (own * w * v <= max_table or w == 1))
    pieces = z_BKD.reshape(b // parts, parts, k // width, width, d).transpose(2, 1, 0, 3, 4)

    def add(total_wV, z_bwD):
        logits = SHARPNESS * jnp.einsum("bwd,vd->bwv", z_bwD, codes_VD, precision="highest")
        return total_wV + jnp.sum(jax.nn.softmax(logits, axis=-1), axis=0), None

    def tokens(z_PbwD):
        zeros_wV = jnp.zeros((width, v), jnp.result_type(z_BKD, codes_VD))
        return jax.lax.scan(jax.checkpoint(add, prevent_cse=False), zeros_wV, z_PbwD)[0]

    return jax.lax.map(tokens, pieces).reshape(k, v) / b


def entropy(p):
    """Entropy in nats along the last axis."""
    return -jnp.sum(p * jnp.log(jnp.maximum(p, _TINY)), axis=-1)


def usage_counts(codes_BK, num_codes: int):
    """How often each token position took each code, float32 [K, V]. Sums of ones: exact in any order."""
    k = codes_BK.shape[1]
    return jnp.zeros((k, num_codes), jnp.float32).at[jnp.arange(k), codes_BK].add(1)


def next_usage(usage_KV, counts_KV, started):
    """Running usage after a batch with these counts; the first batch (not started) has weight 0.7, later ones 0.01."""
    share_KV = counts_KV / jnp.maximum(jnp.sum(counts_KV, axis=-1, keepdims=True), 1)
    decay = jnp.where(started, USAGE_DECAY, FIRST_DECAY)
    return decay * usage_KV + (1 - decay) * share_KV


def diversity(p_KV, groups: int, ramp: tuple[float, float]):
    """(loss, entropy, weight) of usage probabilities; loss = -weight · entropy, scalars.

    The entropy is the mean of H_tok, over token positions, and H_grp, over `groups` runs of neighbouring positions. Its
    weight is 0.5 while the mean perplexity per position is below ramp[0] of the codebook and falls to 0 at ramp[1].
    """
    k, v = p_KV.shape
    entropy_K = entropy(p_KV)
    member_GK = np.arange(groups)[:, None] == np.arange(k) * groups // k
    mean_GK = jnp.asarray(member_GK / member_GK.sum(1, keepdims=True), p_KV.dtype)
    grouped_GV = jnp.matmul(mean_GK, p_KV, precision="highest")
    value = (jnp.mean(entropy_K) + jnp.mean(entropy(grouped_GV))) / 2
    weight = ramp_weight(jnp.mean(jnp.exp(jax.lax.stop_gradient(entropy_K))) / v, ramp)
    return -weight * value, value, weight


def ramp_weight(fraction, ramp: tuple[float, float]):
    """0.5 below ramp[0], linear to 0 at ramp[1], 0 above."""
    low, high = ramp
    return MAX_WEIGHT * jnp.clip((high - fraction) / (high - low), 0, 1)


def position_probability(usage_KV):
    """Probability [K] that the feature for a dead code comes from each position: more where few codes are in use."""
    inverse_K = jnp.exp(-entropy(usage_KV))
    return jax.nn.softmax(POSITION_SHARPNESS * inverse_K / jnp.max(inverse_K))


def sorted_segment_sum(rows_ND, segment_N, num_segments: int):
    """`jax.ops.segment_sum` without atomic additions, whose order changes from run to run on GPUs."""
    order_N = jnp.argsort(segment_N, stable=True)
    segment_N, rows_ND = segment_N[order_N], rows_ND[order_N]

    def combine(left, right):
        return right[0], right[1] + jnp.where((left[0] == right[0])[:, None], left[1], 0)

    _, running_ND = jax.lax.associative_scan(combine, (segment_N, rows_ND))
    index = jnp.arange(num_segments, dtype=segment_N.dtype)
    last = jnp.maximum(jnp.searchsorted(segment_N, index, side="right") - 1, 0)
    return jnp.where((segment_N[last] == index)[:, None], running_ND[last], 0)
