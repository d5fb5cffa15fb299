"""SEED-OPT's two phases (arXiv 2307.08041 §3) on LLaMA-3.2-3B, as OPT itself is not read. A pod; not run here.

Published: the language model stands but for low-rank updates; codes enter as vectors of the codebook through a learned
linear map; first images are described, with the loss on captions alone, then they are also drawn, with the
loss on codes alone. Not published: ranks, rates, batch, steps, and the shares of the two; those here are ours. Theirs
also say "A photo of" and "Generate an image"; here what stands first says which it is. Variants: "describe", "joint".

    ddt-jax import llama --from Llama-3.2-3B --workdir llama3.2_3b --vocab-size 136576
    ddt-jax tokenize --workdir TOKENIZER --source 'webdataset:...' --to codes/pairs --text llama3.2_3b/source
    ddt-jax train --config configs/seed_opt.py --workdir describe
    ddt-jax train --config configs/seed_opt.py:joint --workdir joint
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError

# Shares of documents.
PHASES = {
    "describe": settings.Formats(image_to_text=1.0),
    "joint": settings.Formats(image_to_text=0.5, text_to_image=0.5),
}


def get_config(variant="describe"):
    if variant not in PHASES:
        raise UserError(f"config: {variant!r} is no variant of seed_opt; choose from {', '.join(PHASES)}")
    c = config.defaults()
    c.name = f"seed_opt_{variant}"
    c.model = config.defaults(settings.Multimodal)
    t = c.model.transformer
    t.width, t.depth, t.heads, t.kv_heads, t.mlp_width, t.head_dim = 3072, 28, 24, 8, 8192, 128
    t.tied_head = True
    t.rope_scaling.kind, t.rope_scaling.factor = "llama3", 32.0
    t.vocab_size = 136_576  # 128,256 of text, 8,192 codes, marks and spare ids
    t.dtype, t.remat, t.loss_chunk = "bfloat16", "full", 1024
    t.lora.rank, t.lora.alpha, t.lora.dropout = 16, 32.0, 0.05
    t.lora.targets = ("query", "key", "value", "output", "gate", "up", "down")
    c.model.image.num_tokens, c.model.image.codebook_size = 32, 8192
    c.model.image.code_vectors, c.model.image.code_width = True, 32
    c.mesh.data, c.mesh.fsdp = -1, 32
    c.sequences.text = "llama3.2_3b/source"
    c.sequences.vocab_multiple = 128
    c.sequences.context, c.sequences.truncate = 1024, True
    c.sequences.answers_only = True
    c.sequences.sources = (config.dump(settings.CodesFolder(folder="codes/pairs", formats=PHASES[variant])),)
    c.optimizer.name, c.optimizer.schedule = "adamw", "cosine"
    c.optimizer.b1, c.optimizer.b2, c.optimizer.weight_decay = 0.9, 0.95, 0.05
    c.optimizer.lr, c.optimizer.final_lr_fraction, c.optimizer.warmup = 1e-4, 0.1, 500
    c.init_from = "llama3.2_3b" if variant == "describe" else "describe"
    c.train.steps, c.train.batch_size = 10_000, 512
    c.train.ema = 0.0
    c.train.checkpoint_every = 1000
    return c
