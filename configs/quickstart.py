"""DDT tokenizer on procedural scenes at 32 px: 16 tokens of 512 codes. Hardware: 2 CPU cores.

Expect 28.4 dB and 97 % of the scenes read back right after 4 to 5 minutes (docs/soak/quickstart.json). Variant
"unordered": the decoder always sees all tokens, so nothing puts them in an order; a control for comparisons.
"""

from ddt_jax import config
from ddt_jax.errors import UserError


def get_config(variant=""):
    if variant not in ("", "unordered"):
        raise UserError(f"config: {variant!r} is no variant of quickstart; choose unordered, or none")
    c = config.defaults()
    c.name = "_".join(filter(None, ("quickstart", variant)))
    c.model.encoder_depth = 1
    c.model.decoder_depth = 3
    c.model.schedule.full_below = 0.96  # steeper than the default: all tokens together gain
    if variant == "unordered":
        c.model.schedule.groups = 1  # all at once
    c.model.quantizer.normalize_input = "none"  # the statistics of 32 images are noise to the codes
    c.optimizer.lr = 6e-3
    c.optimizer.newton_schulz_steps = 4
    c.optimizer.decay_fraction = 0.5
    c.train.steps = 2300
    c.evaluate.verifier = True
    return c
