"""The codebook between an encoder and what decodes its codes (`nn/quantize.py`)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    code_dim: int = 8
    codebook_size: int = 512
    decay: float = 0.95
    revive_below: float = 0.03  # share of the uniform usage below which a code is moved to a current feature; 0 = never
    commitment: float = 0.002  # must match the loss scale: see docs/tokenizer.md
    normalize_input: Literal["none", "batch"] = (
        "batch"  # batch: per query and dimension, running statistics at evaluation
    )
    norm_momentum: float = 0.05
    diversity: float = 0.0  # weight of the loss for even usage of codes at each position (Selftok: 1.0); 0 = off
    entropy_groups: int = 64  # diversity: runs of neighbouring tokens that share an entropy; at most num_tokens
    entropy_ramp: tuple[float, float] = (0.1, 0.3)  # diversity: full weight below, none above this share of perplexity
    revive_from: Literal["uniform", "perplexity"] = "uniform"  # perplexity: from positions that use few codes (Selftok)
    revive_count: Literal["uniform", "threshold"] = "uniform"  # what a moved code starts with; threshold: Selftok's
    init: Literal["first_batch", "when_varied"] = "first_batch"  # when codes are taken from the data
    init_variance: float = 0.01  # when_varied: between images, of unit features of the same token
    deterministic: bool = False  # sums without atomic additions, for equal bits on GPUs
