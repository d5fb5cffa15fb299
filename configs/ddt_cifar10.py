"""DDT tokenizer on CIFAR-10 from Parquet files: 64 tokens of 4,096 codes. Hardware: 2 CPU cores, 8 to 10 minutes.

Expect 22.3 dB on the last shard, where PCA with 32 coefficients gives 19.9 (docs/soak/cifar10.json).
"""

from ddt_jax import config


def get_config():
    c = config.defaults()
    c.name = "ddt_cifar10"
    c.data.source = "parquet:${DDT_JAX_DATA}/cifar10/train-0000[0-3]-of-00005.parquet"
    c.data.eval_source = "parquet:${DDT_JAX_DATA}/cifar10/train-00004-of-00005.parquet"
    c.data.flip = True
    c.model.num_tokens = 64
    c.model.encoder_depth = 1
    c.model.decoder_depth = 3
    c.model.quantizer.codebook_size = 4096
    c.model.quantizer.decay = 0.98  # half a hit per code and step
    c.optimizer.newton_schulz_steps = 4
    c.optimizer.decay_fraction = 0.5
    c.train.steps = 1600
    return c
