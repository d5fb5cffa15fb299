"""The LLaMA of `llama_scenes.py` on the codes of `seed_scenes.py`: the same documents, backbone, context and steps.

Both spend 16 codes of 512 on an image. Hardware: 2 CPU cores. With R = runs/seed or another folder:

    ddt-jax train --config configs/seed_scenes.py:align --workdir R/align
    ddt-jax train --config configs/seed_scenes.py:codes --workdir R/codes --config.init_from=R/align
    ddt-jax train --config configs/seed_scenes.py:draw --workdir R/draw --config.init_from=R/codes
    ddt-jax tokenize --workdir R/codes --to R/train_codes --records 160000
    ddt-jax tokenize --workdir R/codes --to R/heldout_codes --source scenes:heldout --records 2048
    ddt-jax train --config configs/seed_llama_scenes.py:R --workdir R/transformer

Pictures are drawn by the run R/draw, whose codes are those of R/codes. Expect 1.2 % of the pictures of captions and
4.7 % of the captions of pictures to be fully right (docs/soak/seed_codes.json).
"""

from ddt_jax import config


def get_config(root="runs/seed"):
    c = config.sibling(__file__, "llama_scenes").get_config(root)
    c.name = "seed_llama_scenes"
    c.sequences.tokenizer = f"{root}/draw"
    for name, split in (("sources", "train"), ("eval_sources", "heldout")):
        (codes,) = c.sequences[name]
        c.sequences[name] = ({**codes, "folder": f"{root}/{split}_codes"},)
    return c
