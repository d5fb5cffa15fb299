"""The arms of `image_languages.py` on CIFAR-10, at equal FLOPs. Hardware: 2 CPU cores.

    ddt-jax train --config configs/acdit_cifar10.py:classify --workdir runs/cifar10_classes
    python tools/compare.py run --config configs/sweeps/image_languages_cifar10.py --to runs/cifar10 --jobs 2

The first is the judge of pictures, and part of no arm's cost.
"""

from ddt_jax.scaling import trial

ARMS, TOKENIZERS = "../comparison_cifar10.py", "../cifar10_tokenizers.py"


def arm(name, **steps):
    """steps: of the stages of its tokenizer."""
    stages = {f"{TOKENIZERS}:{stage}": count for stage, count in steps.items()}
    return trial.Arm(f"{ARMS}:{name}:{{root}}/{name}" if stages else f"{ARMS}:{name}", stages)


def get_trial():
    return trial.Trial(
        name="image_languages_cifar10",
        arms={
            "codes": arm("codes", ddt=1600),
            "spatial": arm("spatial", spatial=1000),
            "unordered": arm("unordered", unordered=1600),
            "seed": arm("seed", seed_align=150, seed_codes=250, seed_draw=400),
            "transfusion": arm("transfusion"),
            "blocks": arm("blocks"),
        },
        total=4e13,
        rates=(1.5e-3, 3e-3, 6e-3),
        beyond=3,
        guidances=(1.0, 2.0, 4.0),
        first_guidance=2.0,
        records=40_000,
        changes={"train.tensorboard": False},
    )
