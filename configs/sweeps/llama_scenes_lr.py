"""Learning rates of a small LLaMA on the codes of scenes, at three widths and equal FLOPs. Hardware: 2 CPU cores.

It reads tokenizer/ and codes/ in runs/quickstart, where `make quickstart` puts them, or in the folder that the
environment variable CODES names. 27 runs; one of the middle width costs a fifth of `configs/llama_scenes.py`.
"""

import os

from ddt_jax.scaling import sweep

ROOT = os.environ.get("CODES", "runs/quickstart")


def width(arm, size):
    """All heads are 32 wide, the rest follows the width as in llama_scenes.py."""
    heads = size // 32
    names = {"width": size, "mlp_width": size * 8 // 3 // 32 * 32, "heads": heads, "kv_heads": heads}
    return {f"model.transformer.{name}": value for name, value in names.items()}


def get_sweep():
    return sweep.Sweep(
        name="llama_scenes_lr",
        arms={"codes": f"../llama_scenes.py:{os.path.abspath(ROOT)}"},
        sizes=(64, 96, 128),
        dial=width,
        amount="flops",
        amounts=(9e12,),
        lrs=(1.5e-3, 3e-3, 6e-3),
        seeds=(0, 1, 2),
        budget=2.5e14,
        changes={"train.tensorboard": False},
    )
