"""The convolutional autoencoder under latent tokenizers, from scratch: L1, LPIPS, a discriminator and a little KL.

The default is SD3's network at 256 px on ImageNet as Parquet files in the data folder, meant for 8 accelerators;
`--config.data.source=parquet:...` and `data.eval_source` for other places. LPIPS takes its weights from
`--config.model.image_loss.lpips_backbone_file=vgg16.pth` and `--config.model.image_loss.lpips_heads_file=vgg.pth`.
It has never been trained here, so no figure is given.

`vae.py:small` learns 32 px scenes on 2 CPU cores, without LPIPS.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError


def get_config(variant="imagenet"):
    if variant not in ("imagenet", "small"):
        raise UserError(f"config: {variant!r} is no variant of vae; choose imagenet or small")
    c = config.defaults()
    c.name = "vae"
    c.model = config.defaults(settings.VAE)
    c.optimizer.name = "adamw"
    c.optimizer.weight_decay = 0.0
    if variant == "small":
        c.model.sizes.block_out_channels = (16, 32, 64)
        c.model.sizes.layers_per_block = 1
        c.model.sizes.norm_groups = 8
        c.model.sizes.latent_channels = 4
        c.model.image_loss.lpips_weight = c.model.image_loss.lpips_weight_late = 0.0
        c.model.image_loss.adversarial_weight_late = 0.02  # the discriminator of small pictures is soon too good
        c.model.image_loss.late_from = 1000
        c.model.image_loss.discriminator.width = 16
        c.model.image_loss.discriminator.layers = 2
        c.optimizer.lr = 1e-3
        c.train.steps = 2000
        return c
    c.data.source = "parquet:${DDT_JAX_DATA}/imagenet/train-*.parquet"
    c.data.eval_source = "parquet:${DDT_JAX_DATA}/imagenet/val-*.parquet"
    c.data.image_size = 256
    c.data.crop = "random"
    c.data.flip = True
    c.data.threads = 16
    c.model.dtype = "bfloat16"
    c.model.remat = True
    c.optimizer.lr = 1e-4
    c.optimizer.schedule = "constant"
    c.optimizer.warmup = 1000
    c.optimizer.b1, c.optimizer.b2 = 0.5, 0.9
    c.optimizer.discriminator.lr = 1e-4
    c.train.steps = 250_000
    c.train.batch_size = 96
    c.train.ema = 0.9999
    c.train.log_every = 100
    c.train.checkpoint_every = 1000
    c.evaluate.images = 10_000
    c.evaluate.batch_size = 64
    return c
