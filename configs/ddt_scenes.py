"""DDT tokenizer on procedural scenes at 32 px: 16 tokens of 512 codes, 144 bits, as the quickstart, trained for longer.

Hardware: 2 CPU cores, 30 minutes.
"""

from ddt_jax import config


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
    c.train.steps = 10_000
    c.evaluate.verifier = True
    return c
