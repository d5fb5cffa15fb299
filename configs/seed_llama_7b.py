"""SEED-LLaMA: Vicuna-7B on text and 32 codes of 8,192 per image, by LoRA (arXiv 2310.01218). A pod; not run here.

Published, in the project's code: the base, the vocabulary, low-rank updates and what is trained whole beside them,
rates, weights of the mixture, both directions alike, the loss on all tokens, and in the second stage on answers alone.
Rows of a batch are ours (theirs: 26 of 1,024 positions on each device, in 4 parts). Left out: WebVid's four frames,
interleaved documents with the image behind its text, and the stage between the two variants, in which all but the
embeddings is trained on merged weights, of which nothing but that is published. Variants: "pretrain" and "instruct".

    ddt-jax import llama --from vicuna-7b-v1.1 --workdir vicuna_7b --vocab-size 40320
    ddt-jax tokenize --workdir TOKENIZER --source 'webdataset:...' --to codes/pairs --text vicuna_7b/source
    ddt-jax train --config configs/seed_llama_7b.py --workdir pretrain
    ddt-jax export llama --workdir pretrain --to merged
    ddt-jax import llama --from merged --workdir seed_llama_7b
    ddt-jax train --config configs/seed_llama_7b.py:instruct --workdir instruct
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError


def get_config(variant="pretrain"):
    c = config.defaults()
    c.name = f"seed_llama_7b_{variant}"
    c.model = config.defaults(settings.Multimodal)
    t = c.model.transformer
    t.width, t.depth, t.heads, t.kv_heads, t.mlp_width = 4096, 32, 32, 32, 11_008
    t.rope_theta, t.norm_epsilon = 10_000.0, 1e-6
    t.vocab_size = 40_320  # 32,000 of text, 8,192 codes, marks and spare ids
    t.dtype, t.remat, t.loss_chunk = "bfloat16", "full", 1024
    t.lora.rank, t.lora.alpha, t.lora.dropout = 16, 32.0, 0.05
    t.lora.targets = ("query", "key", "value", "output", "gate", "up", "down")
    t.lora.whole = ("embed", "head", "norms")
    c.model.image.num_tokens, c.model.image.codebook_size = 32, 8192
    c.mesh.data, c.mesh.fsdp = -1, 32
    c.sequences.text = "vicuna_7b/source"
    c.sequences.vocab_multiple = 128
    c.sequences.context, c.sequences.truncate = 1024, True
    c.optimizer.name, c.optimizer.schedule = "adamw", "cosine"
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps, c.optimizer.weight_decay = 0.9, 0.95, 1e-5, 0.05
    c.train.ema = 0.0
    c.train.checkpoint_every = 1000
    if variant == "pretrain":
        both = settings.Formats(text_to_image=0.5, image_to_text=0.5)
        own = settings.Formats(own=1.0)
        parts = [
            settings.CodesFolder(folder="codes/pairs", weight=0.5, formats=both),  # Unsplash, CC3M, COCO
            settings.CodesFolder(folder="codes/laion_coco", weight=5.0, formats=both),
            settings.CodesFolder(folder="codes/mmc4", weight=2.0, formats=own),
            settings.CodesFolder(folder="codes/obelics", weight=1.0, formats=own),
            settings.Texts(source="parquet:wikipedia/*.parquet", split=True, weight=1.0),
        ]
        c.init_from = "vicuna_7b"
        c.optimizer.lr, c.optimizer.final_lr_fraction = 1.5e-4, 0.05
        c.train.steps, c.optimizer.warmup = 30_000, 900
        c.train.batch_size, c.train.accumulate = 2048, 4
    elif variant == "instruct":
        parts = [settings.CodesFolder(folder="codes/instructions", formats=settings.Formats(own=1.0))]
        c.init_from = "seed_llama_7b"
        c.optimizer.lr, c.optimizer.final_lr_fraction = 1e-4, 0.1
        c.train.steps, c.optimizer.warmup = 50_000, 3500
        c.train.batch_size = 512
    else:
        raise UserError(f"config: {variant!r} is no variant of seed_llama_7b; choose pretrain or instruct")
    c.sequences.sources = tuple(config.dump(part) for part in parts)
    return c
