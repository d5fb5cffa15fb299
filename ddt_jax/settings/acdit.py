"""ACDiT: images block by block, each denoised beside the clean ones before it (arXiv 2412.07720)."""

from dataclasses import dataclass, field
from typing import Literal

from ddt_jax.errors import UserError
from ddt_jax.settings.codecs import IdentityCodec, VAECodec
from ddt_jax.settings.diffusion import DDPM, RectifiedFlow

# Depth, width and heads of the published sizes (table 5); every head has 64 dimensions.
ACDIT_SIZES = {"B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 18), "H": (32, 1280, 20)}


@dataclass(frozen=True, kw_only=True)
class ACDiT:
    """Defaults: B for ImageNet at 256 px, on latents of Stable Diffusion's autoencoder."""

    kind: Literal["acdit"] = "acdit"
    patch_size: int = 1  # latents of a side of a token
    block_size: int = 256  # tokens of a block, a square of them: 1 is autoregression, all of an image is a DiT
    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp_ratio: int = 4
    classes: int = 1000  # labels of the source; 0 = images are learned without
    caption_bytes: int = 0  # of a caption in UTF-8, which images are told beside or in place of a label; 0 = none
    caption_depth: int = 2  # blocks of the encoder of captions
    label_drop: float = 0.1  # share of the images that are learned without label and caption, which guidance needs
    rope: Literal["nd", "released"] = "nd"  # released: what the published checkpoints were trained with, no rotation
    places: bool = False  # a learned vector of its place is added to each token: rotations say distances alone
    guidance: float = 1.5  # g: u + g (c - u) of what is predicted without and with label and caption; 1 = none
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "attention", "dots_attention"] = "none"  # see `Transformer`
    dtype: Literal["float32", "bfloat16"] = "float32"
    diffusion: DDPM | RectifiedFlow = field(
        default_factory=lambda: DDPM(schedule="linear", solver="dpmpp_2m", solver_steps=25)
    )
    codec: IdentityCodec | VAECodec = field(default_factory=lambda: VAECodec(preset="sd"))


def acdit_size(name: str) -> dict[str, int]:
    """`depth`, `width` and `heads` of a published size. Raises UserError for another name."""
    if name not in ACDIT_SIZES:
        raise UserError(f"config: {name!r} is no size of ACDiT; choose from {', '.join(ACDIT_SIZES)}")
    return dict(zip(("depth", "width", "heads"), ACDIT_SIZES[name], strict=True))


@dataclass(frozen=True, kw_only=True)
class ACDiTClassifier:
    """Classes from the clean stream of an ACDiT, all of which is trained. Sizes as those of the run in `init_from`.

    The paper has random erasing and mixup; how much of them is that of masked autoencoders when they are fine-tuned
    (arXiv 2111.06377 table 9; its code for erasing), without their other means.
    """

    kind: Literal["acdit_classifier"] = "acdit_classifier"
    patch_size: int = 1
    block_size: int = 256
    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp_ratio: int = 4
    classes: int = 1000
    rope: Literal["nd", "released"] = "nd"
    places: bool = False
    mixup: float = 0.8  # alpha: an image keeps a part drawn from Beta(alpha, alpha), the rest is another's; 0 = none
    erase: float = 0.25  # share of the images that lose a rectangle
    label_smoothing: float = 0.1  # share of a label that is given to all classes alike
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "attention", "dots_attention"] = "none"  # see `Transformer`
    dtype: Literal["float32", "bfloat16"] = "float32"
    codec: IdentityCodec | VAECodec = field(default_factory=lambda: VAECodec(preset="sd"))
