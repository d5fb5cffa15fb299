"""The Selftok tokenizer with 1,024 tokens at 256 px, to load a published checkpoint; its token schedule is unpublished.

`ddt-jax import selftok --config configs/ddt_selftok_1024.py --from FILE.pth` makes a run of it, which encodes and can
be exported again; the variant "renderer" is for the one-step renderer, which sees all tokens and so decodes as well.
Neither training nor the flow decoder can do without a schedule, and both say so: choose one with
`--config.model.schedule.kind=uniform` (what the authors call the principled one) or another. A decoder that was trained
with a different one decodes worse.

Whatever else is not known of this model is as in the one with 512 tokens (`configs/ddt_selftok_256.py`): sizes of the
networks, places of the tokens (1000 + 8 j), quantizer. A file of other sizes is refused, with the names of its tensors.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError


def get_config(variant="flow"):
    if variant not in ("flow", "renderer"):
        raise UserError(f"config: {variant!r} is no variant of ddt_selftok_1024; choose flow or renderer")
    c = config.defaults()
    c.name = "ddt_selftok_1024" if variant == "flow" else f"ddt_selftok_1024_{variant}"
    c.data.source = "parquet:${DDT_JAX_DATA}/imagenet/train-*.parquet"
    c.data.eval_source = "parquet:${DDT_JAX_DATA}/imagenet/val-*.parquet"
    c.data.image_size = 256
    c.model = config.defaults(settings.SelftokTokenizer)
    c.model.num_tokens = 1024
    c.model.schedule = config.defaults(settings.Schedule, kind="unpublished", direction="selftok")
    if variant == "renderer":
        c.model.decoder = config.defaults(settings.SelftokRenderer)
        c.model.flow = config.defaults(settings.Flow, prediction="x0", time="uniform", shift=1.0, solver_steps=1)
    c.optimizer.name = "adamw"
    c.optimizer.lr = 5e-5
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 0.0
    c.train.ema = 0.0  # nothing has been averaged here
    return c
