"""What an image should be to a transformer: six arms of `comparison_scenes.py` at equal FLOPs. Hardware: 2 CPU cores.

    python tools/compare.py run --config configs/sweeps/image_languages.py --to runs/image_languages --jobs 2

Each arm costs what DDT codes cost in 2,700 steps of the transformer with the quickstart's tokenizer. 30 transformers,
those of rates beyond the grid where an arm does best at its edge, and 6 stages of tokenizers, 5 to 30 minutes on a
core each; we expect six to seven hours of two cores, in several sittings if need be (`--known`, docs/comparison.md).
"""

from ddt_jax.scaling import trial

ARMS = "../comparison_scenes.py"


def arm(name, tokenizer=None):
    return trial.Arm(f"{ARMS}:{name}:{{root}}/{name}" if tokenizer else f"{ARMS}:{name}", tokenizer or {})


def get_trial():
    return trial.Trial(
        name="image_languages",
        arms={
            "codes": arm("codes", {"../quickstart.py": 2300}),
            "spatial": arm("spatial", {"../spatial_scenes.py": 1000}),
            "unordered": arm("unordered", {"../quickstart.py:unordered": 2300}),
            "seed": arm(
                "seed", {"../seed_scenes.py:align": 400, "../seed_scenes.py:codes": 600, "../seed_scenes.py:draw": 800}
            ),
            "transfusion": arm("transfusion"),
            "blocks": arm("blocks"),
        },
        total=2.9e13,
        rates=(1.5e-3, 3e-3, 6e-3),
        beyond=3,
        guidances=(1.0, 2.0, 4.0),
        first_guidance=2.0,
        records=80_000,
        changes={"train.tensorboard": False},
    )
