"""Spatial tokenizer on procedural scenes at 32 px: a 4 x 4 grid of 512 codes, 144 bits, as many as the quickstart has.

Hardware: 2 CPU cores, 30 minutes, as long as `ddt_scenes.py` takes for the same pictures at the same number of bits.
"""

from ddt_jax import config, settings


def get_config():
    c = config.defaults()
    c.name = "spatial_scenes"
    c.model = config.defaults(settings.SpatialTokenizer)
    c.model.block_out_channels = (16, 32, 48, 64)  # convolutions at 32 px are what a step costs on CPUs
    c.model.layers_per_block = 1
    c.model.norm_groups = 8
    c.model.quantizer = config.defaults(settings.Quantizer)
    c.model.quantizer.normalize_input = "none"
    c.model.image_loss.lpips_weight = c.model.image_loss.lpips_weight_late = 0.0
    c.model.image_loss.adversarial_weight_late = 0.0
    c.optimizer.name = "adamw"
    c.optimizer.lr = 2e-3
    c.train.steps = 5700
    c.evaluate.verifier = True
    return c
