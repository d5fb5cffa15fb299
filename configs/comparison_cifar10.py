"""Ways of an image into one transformer, on CIFAR-10 with the names of its classes. Hardware: 2 CPU cores.

The arms of `comparison_scenes.py` on other data: "codes", "unordered", "seed" and "spatial" read 64 codes of tokenizers
in `cifar10_tokenizers.py`, "transfusion" and "blocks" denoise 64 patches: an image has as many positions in each.
Captions are "a photo of a deer"; whether a picture is one, a classifier says, which is to be trained first:

    ddt-jax train --config configs/acdit_cifar10.py:classify --workdir runs/cifar10_classes
"""

from ddt_jax import config

IMAGES = 40_000  # of the training files
CAPTION = 16  # positions that a row has for each of its documents beside the image
CLASSIFIER = "runs/cifar10_classes"


def get_config(variant="codes"):
    scenes, tokenizers = (config.sibling(__file__, name) for name in ("comparison_scenes", "cifar10_tokenizers"))
    arm, _, root = variant.partition(":")
    c = scenes.get_config(f"{arm}:{root or f'runs/comparison_cifar10/{arm}'}")
    c.name = f"comparison_cifar10_{arm}"
    for parts, source, count in (("sources", tokenizers.SOURCE, IMAGES), ("eval_sources", tokenizers.HELD_OUT, 2048)):
        for part in c.sequences[parts]:
            if part["kind"] == "pictures":
                part["source"], part["records"] = source, count
    c.sequences.context = scenes.DOCUMENTS * (scenes.ROWS.get(arm, tokenizers.CODES) + CAPTION)
    if arm not in scenes.ROWS:  # codes are targets: with EOS, and what stands before and behind them
        c.sequences.targets = scenes.DOCUMENTS * (tokenizers.CODES + 3)
    c.evaluate.verifier, c.evaluate.classifier = False, CLASSIFIER
    return c
