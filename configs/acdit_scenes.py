"""ACDiT on scenes at 32 px, in pixels: four blocks, each denoised beside the clean ones. Hardware: 2 CPU cores.

Images are told how many objects they show. Variants: "quarters", "dit" (one block, which is a DiT), "fours" (16 blocks
of four tokens), "tokens" (64 blocks of one token), "captions" (quarters, told captions in the place of counts),
"published" (quarters, DDPM with linear β that predicts the noise). All others learn the velocity of a flow, near noise
more often, with tokens that know their places, as `transfusion_scenes.py`.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError

BLOCKS = {"quarters": 16, "dit": 64, "fours": 4, "tokens": 1, "captions": 16, "published": 16}  # tokens of a block


def get_config(variant="quarters"):
    if variant not in BLOCKS:
        raise UserError(f"config: acdit_scenes has no variant {variant!r}; choose from {', '.join(BLOCKS)}")
    c = config.defaults()
    c.name = f"acdit_scenes_{variant}"
    c.model = config.defaults(
        settings.ACDiT,
        patch_size=4,  # 48 values, which fit into the width
        block_size=BLOCKS[variant],
        depth=4,
        width=96,
        heads=4,
        classes=0 if variant == "captions" else 4,  # no object to three
        caption_bytes=192 if variant == "captions" else 0,  # the longest has 181
        codec=settings.IdentityCodec(),
    )
    c.model.scan_layers = False  # four layers: on CPU a step takes 0.8 of the time of scanned ones
    c.model.places = variant != "published"
    published = settings.DDPM(schedule="linear", solver="dpmpp_2m", solver_steps=25, clip=1.0)
    flow = settings.RectifiedFlow(shift=3.0, solver="dpmpp_2m", solver_steps=25, clip=1.0)
    c.model.diffusion = config.dump(published if variant == "published" else flow)
    c.optimizer.lr = 2e-3
    c.optimizer.newton_schulz_steps = 4
    c.optimizer.decay_fraction = 0.5
    c.train.steps = 3000
    c.train.ema = 0.995
    c.evaluate.pictures = 24
    c.evaluate.verifier = True
    return c
