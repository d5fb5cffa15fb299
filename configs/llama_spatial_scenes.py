"""The Chameleon recipe on scenes: the LLaMA of `llama_scenes.py`, same data, context and steps, on spatial codes.

What Chameleon (arXiv 2405.09818) adds to LLaMA against divergence: norms of queries and keys, and a z-loss of 1e-5. To
compare codes alone, give `llama_scenes.py` the same two. Hardware: 2 CPU cores; the tokenizer 30 minutes, this 8.

With R = runs/spatial or another folder:

    ddt-jax train --config configs/spatial_scenes.py --workdir R/tokenizer
    ddt-jax tokenize --workdir R/tokenizer --to R/codes/train --records 160000
    ddt-jax tokenize --workdir R/tokenizer --to R/codes/heldout --source scenes:heldout --records 2048
    ddt-jax train --config configs/llama_spatial_scenes.py:R --workdir R/transformer
"""

from ddt_jax import config


def get_config(root="runs/spatial"):
    c = config.sibling(__file__, "llama_scenes").get_config(root)
    c.name = "llama_spatial_scenes"
    c.model.transformer.qk_norm = True
    c.model.transformer.z_loss = 1e-5
    return c
