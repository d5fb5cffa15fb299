"""ACDiT on CIFAR-10 in pixels, by class: four blocks of 16 x 16 pixels. Hardware: 2 CPU cores.

All as in acdit_scenes.py but the data, its ten classes and the guidance of the paper.
"""

from ddt_jax import config
from ddt_jax.errors import UserError


def get_config(variant="quarters"):
    if variant == "captions":
        raise UserError("config: acdit_cifar10 has no variant 'captions', as its images have none; leave it out")
    c = config.sibling(__file__, "acdit_scenes").get_config(variant)
    c.name = f"acdit_cifar10_{variant}"
    c.data.source = "parquet:${DDT_JAX_DATA}/cifar10/train-0000[0-3]-of-00005.parquet"
    c.data.eval_source = "parquet:${DDT_JAX_DATA}/cifar10/train-00004-of-00005.parquet"
    c.data.flip = True
    c.model.classes = 10
    c.evaluate.pictures = 40
    c.evaluate.verifier = False
    return c
