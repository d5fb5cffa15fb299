"""SEED on procedural scenes at 32 px, from nothing: vision, causal Q-Former and captions; then codes; then a decoder.

    ddt-jax train --config configs/seed_scenes.py:align --workdir runs/seed/align
    ddt-jax train --config configs/seed_scenes.py:codes --workdir runs/seed/codes --config.init_from=runs/seed/align
    ddt-jax train --config configs/seed_scenes.py:draw --workdir runs/seed/draw --config.init_from=runs/seed/codes

Variants with other arms: "align_bidirectional", whose queries see each other, and "codes_published", the published
codebook. Sized for 2 CPU cores, 13 minutes for the first two stages and 6 to 8 for the third; docs/seed.md has what
came of them.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError

VARIANTS = ("align", "align_bidirectional", "codes", "codes_published", "draw")


def get_config(variant="align"):
    if variant not in VARIANTS:
        raise UserError(f"config: {variant!r} is no variant of seed_scenes; choose from {', '.join(VARIANTS)}")
    c = config.defaults()
    c.name = f"seed_scenes_{variant}"
    c.model = config.defaults(settings.SEED)
    stage, _, arm = variant.partition("_")
    c.model.stage = stage
    c.model.causal = arm != "bidirectional"
    c.model.num_tokens = 16
    c.model.vision.patch_size = 8  # a quarter of an object's cell
    c.model.vision.depth, c.model.vision.width, c.model.vision.mlp_width = 2, 96, 384
    c.model.qformer.depth, c.model.qformer.width, c.model.qformer.mlp_width = 2, 96, 384
    c.model.qformer.cross_every = 1
    c.model.text.depth, c.model.text.width, c.model.text.mlp_width = 2, 96, 384
    c.model.text.vocab_size, c.model.text.length = 384, 40  # 256 bytes and words of scenes, of which a caption has 38
    c.model.contrast.width = 64
    c.model.contrast.label_smoothing = 0.0  # captions of other images are wrong, not a little right
    c.model.quantizer.codebook_size, c.model.quantizer.code_dim = 512, 16
    c.model.embedding_depth = c.model.features_depth = 2
    c.model.draw.width, c.model.draw.depth = 96, 3
    c.optimizer.lr = 4e-3
    c.optimizer.newton_schulz_steps = 4
    c.optimizer.decay_fraction = 0.5
    c.train.batch_size = 128
    c.train.steps = {"align": 1200, "codes": 2800, "draw": 3000}[stage]
    c.train.ema = 0.99
    c.evaluate.images = 1000  # the gallery
    c.evaluate.verifier = stage == "draw"
    if arm == "published":
        c.model.recipe, c.model.quantizer.commitment = "l2-legacy", 5.0
    if stage == "draw":
        c.train.batch_size = 32
    return c
