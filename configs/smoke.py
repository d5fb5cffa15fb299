"""Thirty steps of a small DDT tokenizer on scenes, in under a minute on 2 CPU cores. What smoke tests run;
it learns little.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError


def get_config(variant="ddt"):
    if variant not in ("ddt", "linear"):
        raise UserError(f"config: {variant!r} is no variant of smoke; choose ddt or linear")
    c = config.defaults()
    c.name = "smoke"
    if variant == "linear":
        c.model = config.defaults(settings.LinearTokenizer)
    else:
        c.model.width, c.model.heads = 32, 2
        c.model.num_tokens = 8
        c.model.encoder_depth = c.model.decoder_depth = 1
    c.model.quantizer.codebook_size = 64
    c.train.steps = 30
    c.train.batch_size = 8
    c.train.log_every = 5
    c.train.checkpoint_every = 10
    c.optimizer.warmup = 5
    c.evaluate.images = 64
    c.evaluate.batch_size = 32
    c.evaluate.probe_images = 64
    c.evaluate.verifier = True
    return c
