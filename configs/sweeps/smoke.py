"""Two widths of the smallest tokenizer, six steps each: what tests run. A minute on 2 CPU cores; it shows nothing."""

from ddt_jax.scaling import sweep


def width(arm, size):
    return {"model.width": size}


def get_sweep():
    return sweep.Sweep(
        name="smoke",
        arms={"linear": "../smoke.py:linear"},
        sizes=(8, 16),
        dial=width,
        amount="steps",
        amounts=(6,),
        lrs=(3e-3,),
        budget=1e10,
        changes={
            "train.log_every": 1,
            "train.checkpoint_every": 3,
            "train.tensorboard": False,
            "evaluate.images": 8,
            "evaluate.batch_size": 8,
            "evaluate.probe_images": 0,
            "evaluate.counterfactuals": 0,
        },
    )
