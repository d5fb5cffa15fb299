"""Every setting of a run and its default. Plain frozen dataclasses: no JAX, nothing heavy, so that reading a config
is quick.

`config.py` builds this tree from a config file and refuses what does not fit it. A class with a `kind` is one of
several that may stand in the same place; the value of `kind` chooses.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    replica: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1


@dataclass(frozen=True, kw_only=True)
class Data:
    source: str = "scenes:train"
    eval_source: str = "scenes:heldout"
    image_size: int = 32
    crop: Literal["center", "random", "stretch"] = "center"
    flip: bool = False  # random horizontal flip, keyed by (seed, step, slot)
    background: tuple[int, int, int] = (255, 255, 255)  # what transparent pixels are laid over
    min_image_size: int = 0  # smaller images count as bad
    max_pixels: int = 178_956_970  # larger ones are refused before decoding (a decompression bomb)
    max_bad_fraction: float = 0.001
    threads: int = 2
    workers: int = 0  # processes; 0 = threads of this process only
    prefetch: int = 8  # batches ready ahead of the step
    cache_dir: str = ""  # where offset indices live; "" = $XDG_CACHE_HOME/ddt_jax


@dataclass(frozen=True, kw_only=True)
class IdentityCodec:
    """Pixels are the latents."""

    kind: Literal["identity"] = "identity"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Token schedule k(t): which tokens the decoder may see at noise level t."""

    kind: Literal["uniform", "piecewise", "late"] = "late"
    direction: Literal["coarse_first", "selftok"] = (
        "coarse_first"  # tokens 0..k(t): k grows as noise falls | with noise
    )
    full_below: float = 0.88  # late: all tokens are visible where 1 - u >= 1 - full_below, u the unshifted time
    breakpoints: tuple[int, ...] = ()  # piecewise: right ends in 1/1000
    tokens: tuple[int, ...] = ()  # piecewise: tokens granted per segment


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


@dataclass(frozen=True, kw_only=True)
class Flow:
    prediction: Literal["x0", "velocity", "noise"] = "x0"
    weighting: Literal["prediction", "x0", "velocity"] = "prediction"  # the space in which the squared error is taken
    time: Literal["uniform", "stratified", "logit_normal"] = "stratified"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 4.0  # t = s u / (1 + (s - 1) u); the token schedule looks at the unshifted u
    condition_drop: float = 0.0
    solver: Literal["euler", "heun"] = "euler"
    solver_steps: int = 8
    guidance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DDTTokenizer:
    kind: Literal["ddt"] = "ddt"
    num_tokens: int = 16
    patch_size: int = 8
    width: int = 96
    heads: int = 4
    encoder_depth: int = 2
    decoder_depth: int = 4
    mlp_ratio: int = 4
    coupling: Literal["cross", "joint"] = "cross"
    mix: bool = True  # linear paths patches -> codes and codes -> patches beside the attention
    qk_norm: bool = True
    scan_layers: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantizer: Quantizer = field(default_factory=Quantizer)
    schedule: Schedule = field(default_factory=Schedule)
    flow: Flow = field(default_factory=Flow)
    codec: IdentityCodec = field(default_factory=IdentityCodec)


@dataclass(frozen=True, kw_only=True)
class LinearTokenizer:
    """A linear autoencoder with a codebook: the smallest thing with every kind of state. For tests of the machinery."""

    kind: Literal["linear"] = "linear"
    num_tokens: int = 4
    width: int = 32
    quantizer: Quantizer = field(default_factory=lambda: Quantizer(normalize_input="none"))


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: Literal["adamw", "muon"] = "muon"  # muon: on matrices that ask for it, AdamW on the rest
    lr: float = 3e-3
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: int = 50
    decay_fraction: float = 0.35  # linear: the last share of the run over which the rate falls
    final_lr_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.95  # muon
    newton_schulz_steps: int = 5  # muon
    clip_norm: float = 1.0  # 0 = no clipping


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 3000
    batch_size: int = 32  # images per optimizer step over the whole mesh
    accumulate: int = 1
    ema: float = 0.99  # 0 = no weight average
    max_bad_steps: int = 50  # so many non-finite steps in a row end the run
    log_every: int = 50
    eval_every: int = 0  # steps between evaluations with a picture in the log; 0 = none
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_every: int = 0
    tensorboard: bool = True
    wandb: bool = False


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    images: int = 1024
    batch_size: int = 128
    visible: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)  # shares of the tokens shown
    pictures: int = 8
    verifier: bool = False  # read scenes back with data.scenes
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    name: str = "experiment"
    seed: int = 0
    mesh: Mesh = field(default_factory=Mesh)
    data: Data = field(default_factory=Data)
    model: DDTTokenizer | LinearTokenizer = field(default_factory=DDTTokenizer)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
