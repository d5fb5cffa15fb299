"""Transfusion 7B, `transfusion_256.py:7b` laid over a pod. Hardware: from 64 chips on (docs/plan.md); not run here.

Variants: "7b" with the linear coder, "7b_unet", and "large", the long run with a U-Net.
"""

from ddt_jax import config
from ddt_jax.errors import UserError

VARIANTS = ("7b", "7b_unet", "large")


def get_config(variant="7b"):
    if variant not in VARIANTS:
        raise UserError(f"config: {variant!r} is no variant of transfusion_7b; choose from {', '.join(VARIANTS)}")
    c = config.sibling(__file__, "transfusion_256").get_config(variant)
    c.name = f"transfusion_{variant}"
    c.model.transformer.vocab_size = 32_128  # LLaMA-2's 32,000, marks and spare ids
    c.mesh.data, c.mesh.fsdp = -1, 32
    return c
