"""A small LLaMA on text and the codes of scenes: the second half of `make quickstart`. Hardware: 2 CPU cores.

It reads tokenizer/, codes/train and codes/heldout in runs/quickstart, where `make quickstart` puts them, or in another
folder: "configs/llama_scenes.py:runs/mine". About 11 minutes; docs/transformer.md has what came of
pictures and captions.
"""

from ddt_jax import config, settings


def get_config(root="runs/quickstart"):
    c = config.defaults()
    c.name = "llama_scenes"
    c.model = config.defaults(settings.Multimodal)
    c.model.transformer.width, c.model.transformer.mlp_width = 96, 256
    c.model.transformer.depth, c.model.transformer.heads, c.model.transformer.kv_heads = 3, 3, 3
    c.model.transformer.scan_layers = False
    c.model.image.code_vectors = c.model.image.code_places = c.model.whole_prompts = True
    c.sequences.tokenizer = f"{root}/tokenizer"
    # Images alone are what guidance takes.
    formats = settings.Formats(text_to_image=0.4, image_to_text=0.52, image_only=0.08)
    train, held_out = (settings.CodesFolder(folder=f"{root}/codes/{x}", formats=formats) for x in ("train", "heldout"))
    c.sequences.sources, c.sequences.eval_sources = (config.dump(train),), (config.dump(held_out),)
    c.sequences.context, c.sequences.targets = 96, 64  # two documents; what is given is no target
    c.sequences.text_vocab_size = 384  # 256 bytes, and the words of scenes
    c.optimizer.lr = 3e-3
    c.optimizer.newton_schulz_steps = 4
    c.optimizer.decay_fraction = 0.5
    c.train.batch_size = 32
    c.train.steps = 6200
    c.evaluate.verifier = True
    return c
