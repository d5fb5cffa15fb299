"""SEED's codebook in either recipe, behind one interface over parameters and `extra`.

Legend: B batch, K tokens, D code dimension, V codes.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn import quantize_l2
from ddt_jax.nn.quantize import VectorQuantizer

CODEBOOK = "codebook"  # its part of `extra`, and of the parameters where gradients move it


class Codes(abc.ABC):
    """A codebook.

    Attributes:
      cross_example_terms: see `tokenizers.base`.
    """

    cross_example_terms: tuple[str, ...] = ()

    @abc.abstractmethod
    def init(self, rng) -> tuple[dict, dict]:
        """What it adds to (parameters, boxed, and `extra`)."""

    @abc.abstractmethod
    def quantize(self, params, extra, z_BKD, slot_B, rng) -> tuple[Any, Any, Any, dict]:
        """(quantized [B, K, D] with straight-through gradients, the sum of its loss, over how many, stats)."""

    @abc.abstractmethod
    def encode(self, params, extra, z_BKD):
        """Codes int32 [B, K]."""

    @abc.abstractmethod
    def lookup(self, params, extra, codes_BK):
        """Vectors [B, K, D], at the scale that `quantize` gives."""

    @abc.abstractmethod
    def update(self, extra, stats) -> dict:
        """`extra` after a step. stats: summed over the global batch."""

    @abc.abstractmethod
    def metrics(self, extra) -> dict:
        """Scalars for the log."""


class Averaged(Codes):
    """Cosine, moving averages, revival (`nn/quantize.py`)."""

    def __init__(self, config: settings.Quantizer, num_tokens: int, batch_size: int):
        self._quantizer = VectorQuantizer(config, num_tokens, batch_size)
        self.cross_example_terms = self._quantizer.cross_example_terms

    def init(self, rng):
        return {}, {CODEBOOK: self._quantizer.init(rng)}

    def quantize(self, params, extra, z_BKD, slot_B, rng):
        quantized, _, commitment_BK, stats = self._quantizer.quantize(extra[CODEBOOK], z_BKD, slot_B, rng)
        return quantized, jnp.sum(commitment_BK), jnp.float32(commitment_BK.size), {CODEBOOK: stats}

    def encode(self, params, extra, z_BKD):
        return self._quantizer.encode(extra[CODEBOOK], z_BKD)

    def lookup(self, params, extra, codes_BK):
        return self._quantizer.lookup(extra[CODEBOOK], codes_BK)

    def update(self, extra, stats):
        return extra | {CODEBOOK: self._quantizer.update(extra[CODEBOOK], stats[CODEBOOK])}

    def metrics(self, extra):
        return self._quantizer.metrics(extra[CODEBOOK])


class Published(Codes):
    """As SEED published it (`nn/quantize_l2.py`); `extra` only counts which codes are used."""

    def __init__(self, config: settings.Quantizer):
        self._config = config
        self._module = quantize_l2.Codebook(config.codebook_size, config.code_dim)

    def init(self, rng):
        return {CODEBOOK: self._module.init(rng)["params"]}, {
            CODEBOOK: {"count": jnp.zeros((self._config.codebook_size,), jnp.float32)}
        }

    def quantize(self, params, extra, z_BKD, slot_B, rng):
        quantized, codes_BK, loss = quantize_l2.quantize(self._vectors(params), z_BKD)
        v, codes_N = self._config.codebook_size, codes_BK.reshape(-1)
        stats = {"count": jax.ops.segment_sum(jnp.ones(codes_N.shape, jnp.float32), codes_N, v)}
        return quantized, jnp.sum(loss), jnp.float32(loss.size), {CODEBOOK: stats}

    def encode(self, params, extra, z_BKD):
        return quantize_l2.encode(self._vectors(params), z_BKD)

    def lookup(self, params, extra, codes_BK):
        return self._vectors(params)[codes_BK]

    def update(self, extra, stats):
        decay = self._config.decay
        count = decay * extra[CODEBOOK]["count"] + (1 - decay) * stats[CODEBOOK]["count"]
        return extra | {CODEBOOK: {"count": count}}

    def metrics(self, extra):
        count = extra[CODEBOOK]["count"]
        share = count / jnp.maximum(jnp.sum(count), 1e-12)
        return {"codebook_perplexity": jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12))))}

    def _vectors(self, params):
        return self._module.apply({"params": params[CODEBOOK]})


def make_codes(c: settings.SEED, batch_size: int) -> Codes:
    """The recipe that the settings name."""
    return Published(c.quantizer) if c.recipe == "l2-legacy" else Averaged(c.quantizer, c.num_tokens, batch_size)
