"""DDT tokenizer on procedural scenes at 32 px: 16 tokens of 512 codes, 144 bits, as the quickstart, trained for longer.

Hardware: 2 CPU cores, 30 minutes. Then `ddt_scenes.py:renderer` trains a decoder of one step for the same codes in 10
more; it needs `--config.init_from=WORKDIR` of the first run.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError


def get_config(variant="tokenizer"):
    c = config.defaults()
    c.name = f"ddt_scenes_{variant}"
    # The output layer is linear: a width of 96 holds the 192 values of a patch to no better than 37 dB, 128 to 42
    # (principal components of the scenes' patches).
    c.model.width = 128
    c.model.encoder_depth = 2
    c.model.decoder_depth = 3
    c.model.schedule.full_below = 0.96  # steeper than the default: all tokens together gain
    c.model.quantizer.normalize_input = "none"  # the statistics of 32 images are noise to the codes
    c.model.quantizer.decay = 0.98  # codes that stand stiller than the quickstart's: there is time to follow
    c.optimizer.lr = 4e-3
    c.optimizer.newton_schulz_steps = 4
    c.optimizer.decay_fraction = 0.5
    c.train.steps = 7600
    c.evaluate.verifier = True
    if variant == "renderer":
        c.model.decoder = config.defaults(settings.Renderer)
        c.model.stage = "decoder"
        # Squared error alone: it is what the gate measures, and flat shapes have no texture to judge.
        c.model.image_loss.lpips_weight = c.model.image_loss.lpips_weight_late = 0.0
        c.model.image_loss.adversarial_weight_late = 0.0
        c.optimizer.lr = 2e-3
        c.optimizer.decay_fraction = 0.7
        c.train.steps = 2600
    elif variant != "tokenizer":
        raise UserError(f"config: {variant!r} is no variant of ddt_scenes; choose tokenizer or renderer")
    return c
