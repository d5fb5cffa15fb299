"""ACDiT on UCF-101 as published: 16 frames at 256 px, four at a time, on latents of Stable Diffusion's autoencoder.

Arguments as VARIANT: the size, "XL" (default) or "H" (the paper's), "B" or "L". Hardware: the paper used 96 H100 GPUs
(arXiv 2412.07720 appendix B); it has not been run here. ${DDT_JAX_DATA}/ucf101/train holds a folder for each of the 101
classes, with videos (pip install 'ddt-jax[video]') or folders of frames; model.codec.weights names the autoencoder.
"""

from ddt_jax import config, settings


def get_config(variant="XL"):
    c = config.defaults()
    c.name = f"acdit_ucf101_{variant}"
    c.data.source = "video:${DDT_JAX_DATA}/ucf101/train"
    c.data.eval_source = "video:${DDT_JAX_DATA}/ucf101/test"
    c.data.image_size = 256
    c.data.frames = 16
    c.data.clip_start = "random"
    c.model = config.defaults(
        settings.ACDiT,
        **settings.acdit_size(variant),
        patch_size=2,  # 256 tokens of a frame
        block_size=1024,  # four frames
        classes=101,
        guidance=2.5,
        dtype="bfloat16",
        remat="dots",
    )
    c.optimizer.name = "adamw"
    c.optimizer.lr = 3e-4
    c.optimizer.b2 = 0.95  # of the released code; the paper names neither
    c.optimizer.weight_decay = 0.0
    c.optimizer.warmup = 0
    c.optimizer.schedule = "linear"
    c.optimizer.decay_fraction = 0.15
    c.train.steps = 400_000
    c.train.batch_size = 96
    c.train.ema = 0.9999
    c.evaluate.batch_size = 8
    c.evaluate.probe_images = 1024
    return c
