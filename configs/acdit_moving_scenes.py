"""ACDiT on moving scenes: clips of 16 frames at 32 px, in pixels, four frames at a time. Hardware: 2 CPU cores.

Clips are told where their objects go (12 classes). Variants: "fours" (blocks of four frames), "frames" (of one), "dit"
(one block), "captions" (fours, told captions in the place of classes), "published" (fours, noised as in the paper, see
`acdit_scenes.py`).
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError

FRAMES, FRAME_TOKENS = 16, 16
BLOCKS = {"fours": 4, "frames": 1, "dit": FRAMES, "captions": 4, "published": 4}  # frames of a block


def get_config(variant="fours"):
    if variant not in BLOCKS:
        raise UserError(f"config: acdit_moving_scenes has no variant {variant!r}; choose from {', '.join(BLOCKS)}")
    c = config.sibling(__file__, "acdit_scenes").get_config("published" if variant == "published" else "quarters")
    c.name = f"acdit_moving_scenes_{variant}"
    c.data.source, c.data.eval_source = "moving_scenes:train", "moving_scenes:heldout"
    c.data.frames = FRAMES
    c.data.clip_start = "random"
    diffusion = c.model.diffusion
    if variant != "published":
        # A token has as many values as a row: the noise, or a velocity with the noise in it, would fill the row alone.
        diffusion.prediction = "x0"
    c.model = config.defaults(
        settings.ACDiT,
        patch_size=8,
        block_size=BLOCKS[variant] * FRAME_TOKENS,
        depth=4,
        width=192,  # as many as a token has values
        heads=6,
        classes=0 if variant == "captions" else 12,
        caption_bytes=176 if variant == "captions" else 0,  # the longest has 171
        codec=settings.IdentityCodec(),
    )
    c.model.diffusion = diffusion
    c.model.places = variant != "published"
    c.train.batch_size = 8
    c.evaluate.images = 256
    c.evaluate.batch_size = 32
    c.evaluate.pictures = 12
    c.evaluate.probe_images = 1024
    return c
