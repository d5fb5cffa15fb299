"""Measurements of ACDiT: what the size of a block costs and gives, and clips whose objects go where they are told."""

from pathlib import Path

import soak_runs as programs
from soak_gates import at_least, note, quiet

BLOCKS = {"tokens": 1, "fours": 4, "quarters": 16, "dit": 64}  # variants of configs/acdit_scenes.py: tokens of a block
SHOWN = {"scenes_count": "as many objects as asked for", "scenes_clean": "nothing but objects"}


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
    trade_off(runs, options.out / "acdit_blocks.png")
    config = f"configs/acdit_scenes.py:{arms[0]}"
    return {"config": config, "seeds": options.seeds[:1], "results": {"arms": runs}, "gates": gates}


def trade_off(runs: dict[str, dict], path: Path) -> Path:
    """Draws quality over the time of a picture, a point for each size of a block."""
    from ddt_jax.evaluation import canvas

    path.parent.mkdir(parents=True, exist_ok=True)
    order = sorted(runs.values(), key=lambda found: found["seconds_per_picture"])
    figure = canvas.new(5.4, 3.4)
    axis = figure.add_subplot()
    seconds = [found["seconds_per_picture"] for found in order]
    for (name, label), colour in zip(SHOWN.items(), canvas.COLOURS, strict=False):
        values = [found[name] for found in order]
        axis.plot(seconds, values, color=colour, marker="o", markersize=5, linewidth=1.6, label=label)
    for at, found in zip(seconds, order, strict=True):
        tokens = f"{found['block_size']} token" + "s" * (found["block_size"] > 1)
        axis.annotate(tokens, (at, 0.02), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        axis.axvline(at, color=canvas.FAINT, linewidth=0.6, linestyle=":")
    axis.set_xscale("log")
    axis.set_xticks(seconds, [f"{at:.2g}" for at in seconds])
    axis.minorticks_off()
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.margins(x=0.12)
    canvas.style(axis, "Pictures, by the size of a block")
    axis.set_xlabel("seconds of a picture", fontsize=8, color=canvas.FAINT)
    canvas.legend(figure)
    return canvas.save(figure, path)


def acdit_clips(options, folder: Path) -> dict:
    """configs/acdit_moving_scenes.py: the share of clips in which everything goes where it was told."""
    arm = options.arms or "fours"
    config = f"configs/acdit_moving_scenes.py:{arm}"
    found, outcomes = programs.train_and_evaluate(config, folder / arm, options.seeds[0], options)
    gates = [
        at_least("clips drawn", found["drawn"], 256),
        at_least("clips whose objects go as told", found["scenes_direction"], 0.6),
        *quiet(outcomes),
    ]
    return {"config": config, "seeds": options.seeds[:1], "results": found, "gates": gates}
