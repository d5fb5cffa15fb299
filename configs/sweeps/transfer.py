"""Learning rates of a small Transfusion backbone at four widths: does the rate that is best at width 64 stay the best?

Hardware: 1 CPU core; sized for 40 minutes. `optimizer.transfer_from` is on; the control is the same command with
`--config.optimizer.transfer_from=0 --to runs/sweeps/transfer_off`. Then `ddt-jax fit runs/sweeps/transfer --to
runs/fit_transfer` draws the loss over the rate, a curve for each width (docs/scaling.md).
"""

from ddt_jax.scaling import sweep

BASE = 64  # where rates are counted from


def width(arm, size):
    """All heads are 32 wide, the MLP is twice the width."""
    names = {"width": size, "mlp_width": 2 * size, "heads": size // 32, "kv_heads": size // 32}
    return {f"model.transformer.{name}": value for name, value in names.items()}


def get_sweep():
    return sweep.Sweep(
        name="transfer",
        arms={"backbone": "../transfusion_scenes.py"},
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
            "model.transformer.depth": 2,
            "sequences.context": 112,  # an image with its caption
            "sequences.targets": 48,
            "train.batch_size": 8,
            "train.ema": 0,
            "train.log_every": 1,  # the last 5 % of the steps are the figure of a run
            "train.checkpoint_every": 1000,
            "train.tensorboard": False,
        },
    )
