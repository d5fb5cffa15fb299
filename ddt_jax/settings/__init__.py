"""Every setting of a run and its default. Plain frozen dataclasses: no JAX, nothing heavy, so that reading a config
is quick.

`config.py` builds this tree from a config file and refuses what does not fit it. A class with a `kind` is one of
several that may stand in the same place; the value of `kind` chooses.
"""

from dataclasses import dataclass, field
from typing import Literal

from ddt_jax.errors import UserError
from ddt_jax.settings.acdit import ACDIT_SIZES, ACDiT, ACDiTClassifier, acdit_size
from ddt_jax.settings.codecs import Autoencoder, IdentityCodec, VAECodec
from ddt_jax.settings.diffusion import DDPM, RectifiedFlow
from ddt_jax.settings.multimodal import (
    CodeImages,
    CodesFolder,
    DiffusionImages,
    Formats,
    LinearCoder,
    LoRA,
    Multimodal,
    Pictures,
    RopeScaling,
    Sampling,
    Sequences,
    Texts,
    Transformer,
    UNetCoder,
)
from ddt_jax.settings.quantizer import Quantizer
from ddt_jax.settings.seed import (
    BLIP2_QFORMER,
    NO_TOKEN,
    SEED,
    VIT_SIZES,
    CLIPImage,
    CLIPText,
    Contrast,
    FlowHead,
    QFormer,
    TextTower,
    ViT,
    vit,
)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    replica: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1  # parts of a row's positions (sequences.context), for a multimodal transformer of codes


@dataclass(frozen=True, kw_only=True)
class Data:
    source: str = "scenes:train"
    eval_source: str = "scenes:heldout"
    image_size: int = 32
    crop: Literal["center", "random", "stretch"] = "center"
    flip: bool = False  # random horizontal flip, keyed by (seed, step, slot)
    frames: int = 0  # of a clip, for sources of clips; 0 = images
    frame_step: int = 1  # 1 = all frames that follow each other, 2 = every other one, ...
    clip_start: Literal["middle", "random"] = "middle"  # which frames of a longer clip; evaluation: those in the middle
    background: tuple[int, int, int] = (255, 255, 255)  # what transparent pixels are laid over
    min_image_size: int = 0  # smaller images count as bad
    max_pixels: int = 178_956_970  # larger ones are refused before decoding (a decompression bomb)
    max_bad_fraction: float = 0.001
    retry_seconds: float = 120.0  # for so long a read that fails in a way that passes is tried again; 0 = never
    threads: int = 2
    workers: int = 0  # processes; 0 = threads of this process only
    prefetch: int = 8  # batches ready ahead of the step
    cache_dir: str = ""  # where offset indices live; "" = $XDG_CACHE_HOME/ddt_jax


@dataclass(frozen=True, kw_only=True)
class Discriminator:
    """Convolutions that judge overlapping patches of an image."""

    width: int = 64  # channels of the first layer; doubled by each of the next three
    layers: int = 3  # halvings of the resolution
    norm_groups: int = 32  # of the normalisation in all layers but the first and the last; 0 = none


@dataclass(frozen=True, kw_only=True)
class ImageLoss:
    """Losses between decoded images and originals; the defaults are the published schedule of Selftok's renderer.

    A weight of 0 on both sides of `late_from` leaves its term out.
    """

    pixel: Literal["l1", "l2"] = "l2"
    pixel_weight: float = 1.0
    lpips_weight: float = 0.1
    lpips_weight_late: float = 0.5
    adversarial_weight: float = 0.0
    adversarial_weight_late: float = 0.5
    late_from: int = 30_000  # optimizer step from which the late weights hold
    lpips_backbone: Literal["vgg16", "alexnet"] = "vgg16"
    lpips_backbone_file: str = ""  # torchvision's .pth of the classifier; without files training does without LPIPS
    lpips_heads_file: str = ""  # the heads of LPIPS 0.1 for this backbone
    discriminator: Discriminator = field(default_factory=Discriminator)
    r1_weight: float = 0.0  # squared gradient of the discriminator at originals


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Token schedule k(t): which tokens the decoder may see at noise level t."""

    kind: Literal["uniform", "timesteps", "piecewise", "late", "logit_normal", "unpublished"] = "late"
    direction: Literal["coarse_first", "selftok"] = (
        "coarse_first"  # tokens 0..k(t): k grows as noise falls | with noise
    )
    full_below: float = 0.88  # late: all tokens are visible where 1 - u >= 1 - full_below, u the unshifted time
    breakpoints: tuple[int, ...] = ()  # piecewise: right ends in 1/1000
    tokens: tuple[int, ...] = ()  # piecewise: tokens granted per segment
    logit_mean: float = 0.0  # logit_normal
    logit_std: float = 1.0  # logit_normal
    groups: int = 0  # tokens appear in so many equal groups, each at once; 0 = one by one


@dataclass(frozen=True, kw_only=True)
class Flow:
    prediction: Literal["x0", "velocity", "noise"] = "x0"
    weighting: Literal["prediction", "x0", "velocity"] = "prediction"  # the space in which the squared error is taken
    time: Literal["uniform", "stratified", "logit_normal"] = "stratified"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 4.0  # t = s u / (1 + (s - 1) u); the token schedule looks at the unshifted u
    condition_drop: float = 0.0
    solver: Literal["euler", "heun", "dpmpp_2m"] = "euler"
    solver_steps: int = 8
    guidance: float = 1.0


@dataclass(frozen=True, kw_only=True)
class FlowDecoder:
    """Draws from noise in some steps. `flow` and `schedule` are its settings."""

    kind: Literal["flow"] = "flow"


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """One-step decoder: a learned canvas in the place of the noised patches, t = 1, x0 as output.

    It has no use for `flow`, and of `schedule` for the direction only, which says what a prefix is.
    """

    kind: Literal["renderer"] = "renderer"
    repeat: bool = False  # one canvas vector for all patches; False: one for each
    random_prefixes: float = 0.0  # share of the examples that see a random number of tokens; as published: 0, all


@dataclass(frozen=True, kw_only=True)
class DDTTokenizer:
    kind: Literal["ddt"] = "ddt"
    num_tokens: int = 16
    patch_size: int = 8
    width: int = 96
    heads: int = 4
    encoder_depth: int = 2
    decoder_depth: int = 4
    decoder: FlowDecoder | Renderer = field(default_factory=FlowDecoder)
    stage: Literal["joint", "decoder"] = "joint"  # decoder: encoder and codebook stand as they were in init_from
    mlp_ratio: int = 4
    coupling: Literal["cross", "joint"] = "cross"
    mix: bool = True  # linear paths patches -> codes and codes -> patches beside the attention
    token_gradient_weights: bool = False  # flow gradient of a token times 1 / P(it is visible), for u uniform
    qk_norm: bool = True
    scan_layers: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantizer: Quantizer = field(default_factory=Quantizer)
    schedule: Schedule = field(default_factory=Schedule)
    flow: Flow = field(default_factory=Flow)
    image_loss: ImageLoss = field(default_factory=ImageLoss)  # of a renderer
    codec: IdentityCodec | VAECodec = field(default_factory=IdentityCodec)


@dataclass(frozen=True, kw_only=True)
class SelftokEncoder:
    """Dual-stream encoder of the published Selftok models. Defaults: `Enc-Qformer-Uni-XL/2`."""

    depth: int = 16
    image_width: int = 64
    image_heads: int = 4
    width: int = 512
    heads: int = 8
    mlp_ratio: int = 4
    position_grid: int = 64  # side of the fixed table of positions, whose middle is used


@dataclass(frozen=True, kw_only=True)
class SelftokDecoder:
    """Flow decoder of the published Selftok models: SD3's MMDiT with tokens in the place of text."""

    kind: Literal["mmdit"] = "mmdit"
    depth: int = 24
    width: int = 1536
    heads: int = 24
    mlp_ratio: int = 4
    position_grid: int = 192  # side of the table of positions, whose middle is used
    context_see_xt: bool = True  # whether the tokens' rows see the noised patches


@dataclass(frozen=True, kw_only=True)
class SelftokRenderer(Renderer):
    """The published one-step decoder."""

    depth: int = 24
    width: int = 1536
    heads: int = 24
    mlp_ratio: int = 4
    position_grid: int = 192
    context_see_xt: bool = False
    repeat: bool = True
    canvas_keeps_table: bool = True  # add the fixed table of positions to the canvas, as to noised patches


# The family's one dial: blocks of the decoder. All other sizes follow from it by the proportions of the released XL.
SELFTOK_SIZES = {"small": 6, "base": 12, "large": 18, "xl": 24}


def selftok_size(size: str, renderer: bool = False) -> dict:
    """`encoder` and `decoder`, or its one-step renderer, of a member of the family; only "xl" has been published.

    The decoder's width is 64 per block and its heads are as many as its blocks, as in SD3. The encoder has 2/3 as many
    blocks, and queries of 1/3 of the decoder's width.

    Raises:
      UserError: for a size that is not in SELFTOK_SIZES.
    """
    if size not in SELFTOK_SIZES:
        raise UserError(f"config: {size!r} is no size of the Selftok family; choose from {', '.join(SELFTOK_SIZES)}")
    blocks = SELFTOK_SIZES[size]
    return {
        "encoder": SelftokEncoder(depth=2 * blocks // 3, width=64 * blocks // 3, heads=blocks // 3),
        "decoder": (SelftokRenderer if renderer else SelftokDecoder)(depth=blocks, width=64 * blocks, heads=blocks),
    }


@dataclass(frozen=True, kw_only=True)
class SelftokTokenizer:
    """DDT tokenizer with the published networks. Defaults: the released model with 512 tokens at 256 px."""

    kind: Literal["selftok"] = "selftok"
    num_tokens: int = 512
    patch_size: int = 2
    stage: Literal["joint", "decoder"] = "joint"  # decoder: encoder and codebook stand as they were in init_from
    token_gradient_weights: bool = False  # flow gradient of a token times 1 / P(it is visible), for u uniform
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "attention", "dots_attention"] = "full"  # see `Transformer`
    dtype: Literal["float32", "bfloat16"] = "float32"
    encoder: SelftokEncoder = field(default_factory=SelftokEncoder)
    decoder: SelftokDecoder | SelftokRenderer = field(default_factory=SelftokDecoder)
    quantizer: Quantizer = field(
        default_factory=lambda: Quantizer(
            code_dim=16,
            codebook_size=32768,
            decay=0.99,
            revive_below=0.2,
            commitment=1 / 16,  # 1.0 on unit vectors; ours have length sqrt(code_dim)
            normalize_input="none",
            diversity=1.0,
            revive_from="perplexity",
            revive_count="threshold",
            init="when_varied",  # at first all images have the same features; as released: first_batch
        )
    )
    schedule: Schedule = field(
        default_factory=lambda: Schedule(
            kind="piecewise",
            direction="selftok",
            breakpoints=(200, 400, 600, 800, 1000),
            tokens=(192, 184, 72, 48, 16),
        )
    )
    flow: Flow = field(
        default_factory=lambda: Flow(
            prediction="velocity", time="uniform", shift=1.0, condition_drop=0.1, solver_steps=50
        )
    )
    image_loss: ImageLoss = field(default_factory=ImageLoss)  # of a renderer
    codec: IdentityCodec | VAECodec = field(default_factory=VAECodec)


@dataclass(frozen=True, kw_only=True)
class SpatialTokenizer:
    """A code for each place of a grid, by the convolutional encoder and decoder of an autoencoder (VQGAN).

    Defaults: one code for 16 x 16 pixels, of 16,384 with 8 dimensions, as in LlamaGen.
    """

    kind: Literal["spatial"] = "spatial"
    block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512)  # from the image's resolution down by halves
    layers_per_block: int = 2
    norm_groups: int = 32
    remat: bool = False  # compute a residual block again for its gradient rather than keep what it computed
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantizer: Quantizer = field(
        default_factory=lambda: Quantizer(
            codebook_size=16384,
            decay=0.99,
            commitment=0.25 / 8,  # 0.25 on unit vectors; ours have length sqrt(code_dim)
            normalize_input="none",
        )
    )
    image_loss: ImageLoss = field(
        default_factory=lambda: ImageLoss(lpips_weight=1.0, lpips_weight_late=1.0, late_from=20_000)
    )


@dataclass(frozen=True, kw_only=True)
class VAE:
    """The convolutional KL autoencoder under latent tokenizers, trained from scratch. Defaults: SD3's sizes."""

    kind: Literal["vae"] = "vae"
    sizes: Autoencoder = field(
        default_factory=lambda: Autoencoder(scaling_factor=1.0, shift_factor=0.0)  # both are measured at export
    )
    kl_weight: float = 1e-6  # of the nats per value of a pixel (Stable Diffusion's weight, which is for sums over both)
    remat: bool = False  # compute a residual block again for its gradient rather than keep what it computed
    dtype: Literal["float32", "bfloat16"] = "float32"
    image_loss: ImageLoss = field(
        default_factory=lambda: ImageLoss(pixel="l1", lpips_weight=1.0, lpips_weight_late=1.0, late_from=50_000)
    )


@dataclass(frozen=True, kw_only=True)
class LinearTokenizer:
    """A linear autoencoder with a codebook: the smallest thing with every kind of state. For tests of the machinery."""

    kind: Literal["linear"] = "linear"
    num_tokens: int = 4
    width: int = 32
    quantizer: Quantizer = field(default_factory=lambda: Quantizer(normalize_input="none"))


@dataclass(frozen=True, kw_only=True)
class DiscriminatorOptimizer:
    """Adam of a discriminator, where there is one. Its rate rises and falls as that of all else."""

    lr: float = 1e-4
    b1: float = 0.5
    b2: float = 0.9
    clip_norm: float = 1.0  # over the discriminator alone; 0 = no clipping


@dataclass(frozen=True, kw_only=True)
class PartRate:
    """A learning rate of a part of the model's own."""

    part: str = ""  # names of parameters, as a run lists them when it begins, with * for anything: "decoder/*"
    times: float = 1.0  # of optimizer.lr, at every step; decay goes by it too


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: Literal["adamw", "muon"] = "muon"  # muon: on matrices that ask for it, AdamW on the rest
    lr: float = 3e-3
    # Width at which lr was found: updates and first values are scaled from there to the model's own, so that lr holds
    # at both (docs/scaling.md); 0 = lr is of this model, and nothing is scaled.
    transfer_from: int = 0
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
    # Limits at so many standard deviations above the mean of the last guard_window finite values; 0 = none.
    spike_skip: float = 0.0  # a step whose loss or gradient norm is above its limit is skipped
    clip_update: float = 0.0  # an update whose norm, over the learning rate, is above its limit is shortened to it
    guard_window: int = 128
    parts: tuple[PartRate, ...] = ()  # of those that a parameter's name fits, the last one counts
    offload: bool = False  # moments wait in the memory of the hosts: room on the chips for slower steps
    discriminator: DiscriminatorOptimizer = field(default_factory=DiscriminatorOptimizer)


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
    keep_checkpoints: int = 2  # the last so many
    keep_every: int = 0  # also those whose step it divides; 0 = none
    keep_best: int = 0  # also so many with the best best_metric, of those that have one
    best_metric: str = "loss"  # a figure of the log: the last one written up to the save, as `eval/psnr`
    best_is: Literal["lowest", "highest"] = "lowest"
    maintenance: Literal["signal", "gce"] = "signal"  # gce: also ask the metadata server of the machine
    recheck_every: int = 0  # steps between two that are done twice, on rotated devices, for equal bits; 0 = none
    silence_limit: float = 0.0  # seconds without a sign of life after which a process ends, with code 77; 0 = none
    profile_at: int = 0  # step at which a profile begins; 0 = none, but for SIGUSR1
    profile_steps: int = 5  # steps in a profile
    tensorboard: bool = True
    wandb: bool = False


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    images: int = 1024
    batch_size: int = 128
    visible: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)  # shares of the tokens shown
    pictures: int = 8
    verifier: bool = False  # read scenes back with data.scenes
    classifier: str = ""  # multimodal: workdir of an acdit_classifier that judges pictures of class names instead
    seed: int = 0
    lpips_backbone: Literal["alexnet", "vgg16"] = "alexnet"
    lpips_backbone_file: str = ""  # torchvision's .pth of the classifier; without files LPIPS is left out
    lpips_heads_file: str = ""  # the heads of LPIPS 0.1 for this backbone
    inception_file: str = ""  # pt_inception-2015-12-05-6726825d.pth; without it rFID and t2i_fid are left out
    clip_folder: str = ""  # multimodal: a CLIP of Hugging Face, as clip-vit-large-patch14; without it no t2i_clip_score
    probe_images: int = 4096  # of data.source, from whose codes probes and entropies are learned; 0 = neither
    counterfactuals: int = 6  # images in the picture with tokens of two images; 0 = none
    save_images: str = ""  # folder for originals and reconstructions as PNG pairs; "" = none
    prompts: int = 256  # multimodal: captions that are drawn, images that are captioned, images that are edited
    fid_images: int = 2048  # multimodal, with inception_file: captions that are drawn for t2i_fid
    free_images: bool = False  # multimodal: nothing holds an image to be K codes; what is none counts as wrong
    text_to_image: Sampling = field(default_factory=lambda: Sampling(tokens=0, guidance=2.0, temperature=0.7))
    image_to_text: Sampling = field(default_factory=lambda: Sampling(tokens=64, temperature=0.0))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    name: str = "experiment"
    seed: int = 0
    init_from: str = ""  # workdir of a run whose weights (the average, where there is one) and codebook this one takes
    mesh: Mesh = field(default_factory=Mesh)
    data: Data = field(default_factory=Data)
    sequences: Sequences = field(default_factory=Sequences)  # of a multimodal transformer
    model: (
        DDTTokenizer
        | SelftokTokenizer
        | SpatialTokenizer
        | VAE
        | LinearTokenizer
        | ACDiT
        | ACDiTClassifier
        | SEED
        | Multimodal
    ) = field(default_factory=DDTTokenizer)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
