"""ACDiT on CIFAR-10 in pixels, by class: four blocks of 16 x 16 pixels. Hardware: 2 CPU cores.

All as in acdit_scenes.py but the data, its ten classes and the guidance of the paper. Variant "classify" trains all
layers to tell the classes apart, from what a run of another variant has learned (`--config.init_from=DIR`; without it
from nothing, to compare with).
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError


def get_config(variant="quarters"):
    if variant == "captions":
        raise UserError("config: acdit_cifar10 has no variant 'captions', as its images have none; leave it out")
    c = config.sibling(__file__, "acdit_scenes").get_config("quarters" if variant == "classify" else variant)
    c.name = f"acdit_cifar10_{variant}"
    c.data.source = "parquet:${DDT_JAX_DATA}/cifar10/train-0000[0-3]-of-00005.parquet"
    c.data.eval_source = "parquet:${DDT_JAX_DATA}/cifar10/train-00004-of-00005.parquet"
    c.data.flip = True
    c.model.classes = 10
    c.evaluate.pictures = 40
    c.evaluate.verifier = False
    if variant == "classify":
        _classify(c)
    return c


def _classify(c):
    learned = c.model
    c.model = config.defaults(settings.ACDiTClassifier)
    for name in set(c.model) & set(learned) - {"kind"}:
        c.model[name] = learned[name]
    c.optimizer.name = "adamw"
    c.optimizer.lr = 1e-3
    c.optimizer.weight_decay = 0.05
    c.optimizer.b2 = 0.999
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 200
    c.train.batch_size = 64
    c.evaluate.images = 10_000
