"""Vector quantization on the unit sphere with a codebook that follows its features by moving averages.

Cosine similarity, EMA counts and sums, codes re-normalised after every update and dead-code revival as in Selftok
(arXiv 2505.07538 §3.1; released `quantizer.py`). Two things differ from the usual implementations. All statistics are
additive, so that micro-batches and devices only have to add them up; and the features that replace dead codes are
picked by their row in the *global* batch, so that the choice depends neither on sharding nor on micro-batches.

What comes out is sqrt(code_dim) times a unit vector: its elements have unit size, and the commitment distance per
element is 2 (1 - cosine). A healthy one is about 0.2 for 512 codes in 8 dimensions; near 0, the encoder says the same
about every image and only revival keeps the codebook looking used. To compare with implementations that take the mean
squared distance of unit vectors (Selftok: weight 1.0), divide their weight by code_dim.

Selftok's own recipe is in the settings: `diversity`, `revive_from`, `revive_count`. Its Laplace smoothing of the counts
is left out: it scales a code's vector, and the vector is then brought to length 1.

Legend: B batch, K tokens, D code dimension, V codes, N tokens of a micro-batch in a row (B K).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.nn import code_entropy

_MAX_TABLE = 1 << 24  # similarities that a device holds at once
_TINY = 1e-12
_NORM_EPS = 1e-5


def at_least_f32(x):
    """x in fp32, or in its own type where that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def unit(x):
    """x scaled to length 1 along its last axis; a zero vector stays zero, with a zero gradient."""
    x = at_least_f32(x)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, _TINY))


def nearest(features_ND, codes_VD, max_table: int = _MAX_TABLE, examples: int = 1):
    """Index int32 [N] of the code with the largest inner product; ties go to the lowest index.

    No device holds more than max_table inner products at once. They are computed in fp32 on every kind of device: by
    default a TPU rounds both sides to bf16, which makes another code of one feature in a hundred.

    Args:
      examples: of which the features are; with a mesh each device has its part of them.
    """

    def search(rows_ND):
        return jnp.argmax(jnp.matmul(rows_ND, codes_VD.T, precision="highest"), axis=-1).astype(jnp.int32)

    n, v = features_ND.shape[0], codes_VD.shape[0]
    devices = meshes.batch_parts(examples)
    if n // devices * v <= max_table:
        return search(features_ND)
    rows = max(1, max_table // v) * devices
    chunks = -(-n // rows)
    padded = jnp.pad(features_ND, ((0, chunks * rows - n), (0, 0)))
    # A chunk takes every chunks-th row, so that it has rows of all devices.
    return jax.lax.map(search, padded.reshape(rows, chunks, -1).swapaxes(0, 1)).T.reshape(-1)[:n]


@dataclass(frozen=True)
class VectorQuantizer:
    """Settings of a codebook together with the number of tokens that one optimizer step sees.

    Attributes:
      config: settings.
      num_tokens: tokens per image, K.
      batch_size: images per optimizer step over all micro-batches and devices.
    """

    config: settings.Quantizer
    num_tokens: int
    batch_size: int

    def __post_init__(self):
        groups, (low, high) = self.config.entropy_groups, self.config.entropy_ramp
        if self.config.diversity and not 1 <= groups <= self.num_tokens:
            raise UserError(
                f"model.quantizer.entropy_groups: {groups} groups of {self.num_tokens} tokens leave some empty; "
                f"choose 1 to {self.num_tokens}"
            )
        if self.config.diversity and not low < high:
            raise UserError(f"model.quantizer.entropy_ramp: ({low}, {high}) must rise, like (0.1, 0.3)")

    @property
    def uniform_share(self) -> float:
        """Tokens per code and step if all codes were used alike."""
        return self.batch_size * self.num_tokens / self.config.codebook_size

    @property
    def normalizes(self) -> bool:
        return self.config.normalize_input == "batch"

    @property
    def tracks_usage(self) -> bool:
        """Whether the state has the running usage [K, V] of codes at each token position."""
        return bool(self.config.diversity) or self.config.revive_from == "perplexity"

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of those `diversity_terms` that belong to the loss."""
        return {"diversity": self.config.diversity} if self.config.diversity else {}

    @property
    def cross_example_terms(self) -> tuple[str, ...]:
        """What depends on the whole batch at once, see `tokenizers.base`."""
        norm = ("encoder batch norm",) if self.normalizes else ()
        return norm + (("code entropy",) if self.config.diversity else ())

    def init(self, rng):
        """State before the first step. Its random codes serve until `update` takes codes from the data.

        That is after one step, or with init = "when_varied" after the first step in which images differ enough: where
        an encoder starts by saying the same about all images (Selftok's does), one batch has but K distinct features.
        """
        v, d = self.config.codebook_size, self.config.code_dim
        extra = {
            "codes": unit(jax.random.normal(rng, (v, d))),
            "count": jnp.zeros((v,), jnp.float32),
            "sum": jnp.zeros((v, d), jnp.float32),
            "revived": jnp.zeros((), jnp.float32),
            "initialized": jnp.zeros((), jnp.bool_),
        }
        if self.normalizes:
            extra |= {
                "mean": jnp.zeros((self.num_tokens, d), jnp.float32),
                "var": jnp.ones((self.num_tokens, d), jnp.float32),
            }
        if self.tracks_usage:
            extra |= {
                "usage": jnp.full((self.num_tokens, v), 1 / v, jnp.float32),
                "usage_started": jnp.zeros((), jnp.bool_),
            }
        return extra

    def quantize(self, extra, z_BKD, slot_B, rng):
        """Training: quantized features with straight-through gradients, and what they contribute to the step.

        Args:
          extra: the state, see `init`.
          z_BKD: features of this micro-batch.
          slot_B: int32 rows of the global batch.
          rng: the step's key.

        Returns:
          (quantized [B, K, D], codes int32 [B, K], commitment [B, K], stats). The commitment distance carries gradients
          to the features only.
        """
        stats = {}
        z_BKD = at_least_f32(z_BKD)
        if self.normalizes:
            z_BKD, stats = _batch_normalize(z_BKD)
        b, k, d = z_BKD.shape
        z_BKD = unit(z_BKD)
        fixed_ND = jax.lax.stop_gradient(z_BKD).reshape(b * k, d)
        codes_N = nearest(fixed_ND, extra["codes"], examples=b)
        chosen_BKD = jax.lax.stop_gradient(extra["codes"])[codes_N].reshape(b, k, d).astype(z_BKD.dtype)
        v = self.config.codebook_size
        stats |= {
            "count": jax.ops.segment_sum(jnp.ones_like(fixed_ND[:, 0]), codes_N, v),
            "sum": (code_entropy.sorted_segment_sum if self.config.deterministic else jax.ops.segment_sum)(
                fixed_ND, codes_N, v
            ),
            "candidates": self._candidates(extra, fixed_ND.reshape(b, k, d), slot_B, rng),
        }
        if self.tracks_usage:
            stats["usage"] = code_entropy.usage_counts(codes_N.reshape(b, k), v)
        if self.config.init == "when_varied":
            stats |= {
                "image_sum": jnp.sum(fixed_ND.reshape(b, k, d), axis=0),
                "image_square": jnp.mean(jnp.sum(jnp.square(fixed_ND), axis=-1)) * b,
                "image_count": jnp.asarray(b, fixed_ND.dtype),
            }
        quantized_BKD = z_BKD + jax.lax.stop_gradient(chosen_BKD - z_BKD)
        commitment_BK = jnp.sum(jnp.square(z_BKD - chosen_BKD), axis=-1)  # = mean over elements at the output's scale
        return math.sqrt(d) * quantized_BKD, codes_N.reshape(b, k), commitment_BK, stats

    def diversity_terms(self, extra, z_BKD, stats):
        """Terms of the diversity loss for the whole global batch; none when it is off.

        Args:
          extra, z_BKD: as given to `quantize`.
          stats: from it.

        Returns:
          A dict of scalars, to be divided by 1: "diversity" is the loss without its weight in the settings,
          "code_entropy" and "diversity_weight" the factors it is made of. The weight is 0 while codes are still random.
        """
        if not self.config.diversity:
            return {}
        z_BKD = at_least_f32(z_BKD)
        if self.normalizes:
            z_BKD, _ = _batch_normalize(z_BKD)
        soft_KV = code_entropy.mean_probability(unit(z_BKD), jax.lax.stop_gradient(extra["codes"]))
        hard_KV = jax.lax.stop_gradient(self._next_usage(extra, stats))
        p_KV = code_entropy.RUNNING_SHARE * hard_KV + (1 - code_entropy.RUNNING_SHARE) * soft_KV
        loss, entropy, weight = code_entropy.diversity(p_KV, self.config.entropy_groups, self.config.entropy_ramp)
        on = extra["initialized"]
        terms = {"diversity": jnp.where(on, loss, 0), "diversity_weight": jnp.where(on, weight, 0)}
        return terms | {"code_entropy": entropy}

    def _next_usage(self, extra, stats):
        # What falls on random codes says nothing about those that replace them.
        usage_KV = code_entropy.next_usage(extra["usage"], stats["usage"], extra["usage_started"])
        return jnp.where(extra["initialized"], usage_KV, extra["usage"])

    def _candidates(self, extra, z_BKD, slot_B, rng):
        """A feature for each code [V, D]: row r_v of the global batch's B K, zeros where another part owns it."""
        row_V = self._spread_rows(rng)
        if self.config.revive_from == "perplexity":
            row_V = jnp.where(extra["initialized"], self._weighted_rows(extra, rng), row_V)
        local_of_slot = (
            jnp.full((self.batch_size,), -1, jnp.int32).at[slot_B].set(jnp.arange(z_BKD.shape[0], dtype=jnp.int32))
        )
        local_V = local_of_slot[row_V // self.num_tokens]
        picked_VD = z_BKD[jnp.maximum(local_V, 0), row_V % self.num_tokens]
        return jnp.where((local_V >= 0)[:, None], picked_VD, 0)

    def _weighted_rows(self, extra, rng):
        """Rows [V] of the global batch, drawn with replacement: any image, positions with few codes in use more often.

        The running usage from before the step decides, which does not depend on how the batch was cut.
        """
        image_key, position_key = jax.random.split(jax.random.fold_in(rng, 1))
        k, v = self.num_tokens, self.config.codebook_size
        position_V = jax.random.choice(position_key, k, (v,), p=code_entropy.position_probability(extra["usage"]))
        return k * jax.random.randint(image_key, (v,), 0, self.batch_size) + position_V

    def _spread_rows(self, rng):
        """Rows [V] of the global batch."""
        rows, v = self.batch_size * self.num_tokens, self.config.codebook_size
        bounds = np.arange(v + 1, dtype=np.int64) * rows // v
        width = np.diff(bounds).astype(np.int32)
        # One row from each of V equal slices, rotated by a random offset: no row twice while there are enough of them.
        share = jax.random.uniform(rng, (v + 1,), jnp.float32)
        within_V = jnp.minimum((share[:v] * width).astype(jnp.int32), np.maximum(width - 1, 0))
        offset = jnp.minimum((share[v] * rows).astype(jnp.int32), rows - 1)
        row_V = bounds[:-1].astype(np.int32) + within_V + offset
        return jnp.where(row_V >= rows, row_V - rows, row_V)

    def update(self, extra, stats):
        """The state after an optimizer step. stats: summed over the whole global batch."""
        decay, first = self.config.decay, ~extra["initialized"]
        count = decay * extra["count"] + (1 - decay) * stats["count"]
        total = decay * extra["sum"] + (1 - decay) * stats["sum"]
        threshold = self.config.revive_below * self.uniform_share
        dead = (count < threshold) | first
        # A revived code starts as one with the uniform usage, so that it has some steps to prove itself. Selftok's
        # starts at the threshold and has to be hit at once.
        fresh = self.uniform_share
        if self.config.revive_count == "threshold":
            fresh = jnp.where(first, fresh, threshold)
        count = jnp.where(dead, fresh, count)
        total = jnp.where(dead[:, None], fresh * stats["candidates"], total)
        length = jnp.linalg.norm(total, axis=-1, keepdims=True)
        new = {
            "codes": jnp.where(length > _TINY, total / jnp.maximum(length, _TINY), extra["codes"]),
            "count": count,
            "sum": total,
            "revived": jnp.sum(dead & ~first).astype(extra["revived"].dtype),
            "initialized": jnp.ones_like(extra["initialized"]),
        }
        if self.config.init == "when_varied":
            ready = extra["initialized"] | (_variance(stats) > self.config.init_variance)
            new = {name: jnp.where(ready, value, extra[name]) for name, value in new.items()}
        if self.tracks_usage:
            new["usage"] = self._next_usage(extra, stats)
            new["usage_started"] = extra["initialized"]
        if self.normalizes:
            mean = stats["norm_sum"] / stats["norm_count"]
            var = jnp.maximum(stats["norm_square"] / stats["norm_count"] - jnp.square(mean), 0)
            momentum = jnp.where(first, 1.0, self.config.norm_momentum)
            new["mean"] = extra["mean"] + momentum * (mean - extra["mean"])
            new["var"] = extra["var"] + momentum * (var - extra["var"])
        return jax.tree.map(lambda old, value: value.astype(old.dtype), extra, new)

    def encode(self, extra, z_BKD):
        """Evaluation: codes int32 [B, K]. Each image alone decides its codes (running statistics)."""
        z_BKD = at_least_f32(z_BKD)
        if self.normalizes:
            z_BKD = (z_BKD - extra["mean"]) * jax.lax.rsqrt(extra["var"] + _NORM_EPS)
        b, k, d = z_BKD.shape
        return nearest(unit(z_BKD).reshape(b * k, d), extra["codes"], examples=b).reshape(b, k)

    def lookup(self, extra, codes_BK):
        """Vectors [B, K, D] of codes, at the scale that `quantize` gives."""
        return math.sqrt(self.config.code_dim) * extra["codes"][codes_BK]

    def metrics(self, extra):
        """Perplexity of the average usage and the codes moved at the last step."""
        share = extra["count"] / jnp.maximum(jnp.sum(extra["count"]), _TINY)
        entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, _TINY)))
        return {"codebook_perplexity": jnp.exp(entropy), "codes_revived": extra["revived"]}


def _variance(stats):
    """Variance of unit features between images, summed over dimensions and averaged over tokens: 0 to 1."""
    mean_KD = stats["image_sum"] / stats["image_count"]
    return stats["image_square"] / stats["image_count"] - jnp.mean(jnp.sum(jnp.square(mean_KD), axis=-1))


def _batch_normalize(z_BKD):
    """Zero mean and unit variance over the batch for each token and dimension, and the sums behind it."""
    mean_KD = jnp.mean(z_BKD, axis=0)
    centred_BKD = z_BKD - mean_KD
    var_KD = jnp.mean(jnp.square(centred_BKD), axis=0)
    fixed_BKD = jax.lax.stop_gradient(z_BKD)
    stats = {
        "norm_sum": jnp.sum(fixed_BKD, axis=0),
        "norm_square": jnp.sum(jnp.square(fixed_BKD), axis=0),
        "norm_count": jnp.asarray(z_BKD.shape[0], z_BKD.dtype),
    }
    return centred_BKD * jax.lax.rsqrt(var_KD + _NORM_EPS), stats
