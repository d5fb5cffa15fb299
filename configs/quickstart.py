"""DDT tokenizer on procedural scenes at 32 px: 16 tokens of 512 codes. Hardware: 2 CPU cores, about 5 minutes."""

from ddt_jax import config


def get_config():
    c = config.defaults()
    c.name = "quickstart"
    c.evaluate.verifier = True
    return c
