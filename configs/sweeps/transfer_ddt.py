"""Learning rates of the quickstart's DDT tokenizer at four widths, as `transfer.py` does for a backbone.

Hardware: 1 CPU core; sized for 40 minutes. The control: `--config.optimizer.transfer_from=0 --to
runs/sweeps/transfer_ddt_off`. `ddt-jax fit runs/sweeps/transfer_ddt --metric flow --to runs/fit_transfer_ddt` draws it.
"""

from ddt_jax.scaling import sweep

BASE = 64  # where rates are counted from


def width(arm, size):
    """All heads are 32 wide."""
    return {"model.width": size, "model.heads": size // 32}


def get_sweep():
    return sweep.Sweep(
        name="transfer_ddt",
        arms={"tokenizer": "../quickstart.py"},
        sizes=(64, 128, 256, 512),
        dial=width,
        amount="steps",
        amounts=(150,),
        lrs=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
        budget=1e14,
        evaluate=False,
        changes={
            "optimizer.transfer_from": BASE,
            "optimizer.warmup": 15,
            "model.decoder_depth": 1,
            "model.mlp_ratio": 2,
            "train.batch_size": 16,
            "train.ema": 0,
            "train.log_every": 1,  # the last 5 % of the steps are the figure of a run
            "train.checkpoint_every": 1000,
            "train.tensorboard": False,
        },
    )
