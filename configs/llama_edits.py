"""The LLaMA of `llama_scenes.py` that also learns to edit pictures: half of the rows are edits of scenes.

Hardware: 2 CPU cores. With the tokenizer and the codes that `make quickstart` puts in R = runs/quickstart:

    ddt-jax tokenize --workdir R/tokenizer --source scenes_edits:train --to R/edits/train --records 80000
    ddt-jax tokenize --workdir R/tokenizer --source scenes_edits:heldout --to R/edits/heldout --records 2048
    ddt-jax train --config configs/llama_edits.py:R --workdir R/editor
"""

from ddt_jax import config, settings


def get_config(root="runs/quickstart"):
    c = config.sibling(__file__, "llama_scenes").get_config(root)
    c.name = "llama_edits"
    for name, split in (("sources", "train"), ("eval_sources", "heldout")):
        edits = settings.CodesFolder(folder=f"{root}/edits/{split}", formats=settings.Formats(own=1.0))
        c.sequences[name] = (*c.sequences[name], config.dump(edits))
    return c
