"""How images are noised, what a network predicts of them, and how they are drawn (`diffusion/process.py`)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """Noise in `steps` steps (arXiv 2006.11239). Defaults: Transfusion's (arXiv 2408.11039 §2.2, §4.1)."""

    kind: Literal["ddpm"] = "ddpm"
    schedule: Literal["cosine", "linear"] = "cosine"  # arXiv 2102.09672; linear: of the first DDPM, ACDiT's
    steps: int = 1000
    prediction: Literal["x0", "velocity", "noise"] = "noise"
    min_snr: float = 0.0  # weight min(SNR, this) on the squared error in x0 (arXiv 2303.09556); 0 = as predicted
    time: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    solver: Literal["ddpm", "ddim", "dpmpp_2m"] = "ddpm"
    solver_steps: int = 250
    clip: float = 0.0  # when images are drawn, what is taken for x0 is held to +-clip (pixels: 1); 0 = not


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """A straight path between image and noise (arXiv 2209.03003), with SD3's times and shift (arXiv 2403.03206)."""

    kind: Literal["flow"] = "flow"
    prediction: Literal["x0", "velocity", "noise"] = "velocity"
    min_snr: float = 0.0  # as for `DDPM`
    time: Literal["uniform", "logit_normal"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0  # t = s u / (1 + (s - 1) u)
    solver: Literal["euler", "heun", "dpmpp_2m"] = "euler"
    solver_steps: int = 50
    clip: float = 0.0  # as for `DDPM`
