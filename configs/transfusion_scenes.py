"""Transfusion on scenes at 32 px, in pixels: one transformer writes text and denoises images. Hardware: 2 CPU cores.

The default, "linear", is what a small transformer needs to follow captions: rectified flow with much noise, patches
that know their places, prompts that are seen whole and as they are. Variants of it: "unet" (a small U-Net in place of
linear maps), "causal" (without attention forwards inside an image that is drawn), "blocks" (four blocks one after
another beside clean ones, as ACDiT), "plain" (prompts are learned as answers are; images before captions have noise up
to a limit), "unlimited" (plain, without that limit), "published" (plain, DDPM that predicts the noise, no places).
About 17 minutes; docs/transfusion.md has what came of it.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError

SOURCES = (("train", 160_000), ("heldout", 2048))  # records, as many as `make quickstart` takes
VARIANTS = ("linear", "unet", "causal", "blocks", "plain", "unlimited", "published")


def get_config(variant="linear"):
    if variant not in VARIANTS:
        raise UserError(f"config: transfusion_scenes has no variant {variant!r}; choose from {', '.join(VARIANTS)}")
    c = config.defaults()
    c.name = f"transfusion_scenes_{variant}"
    coder = settings.LinearCoder(places=variant != "published")
    image = settings.DiffusionImages(
        patch_size=4,  # 48 values: a linear map to 96 cannot carry the noise of 8 x 8 pixels (docs/transfusion.md)
        block_size=16 if variant == "blocks" else 0,
        coder=settings.UNetCoder(width=128, blocks=1) if variant == "unet" else coder,
        attention="causal" if variant == "causal" else "bidirectional",
        noise_limit=1.0 if variant == "unlimited" else 0.5,
        # What a caption decides is decided near pure noise: the shift looks there more often.
        diffusion=settings.DDPM(clip=1.0) if variant == "published" else settings.RectifiedFlow(clip=1.0, shift=3.0),
    )
    c.model = config.defaults(settings.Multimodal, image=image)
    c.model.transformer = config.sibling(__file__, "llama_scenes").get_config().model.transformer  # to compare with
    c.model.whole_prompts = variant not in ("plain", "unlimited", "published")
    # Images alone are what guidance takes.
    formats = settings.Formats(text_to_image=0.55, image_to_text=0.37, image_only=0.08)
    train, held_out = (settings.Pictures(source=f"scenes:{x}", records=n, formats=formats) for x, n in SOURCES)
    c.sequences.sources, c.sequences.eval_sources = (config.dump(train),), (config.dump(held_out),)
    c.sequences.context, c.sequences.targets = 192, 96  # two images with their captions; patches are no targets
    if variant == "blocks":
        c.sequences.context += 128  # and noised copies of both
    c.sequences.text_vocab_size = 384  # 256 bytes, and the words of scenes
    c.optimizer.lr = 4e-3
    c.optimizer.newton_schulz_steps = 4
    c.optimizer.decay_fraction = 0.5
    c.train.batch_size = 16
    c.train.steps = 7500
    c.evaluate.verifier = True
    return c
