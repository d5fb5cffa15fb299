"""What lies between images and latents."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class IdentityCodec:
    """Pixels are the latents."""

    kind: Literal["identity"] = "identity"


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """Sizes of a convolutional KL autoencoder; the defaults are SD3's."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # widths, from the image's resolution down by halves
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_groups: int = 32
    use_quant_conv: bool = False  # 1 x 1 convolutions on both sides of the latent (SD, not SD3)
    scaling_factor: float = 1.5305  # latents are used as (z - shift_factor) * scaling_factor
    shift_factor: float = 0.0609


@dataclass(frozen=True, kw_only=True)
class VAECodec:
    """Latents of a frozen KL autoencoder."""

    kind: Literal["vae"] = "vae"
    preset: Literal["sd", "sd3", "custom"] = "sd3"
    sizes: Autoencoder = field(default_factory=Autoencoder)  # custom only
    weights: str = ""  # diffusers .safetensors or its folder; read when a run starts, kept in the run's checkpoints
    random_weights: bool = False  # train on an untrained autoencoder; for tests and speed
    sample: bool = True  # training sees a draw from the posterior; encoding always takes its mode
    dtype: Literal["float32", "bfloat16"] = "float32"
