"""SEED: a causal, semantic image tokenizer (arXiv 2307.08041, 2310.01218), trained in stages."""

from dataclasses import dataclass, field, replace
from typing import Literal

from ddt_jax.errors import UserError
from ddt_jax.settings.codecs import IdentityCodec, VAECodec
from ddt_jax.settings.diffusion import DDPM, RectifiedFlow
from ddt_jax.settings.quantizer import Quantizer

# Depth, width, heads and MLP width of the usual sizes; g is EVA-CLIP's, with the last of its 40 blocks left out.
VIT_SIZES = {
    "Ti": (12, 192, 3, 768),
    "S": (12, 384, 6, 1536),
    "B": (12, 768, 12, 3072),
    "L": (24, 1024, 16, 4096),
    "So400m": (27, 1152, 16, 4304),
    "H": (32, 1280, 16, 5120),
    "g": (39, 1408, 16, 6144),
}
NO_TOKEN = -1  # in rows of a caption's ids, behind its end
# What three families do with the same blocks.
_VIT_FAMILIES = {
    "clip": {"class_token": True, "pre_norm": True, "final_norm": False, "patch_bias": False, "gelu": "quick"}
    | {"norm_epsilon": 1e-5, "pixels": "clip"},
    "siglip": {"class_token": False, "final_norm": True, "gelu": "tanh"},
    "eva": {"class_token": True, "final_norm": True, "qkv_bias": "qv", "pixels": "clip"},
}


@dataclass(frozen=True, kw_only=True)
class ViT:
    """A vision transformer whose options cover CLIP, SigLIP and EVA-CLIP-g. Its output is all of its rows."""

    patch_size: int = 4
    depth: int = 4
    width: int = 128
    heads: int = 4
    mlp_width: int = 512
    class_token: bool = False  # a learned row before the patches
    pre_norm: bool = False  # LayerNorm of patches and positions before the first block (CLIP)
    final_norm: bool = True
    patch_bias: bool = True
    qkv_bias: Literal["all", "qv", "none"] = "all"  # a key's bias moves no softmax
    gelu: Literal["exact", "tanh", "quick"] = "exact"  # quick: x sigmoid(1.702 x)
    norm_epsilon: float = 1e-6
    pixels: Literal["half", "clip"] = "half"  # images in [-1, 1], or with CLIP's mean and deviation of each channel
    scan_layers: bool = False
    remat: Literal["none", "full", "dots", "attention", "dots_attention"] = "none"  # see `Transformer`


def vit(size: str, family: Literal["clip", "siglip", "eva"], patch_size: int) -> ViT:
    """A published vision transformer. Raises UserError for a size or family that is none."""
    if size not in VIT_SIZES or family not in _VIT_FAMILIES:
        raise UserError(
            f"config: {size!r}, {family!r} is no vision transformer; choose from {', '.join(VIT_SIZES)} and "
            f"{', '.join(_VIT_FAMILIES)}"
        )
    sizes = dict(zip(("depth", "width", "heads", "mlp_width"), VIT_SIZES[size], strict=True))
    return ViT(patch_size=patch_size, **sizes, **_VIT_FAMILIES[family])


@dataclass(frozen=True, kw_only=True)
class QFormer:
    """Queries that attend to each other and, in every so many layers, to an image's rows."""

    depth: int = 4
    width: int = 128
    heads: int = 4
    mlp_width: int = 512
    cross_every: int = 2  # layers 0, cross_every, 2 cross_every, ... see the image
    norm: Literal["pre", "post"] = "pre"  # post: BERT's, as published
    norm_epsilon: float = 1e-6  # published: 1e-12
    scan_layers: bool = False
    remat: Literal["none", "full", "dots", "attention", "dots_attention"] = "none"  # see `Transformer`


BLIP2_QFORMER = QFormer(depth=12, width=768, heads=12, mlp_width=3072, norm="post", norm_epsilon=1e-12)


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """A transformer that reads a caption as one vector, that of a class token before it."""

    tokenizer: str = ""  # sentencepiece model or tokenizer.json; "" = one is made of captions, and kept with the run
    vocab_size: int = 512  # of the embedding, and at most of a tokenizer that is made
    length: int = 64  # longer captions are cut
    depth: int = 3
    width: int = 128
    heads: int = 4
    mlp_width: int = 512


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The loss between images and captions of a batch."""

    kind: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: SigLIP's (arXiv 2303.15343), for small batches
    width: int = 256  # of the space in which they are compared
    temperature: float = 0.07  # at the start; learned. SigLIP: 0.1
    bias: float = -10.0  # sigmoid: at the start; learned
    label_smoothing: float = 0.1  # softmax: shared out over all captions of the batch
    gradient: Literal["both", "published"] = "both"  # published: none through what an image or caption is compared with


@dataclass(frozen=True, kw_only=True)
class CLIPText:
    """CLIP's text encoder as what features are learned from: all rows of an image's caption behind the last norm. The
    defaults are those of ViT-L/14, 77 x 768, which Stable Diffusion 1 draws from.
    """

    kind: Literal["text"] = "text"
    weights: str = ""  # folder of a whole CLIP in Hugging Face's format, with its tokenizer.json
    vocab_size: int = 49408
    length: int = 77
    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp_width: int = 3072
    gelu: Literal["exact", "tanh", "quick"] = "quick"
    norm_epsilon: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class CLIPImage:
    """CLIP's image encoder as what features are learned from: an image's one vector in the space of captions, as long
    as it comes. The defaults are those of ViT-H/14 by LAION, 1 x 1024, which Stable Diffusion 2.1 unCLIP draws from.
    """

    kind: Literal["image"] = "image"
    weights: str = ""  # folder of a whole CLIP in Hugging Face's format
    vision: ViT = field(default_factory=lambda: replace(vit("H", "clip", 14), final_norm=True, gelu="exact"))
    image_size: int = 224  # to which images are resized
    width: int = 1024  # of the vector


@dataclass(frozen=True, kw_only=True)
class FlowHead:
    """The decoder that draws: a DiT whose patches see the features as extra keys and values."""

    patch_size: int = 4  # latents of a side
    depth: int = 4
    width: int = 128
    heads: int = 4
    mlp_ratio: int = 4
    feature_drop: float = 0.1  # share of the images that are learned without features, which guidance needs
    guidance: float = 1.0  # g: u + g (c - u) of what is predicted without and with features; 1 = none
    diffusion: DDPM | RectifiedFlow = field(default_factory=lambda: RectifiedFlow(solver_steps=25))


@dataclass(frozen=True, kw_only=True)
class SEED:
    """The tokenizer. Each stage but the first begins with a run of the one before (`init_from`), of which all stands.

    align: vision, Q-Former and text tower learn to tell which caption belongs to an image, by the last query.
    codes: a codebook between the Q-Former's outputs and what is made of them: the outputs again, and features to draw
      from.
    draw: a flow decoder learns to draw from these features.
    """

    kind: Literal["seed"] = "seed"
    stage: Literal["align", "codes", "draw"] = "align"
    num_tokens: int = 32
    causal: bool = True  # query i sees queries 0 to i; False: all of them, the ablation
    vision: ViT = field(default_factory=ViT)
    vision_weights: str = ""  # folder in Hugging Face's format whose vision transformer stands; "" = it is trained
    qformer: QFormer = field(default_factory=QFormer)
    qformer_weights: str = ""  # folder with BLIP-2's or SEED's Q-Former, from which the first stage starts
    text: TextTower = field(default_factory=TextTower)
    contrast: Contrast = field(default_factory=Contrast)
    recipe: Literal["ema", "l2-legacy"] = "ema"  # l2-legacy: as published, with gradients and without revival
    quantizer: Quantizer = field(  # `commitment` is the weight of the quantizer's loss; published, with l2-legacy: 5.0
        default_factory=lambda: Quantizer(
            code_dim=32, codebook_size=8192, decay=0.99, commitment=1.0, normalize_input="none"
        )
    )
    embedding_depth: int = 4  # blocks between codes and the Q-Former's outputs, and between codes and features
    embedding_weight: float = 2.0  # of 1 - cosine between the Q-Former's outputs and what codes give
    # What is drawn from: each row of the vision transformer, their mean, or what `clip` gives.
    features: Literal["patches", "pooled", "clip"] = "patches"
    clip: CLIPText | CLIPImage = field(default_factory=CLIPText)  # features="clip": published targets of features
    features_depth: int = 4  # layers of the Reverse Q-Former
    features_weight: float = 0.5  # of its squared error
    draw: FlowHead = field(default_factory=FlowHead)
    codec: IdentityCodec | VAECodec = field(default_factory=IdentityCodec)  # of what is drawn
    dtype: Literal["float32", "bfloat16"] = "float32"
