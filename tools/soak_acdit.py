"""Measurements of ACDiT: what the size of a block costs and gives, and clips whose objects go where they are told."""

from pathlib import Path

import soak_runs as programs
from soak_gates import at_least, note, quiet

BLOCKS = {"tokens": 1, "fours": 4, "ddpm": 16, "dit": 64}  # variants of configs/acdit_scenes.py: tokens of a block


def acdit_blocks(options, folder: Path) -> dict:
    """Block sizes from one token to the whole image, equal steps. What comes out is reported, not judged."""
    arms = options.arms.split(",") if options.arms else list(BLOCKS)
    runs, gates = {}, []
    for done, arm in enumerate(arms):
        note(f"{arm}, {done + 1} of {len(arms)}")
        found, outcomes = programs.train_and_evaluate(
            f"configs/acdit_scenes.py:{arm}", folder / arm, options.seeds[0], options
        )
        runs[arm] = {"block_size": BLOCKS[arm], **found}
        checks = [at_least("pictures drawn", found["drawn"], 256), *quiet(outcomes)]
        gates += [{"arm": arm, **check} for check in checks]
    for arm, found in runs.items():
        shown = {name: found[name] for name in ("scenes_count", "scenes_clean", "diffusion", "seconds_per_picture")}
        note(f"{arm:8} " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    config = f"configs/acdit_scenes.py:{arms[0]}"
    return {"config": config, "seeds": options.seeds[:1], "results": {"arms": runs}, "gates": gates}


def acdit_clips(options, folder: Path) -> dict:
    """configs/acdit_moving_scenes.py: the share of clips in which everything goes where it was told."""
    arm = options.arms or "ddpm"
    config = f"configs/acdit_moving_scenes.py:{arm}"
    found, outcomes = programs.train_and_evaluate(config, folder / arm, options.seeds[0], options)
    gates = [
        at_least("clips drawn", found["drawn"], 256),
        at_least("clips whose objects go as told", found["scenes_direction"], 0.6),
        *quiet(outcomes),
    ]
    return {"config": config, "seeds": options.seeds[:1], "results": found, "gates": gates}
