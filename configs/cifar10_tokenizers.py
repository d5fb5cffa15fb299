"""Image tokenizers of CIFAR-10 whose codes `comparison_cifar10.py` compares: 64 of 4,096. Hardware: 2 CPU cores.

Variants: "ddt", as `ddt_cifar10.py`; "unordered", whose decoder always sees all tokens; "spatial", an 8 x 8 grid; and
the stages of SEED's, each of which begins with the one before (`--config.init_from=DIR`): "seed_align", "seed_codes",
"seed_draw". All else is as on scenes. Captions are the names of classes, which only SEED's read.
"""

from ddt_jax import config
from ddt_jax.errors import UserError

VARIANTS = ("ddt", "unordered", "spatial", "seed_align", "seed_codes", "seed_draw")
SOURCE = "parquet:${DDT_JAX_DATA}/cifar10/train-0000[0-3]-of-00005.parquet?caption=label"
HELD_OUT = "parquet:${DDT_JAX_DATA}/cifar10/train-00004-of-00005.parquet?caption=label"
CODES, CODEBOOK = 64, 4096


def get_config(variant="ddt"):
    if variant not in VARIANTS:
        raise UserError(f"config: {variant!r} is no variant of cifar10_tokenizers; choose from {', '.join(VARIANTS)}")
    system, _, stage = variant.partition("_")
    if system == "spatial":
        c = config.sibling(__file__, "spatial_scenes").get_config()
        c.model.block_out_channels = (16, 32, 64)  # two halvings: a code for 4 x 4 pixels
    elif system == "seed":
        c = config.sibling(__file__, "seed_scenes").get_config(stage)
        c.model.num_tokens = CODES
        c.model.vision.patch_size = 4
    else:
        c = config.sibling(__file__, "ddt_cifar10").get_config()
        if system == "unordered":
            c.model.schedule.groups = 1  # all at once
    c.name = f"cifar10_{variant}"
    c.data.source, c.data.eval_source = SOURCE, HELD_OUT
    c.data.flip = True
    c.model.quantizer.codebook_size = CODEBOOK
    c.evaluate.verifier = False
    return c
