"""Transfusion at its published sizes (arXiv 2408.11039): text, and images of 256 px as 256 patches. Not run here.

Variants: "160m", "370m", "760m", "1.4b", "7b" with the linear coder, each with "_unet" (table 7), all of 0.5 T tokens;
"large", the run of section 4.4: 7B and a U-Net, 2 T. Hardware: a pod.

Published (section 4.1): sizes, patches of 2 x 2 latents of 32 x 32 x 8, rows of 4,096 tokens, 2 M of them per step and
250,000 steps (large: 4 M, 500,000), as much text as pairs by tokens, the caption first in 80 % of pairs, AdamW with its
rates, decay and clipping, the weight of the loss, DDPM with 250 of 1,000 steps, guidance 5 in table 3, 3 in table 7.
Tables 3 to 7 have no limit of noise for images that are described; 4.4 does not say, and has that of 4.3.4 here.

Not published: how often captions are dropped for guidance (here in 10 % of the pairs that begin with one), how losses
are reduced, a weight average (none here). Left out: finer images in the last 1 % of the large run; what a caption has
beyond a row. Weights of sources are shares of rows, and rows are full but for some 2 % where no further pair fits: that
is a mixture by tokens, a caption counted with its image.

Data are in TRANSFUSION_DATA (text/*.parquet, pairs/*.tar, and heldout/ with both), LLaMA-2's tokenizer.model lies here,
and vae/ is an autoencoder of ours: `configs/vae.py` with `--config.model.sizes.latent_channels=8`, then `export vae`;
its config.json says what to give as `--config.model.image.codec.sizes.scaling_factor=X` and `shift_factor`.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import backbone

SIZES = ("160m", "370m", "760m", "1.4b", "7b")
VARIANTS = (*SIZES, *(f"{size}_unet" for size in SIZES), "large")


def get_config(variant="7b"):
    if variant not in VARIANTS:
        raise UserError(f"config: transfusion_256 has no variant {variant!r}; choose from {', '.join(VARIANTS)}")
    large = variant == "large"
    size, _, unet = ("7b_unet" if large else variant).partition("_")
    c = config.defaults()
    c.name = f"transfusion_256_{variant}"
    transformer = backbone.preset(f"transfusion_{size}", vocab_size=0, dtype="bfloat16", remat="full", loss_chunk=1024)
    image = settings.DiffusionImages(
        coder=settings.UNetCoder(remat=True) if unet else settings.LinearCoder(),
        noise_limit=0.5 if large else 1.0,
        codec=settings.VAECodec(
            preset="custom",
            sizes=settings.Autoencoder(latent_channels=8, scaling_factor=1.0, shift_factor=0.0),
            weights="vae",
            dtype="bfloat16",
        ),
    )
    c.model = config.defaults(settings.Multimodal, transformer=transformer, image=image)
    c.data.image_size = 256
    c.data.threads, c.data.workers = 16, 8
    # The caption is first in 80 %, and dropped from a tenth of these.
    formats = settings.Formats(text_to_image=0.72, image_only=0.08, image_to_text=0.2)
    for name, where in (("sources", ""), ("eval_sources", "heldout/")):
        root = "${TRANSFUSION_DATA}/" + where
        text = settings.Texts(source=f"parquet:{root}text/*.parquet", split=True)
        pairs = settings.Pictures(source=f"webdataset:{root}pairs/*.tar", formats=formats)
        c.sequences[name] = (config.dump(text), config.dump(pairs))
    c.sequences.text = "tokenizer.model"
    c.sequences.vocab_multiple = 128
    c.sequences.context = 4096
    c.sequences.truncate = True
    o = c.optimizer
    o.name, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm = "adamw", 0.9, 0.95, 1e-8, 0.1, 1.0
    o.lr, o.schedule, o.warmup, o.final_lr_fraction = 3e-4, "cosine", 4000, 0.05  # to 1.5e-5
    c.train.batch_size = 1024 if large else 512  # rows of 4,096: 4.2 M or 2.1 M tokens
    c.train.steps = 500_000 if large else 250_000
    c.train.ema = 0.0
    c.train.checkpoint_every = 1000
    c.evaluate.text_to_image.guidance = 3.0 if unet else 5.0
    return c
