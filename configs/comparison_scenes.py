"""Ways of an image into one transformer, on scenes, all else alike (docs/comparison.md). Hardware: 2 CPU cores.

Variants: "codes" (DDT tokens), "unordered" (codes of `quickstart.py:unordered`), "seed" (of `seed_scenes.py`),
"spatial" (Chameleon); "transfusion" (denoised pixels), "blocks" (the same block by block beside clean ones, as ACDiT).
A variant of codes takes the folder of its tokenizer and codes: "codes:runs/mine"; without it runs/comparison/ARM.

From `llama_scenes.py` all take backbone, optimizer, rows of a batch, text, formats and how they are evaluated;
from Chameleon's recipe QK-norm and z-loss. A row holds two documents in each, so that equal steps see equal data;
`context` is what these take. `tools/compare.py` trains them, with the steps and rates of `sweeps/image_languages.py`.
"""

from ddt_jax import config
from ddt_jax.errors import UserError

CODES, PATCHES = 16, 64  # that an image is
DOCUMENTS, CONTEXT = 2, 80  # of a row; shorter ones leave long captions alone
SIBLINGS = dict.fromkeys(("codes", "unordered", "seed"), "llama_scenes")
SIBLINGS |= {"spatial": "llama_spatial_scenes", "transfusion": "transfusion_scenes", "blocks": "transfusion_scenes"}
RECORDS = 80_000  # images that denoised arms learn from; as many as `sweeps/image_languages.py` makes codes of
ROWS = {"transfusion": PATCHES, "blocks": 2 * PATCHES}  # of an image that is no codes; blocks have noised copies


def get_config(variant="codes"):
    arm, _, root = variant.partition(":")
    if arm not in SIBLINGS:
        raise UserError(f"config: comparison_scenes has no arm {arm!r}; choose from {', '.join(SIBLINGS)}")
    root = root or f"runs/comparison/{arm}"
    both = config.sibling(__file__, "llama_scenes").get_config(root)
    own = config.sibling(__file__, SIBLINGS[arm])
    denoised = {"transfusion": "linear", "blocks": "blocks"}  # variants of transfusion_scenes.py
    c = own.get_config(denoised.get(arm, root))
    c.name = f"comparison_scenes_{arm}"
    for name in ("optimizer", "train", "evaluate"):
        c[name] = both[name]
    c.model.transformer = both.model.transformer
    c.model.transformer.qk_norm, c.model.transformer.z_loss = True, 1e-5
    c.model.whole_prompts = both.model.whole_prompts
    c.sequences.images = DOCUMENTS
    c.sequences.context = CONTEXT + DOCUMENTS * (ROWS.get(arm, CODES) - CODES)
    c.sequences.targets, c.sequences.text_vocab_size = both.sequences.targets, both.sequences.text_vocab_size
    for part in c.sequences.sources:
        if part["kind"] == "pictures":
            part["records"] = RECORDS
    for parts in (c.sequences.sources, c.sequences.eval_sources):
        for part in parts:
            part["formats"], part["weight"] = both.sequences.sources[0]["formats"], 1.0
    c.evaluate.prompts = 512
    c.evaluate.images = 2048  # all held-out documents, in whichever order rows hold them
    return c
