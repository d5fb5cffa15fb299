"""What learning images costs a language model's text: the same text alone, or beside images. Hardware: 2 CPU cores.

Variants, each with the folder that holds text/train.parquet and text/heldout.parquet: "alone:ROOT"; "pixels:ROOT", half
of the rows are scenes that are denoised; "codes:ROOT", half are DDT codes of scenes, from ROOT/codes/train and the
tokenizer ROOT/tokenizer. Half of the rows in twice the steps: the same text, in twice as many updates. So both are held
against "updates:ROOT", text alone with half the rows in twice the steps. `python tools/soak.py text_beside_images`
trains all four.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError

VARIANTS = ("alone", "updates", "pixels", "codes")
ROWS, STEPS = 16, 200  # the text file twice; at seven times what is seen again and again is learned by heart


def get_config(variant="alone"):
    arm, _, root = variant.partition(":")
    if arm not in VARIANTS:
        raise UserError(f"config: text_beside_images has no variant {arm!r}; choose from {', '.join(VARIANTS)}")
    root = root or "runs/text"
    c = config.sibling(__file__, "llama_scenes" if arm == "codes" else "transfusion_scenes").get_config(
        *([root] if arm == "codes" else [])
    )
    c.name = f"text_beside_images_{arm}"
    text, held_out = (settings.Texts(source=f"parquet:{root}/text/{x}.parquet") for x in ("train", "heldout"))
    pictures = c.sequences.sources[:1] if arm in ("pixels", "codes") else ()
    c.sequences.sources = (config.dump(text), *({**part, "weight": 1.0} for part in pictures))
    c.sequences.eval_sources = (config.dump(held_out),)
    c.sequences.truncate = True
    c.sequences.context = 192
    c.sequences.targets = 0  # all of a row of text
    c.optimizer.lr = 3e-3
    c.train.batch_size = ROWS // 2 if arm == "updates" else ROWS
    c.train.steps = STEPS if arm == "alone" else 2 * STEPS
    c.evaluate.verifier = False
    return c
