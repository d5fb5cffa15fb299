"""DDT-LLaMA: LLaMA-3-8B on text and 480 codes of 65,536 per image (arXiv 2504.14666). Hardware: a pod; not run here.

Published: the backbone, the vocabulary, the sequence, cross-entropy on all tokens, two stages (about 200 M pairs with
some 10 % of text alone; then instruction tuning with the loss on answers). Not published: rates, batch, steps, context
and mixture of the second stage; those here are ours. Variants: "pretrain" and "instruct".

    ddt-jax import llama --from Meta-Llama-3-8B --workdir llama3_8b --vocab-size 193920
    ddt-jax tokenize --workdir TOKENIZER --source 'webdataset:...' --to codes/pairs --text llama3_8b/source
    ddt-jax train --config configs/ddt_llama_8b.py --workdir pretrain
    ddt-jax train --config configs/ddt_llama_8b.py:instruct --workdir instruct
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError


def get_config(variant="pretrain"):
    c = config.defaults()
    c.name = f"ddt_llama_8b_{variant}"
    c.model = config.defaults(settings.Multimodal)
    t = c.model.transformer
    t.width, t.depth, t.heads, t.kv_heads, t.mlp_width = 4096, 32, 32, 8, 14_336
    t.vocab_size = 193_920  # 128,256 of text, 65,536 codes, marks and spare ids
    t.dtype, t.remat, t.loss_chunk = "bfloat16", "full", 1024
    c.model.image.num_tokens, c.model.image.codebook_size = 480, 65_536
    c.mesh.data, c.mesh.fsdp = -1, 32  # from 64 chips on: docs/plan.md
    c.sequences.text = "llama3_8b/source"
    c.sequences.vocab_multiple = 128
    c.sequences.context = 4096
    c.sequences.truncate = True
    c.optimizer.name = "adamw"
    c.optimizer.b1, c.optimizer.b2, c.optimizer.weight_decay = 0.9, 0.95, 0.1
    c.optimizer.schedule, c.optimizer.final_lr_fraction = "cosine", 0.1
    c.train.batch_size = 1024  # rows of 4,096 positions: 4.2 M tokens
    c.train.ema = 0.0
    c.train.checkpoint_every = 1000
    if variant == "pretrain":
        formats = settings.Formats(text_to_image=0.45, image_to_text=0.35, text_only=0.1, image_only=0.1)
        folder, c.init_from = "codes/pairs", "llama3_8b"
        c.optimizer.lr, c.optimizer.warmup, c.train.steps = 1e-4, 2000, 30_000  # about 200 M pairs
    elif variant == "instruct":
        formats = settings.Formats(own=1.0)
        folder, c.init_from = "codes/instructions", "pretrain"
        c.optimizer.lr, c.optimizer.warmup, c.train.steps = 2e-5, 100, 3000
    else:
        raise UserError(f"config: {variant!r} is no variant of ddt_llama_8b; choose pretrain or instruct")
    c.sequences.sources = (config.dump(settings.CodesFolder(folder=folder, formats=formats)),)
    return c
