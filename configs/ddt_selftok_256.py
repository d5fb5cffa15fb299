"""The released Selftok tokenizer at 256 px: 512 tokens of 32,768 codes, 2.2 B parameters. Hardware: a pod.

Variants are the members of the family, of which only "xl" is published: small (0.05 B parameters), base (0.30 B),
large (0.96 B), xl. The sizes of the others follow from the number of blocks (`settings.selftok_size`). With
"_renderer", as "xl_renderer", it is the second stage, a one-step decoder for the codes of the run in
`--config.init_from=DIR`; a published renderer is imported by it too. "xl_sd3" is for a decoder that starts from SD3
(docs/interop.md): its image stream learns at a fifth of the rate, as published.

Needs the autoencoder of SD3 as `--config.model.codec.weights=FILE.safetensors` (diffusers' layout), and ImageNet as
Parquet files, here in the data folder; elsewhere with `--config.data.source=parquet:...` and `data.eval_source`.

Networks, quantizer, schedule, batch and betas are the released ones (arXiv 2505.07538 and its inference code). Where
the letter can't train or is not known: codes are taken from the data once the features of different images differ
(the letter is `model.quantizer.init="first_batch"`: as many distinct codes as tokens, for all images begin with the
same features), and but for "xl_sd3" the decoder starts from scratch, not from SD3, with one rate for all. It has
never been trained to its end here, so no figure is given. The published headline figures are those of the one-step
renderer.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError


def get_config(variant="xl"):
    c = config.defaults()
    c.name = "ddt_selftok_256" if variant == "xl" else f"ddt_selftok_256_{variant}"
    c.data.source = "parquet:${DDT_JAX_DATA}/imagenet/train-*.parquet"
    c.data.eval_source = "parquet:${DDT_JAX_DATA}/imagenet/val-*.parquet"
    c.data.image_size = 256
    c.data.threads = 16
    size, _, stage = variant.partition("_")
    if stage not in ("", "renderer", "sd3"):
        raise UserError(f"config: {variant!r} is no variant of ddt_selftok_256; choose SIZE, SIZE_renderer or SIZE_sd3")
    c.model = config.defaults(settings.SelftokTokenizer, **settings.selftok_size(size, stage == "renderer"))
    if stage == "renderer":
        c.model.stage = "decoder"
    if stage == "sd3":  # patches, and of all blocks what is not of the stream of tokens
        parts = ("decoder/embed/*", "decoder/*/joint/[!t]*")
        c.optimizer.parts = tuple(config.dump(settings.PartRate(part=part, times=0.2)) for part in parts)
    c.model.dtype = "bfloat16"
    c.model.codec.dtype = "bfloat16"
    c.optimizer.name = "adamw"
    c.optimizer.lr = 5e-5
    c.optimizer.schedule = "constant"
    c.optimizer.warmup = 1000
    c.optimizer.b1, c.optimizer.b2 = 0.9, 0.99
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 0.0
    c.train.steps = 100_000
    c.train.batch_size = 384
    c.mesh.data, c.mesh.fsdp = (-1, 8) if size == "xl" else (1, -1)  # 8 chips or more: docs/plan.md
    c.train.ema = 0.9999
    c.train.log_every = 100
    c.train.checkpoint_every = 1000
    c.evaluate.images = 50_000
    return c
