"""Measurements on procedural scenes: tokenizers, their renderer, and Transfusion; soak_codes.py has those on codes.

Each takes the options of the command line and a folder for its runs, and returns its part of the record.
"""

import time
from pathlib import Path

import soak_runs as programs
from schedule_arms import ARMS, ordering
from soak_gates import at_least, at_most, gate, ladder, note, quiet, tokens_carry_the_image

BITS = 144  # of an image in configs/ddt_scenes.py: what the spatial baseline is compared at


def quickstart(options, folder: Path) -> dict:
    """Seeds, one after the other: train, evaluate, check the gates of the quickstart."""
    runs, gates, began = {}, [], time.monotonic()
    for done, seed in enumerate(options.seeds):
        left = (time.monotonic() - began) / done * (len(options.seeds) - done) / 60 if done else None
        note(f"seed {seed}, {done + 1} of {len(options.seeds)}" + (f", about {left:.0f} min left" if left else ""))
        results, outcomes = programs.train_and_evaluate("configs/quickstart.py", folder / f"seed{seed}", seed, options)
        runs[str(seed)] = results
        rungs = ladder(results)[-3:]  # 1/4, 1/2 and all tokens
        checks = [
            at_least("PSNR, all tokens", results["psnr"], 28.0),
            at_least("PSNR from 1/4 to 1/2 of the tokens", rungs[1] - rungs[0], 1.5),
            at_least("PSNR from 1/2 to all tokens", rungs[2] - rungs[1], 1.5),
            at_least("scenes read fully right", results.get("scenes_all_correct"), 0.75),
            at_least("codebook perplexity", results["codebook_perplexity"], 400),
            at_most("seconds of training", results.get("train_seconds"), 300),
            at_most("seconds in all", round(sum(o.seconds for o in outcomes), 1), 600),
            *tokens_carry_the_image(results),
            *quiet(outcomes),
        ]
        gates += [{"seed": seed, **check} for check in checks]
    return {"config": "configs/quickstart.py", "seeds": options.seeds, "results": runs, "gates": gates}


def scenes(options, folder: Path) -> dict:
    """The tokenizer of configs/ddt_scenes.py, then a renderer for its codes; both on the same held-out scenes."""
    tokenizer, renderer = "configs/ddt_scenes.py:tokenizer", "configs/ddt_scenes.py:renderer"
    seed, first = options.seeds[0], folder / "tokenizer"
    flow, outcomes = programs.train_and_evaluate(tokenizer, first, seed, options)
    note("the renderer")
    begin = f"--config.init_from={first}"
    rendered, more = programs.train_and_evaluate(renderer, folder / "renderer", seed, options, also=(begin,))
    usage = "codebook_used_by_position", "codebook_perplexity_by_position"
    same = all(flow[name] == rendered[name] for name in usage)
    gates = [
        at_least("PSNR, flow decoder", flow["psnr"], 33.0),
        at_least("scenes read fully right, flow decoder", flow["scenes_all_correct"], 0.95),
        at_most("seconds of training, tokenizer and flow decoder", flow["train_seconds"], 1800),
        *tokens_carry_the_image(flow),
        at_least("PSNR, renderer less flow decoder", round(rendered["psnr"] - flow["psnr"], 3), -1.0),
        at_most("seconds of training, renderer", rendered["train_seconds"], 600),
        at_least("images evaluated, renderer", rendered["n"], 1000),
        gate("use of codes by position, renderer and flow decoder", "equal" if same else "differs", "equal", same),
        *quiet(outcomes + more),
    ]
    return {
        "config": tokenizer,
        "seeds": [seed],
        "results": {"flow": flow, "renderer": rendered},
        "renderer_settings": programs.dump_config(renderer, options),
        "gates": gates,
    }


def spatial(options, folder: Path) -> dict:
    """The baseline of one code for each place, at the bits and in the minutes of `scenes`.

    How good it is gets reported, not judged: the gates ask whether the run is sound and comparable.
    """
    config = "configs/spatial_scenes.py"
    results, outcomes = programs.train_and_evaluate(config, folder / "run", options.seeds[0], options)
    gates = [
        gate(
            "bits per image, those of configs/ddt_scenes.py",
            results["bits_per_image"],
            BITS,
            results["bits_per_image"] == BITS,
        ),
        at_most("seconds of training", results["train_seconds"], 1800),
        at_least("images evaluated", results["n"], 1000),
        at_least("PSNR lost by shuffling codes", results["psnr_drop_shuffled"], 3.0),
        at_least("scenes read fully right, originals", results["scenes_all_correct_originals"], 0.99),
        *quiet(outcomes),
    ]
    return {"config": config, "seeds": options.seeds[:1], "results": results, "gates": gates}


def transfusion(options, folder: Path) -> dict:
    """Variants of configs/transfusion_scenes.py: as it stands, causal inside images, with and without a limit of noise.

    What comes out is reported, not judged: the gates ask whether the runs are sound, and whether the config as it
    stands has its time. The others take as many steps.
    """
    seed, runs, gates, began = options.seeds[0], {}, [], time.monotonic()
    arms = options.arms.split(",") if options.arms else ["linear", "causal", "plain", "unlimited"]
    for done, arm in enumerate(arms):
        left = (time.monotonic() - began) / done * (len(arms) - done) / 60 if done else None
        note(f"{arm}, {done + 1} of {len(arms)}" + (f", about {left:.0f} min left" if left else ""))
        config = f"configs/transfusion_scenes.py:{arm}"
        runs[arm], outcomes = programs.train_and_evaluate(config, folder / arm, seed, options)
        checks = [
            *([at_most("seconds of training", runs[arm]["train_seconds"], 1200)] if arm == "linear" else ()),
            at_least("captions and pictures asked for", runs[arm]["prompts"], 256),
            *quiet(outcomes),
        ]
        gates += [{"arm": arm, **check} for check in checks]
    return {
        "config": f"configs/transfusion_scenes.py:{arms[0]}",
        "seeds": [seed],
        "results": {"arms": runs},
        "gates": gates,
    }


def schedules(options, folder: Path) -> dict:
    """All arms, seed by seed. What comes out is reported, not judged: the gates ask whether the runs are sound."""
    runs, gates, began = {arm: {} for arm in ARMS}, [], time.monotonic()
    todo = [(arm, seed) for seed in options.seeds for arm in ARMS]
    for done, (arm, seed) in enumerate(todo):
        left = (time.monotonic() - began) / done * (len(todo) - done) / 60 if done else None
        note(f"{arm}, seed {seed}, {done + 1} of {len(todo)}" + (f", about {left:.0f} min left" if left else ""))
        config = f"configs/schedule_ablation.py:{arm}"
        results, outcomes = programs.train_and_evaluate(config, folder / f"{arm}_{seed}", seed, options)
        runs[arm][str(seed)] = results
        checks = [
            at_least("images evaluated", results["n"], 1000),
            at_least("PSNR lost by shuffling codes", results["psnr_drop_shuffled"], 3.0),
            *quiet(outcomes),
        ]
        gates += [{"arm": arm, "seed": seed, **check} for check in checks]
    found = ordering({arm: [r["psnr"] for r in runs[arm].values()] for arm in ARMS})
    for row in found["ordering"]:
        note(f"{row['psnr']:7.3f} dB  {row['arm']}" + (f" (published: {row['published']})" if row["published"] else ""))
    note(f"{found['pairs_in_published_order']} of {found['pairs']} pairs of arms are in the published order")
    return {
        "config": f"configs/schedule_ablation.py:{next(iter(ARMS))}",
        "seeds": options.seeds,
        "results": {"arms": runs, **found},
        "gates": gates,
    }
