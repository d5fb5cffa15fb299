"""Long measurements, run by hand; each leaves its figures in docs/soak/NAME.json for good.

    python tools/soak.py quickstart               configs/quickstart.py for seeds 0, 1, 2, against its gates
    python tools/soak.py whole_way                `make whole-way`, against its gates
    python tools/soak.py scenes                   configs/ddt_scenes.py, then its renderer, against the gates
    python tools/soak.py cifar10 --minutes 10     training on the real files, against PCA on the same images
    python tools/soak.py cifar10_device           the same in bfloat16 on an accelerator, its speed, a stand-in for rFID
    python tools/soak.py kill --kills 50          a run that is killed again and again, against an undisturbed one
    python tools/soak.py schedules --seeds 0,1    token schedules and time samplers against each other

A record holds the commit (and whether the checkout differed from it), the resolved config, seeds, machine, date,
command line, wall seconds, every figure and every gate. What a document states must be in such a record, or in a test.
Nothing else should run on the machine meanwhile. Ctrl-C stops the measurement and writes nothing.
"""

import argparse
import datetime
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed
sys.path.insert(0, str(ROOT / "tools"))
from soak_runs import Failed, Outcome, git, machine, must, run  # noqa: E402

ON_DEVICE = (  # of cifar10_device: four hits per code and step, and an average over as many epochs as on two cores
    "--config.model.dtype=bfloat16",
    "--config.model.quantizer.decay=0.9",
    "--config.data.workers=12",
    "--config.train.batch_size=256",
    "--config.train.ema=0.999",
    "--config.train.steps=20000",
    "--config.train.log_every=200",
    "--config.train.checkpoint_every=5000",
)
SAVED = 75  # exit code of a run that was asked to stop and has saved


# ---------------------------------------------------------------- running the command line program


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "ddt_jax.cli", *args]


def digest(workdir: Path) -> str:
    return must(run(command("checkpoint", "digest", "--workdir", str(workdir))), "checkpoint digest").stdout.split()[-1]


def note(text: str) -> None:
    print(f"soak: {text}", flush=True)


# ---------------------------------------------------------------- gates


def gate(name: str, value, limit, ok: bool) -> dict:
    note(f"{'ok    ' if ok else 'MISSED'} {name}: {value} (limit {limit})")
    return {"gate": name, "value": value, "limit": limit, "passed": bool(ok)}


def at_least(name, value, limit):
    return gate(name, value, f">= {limit}", value is not None and value >= limit)


def at_most(name, value, limit):
    return gate(name, value, f"<= {limit}", value is not None and value <= limit)


def ladder(results: dict) -> list[float]:
    """PSNR by number of tokens shown, fewest first."""
    by_tokens = results["psnr_by_tokens"]
    return [by_tokens[k] for k in sorted(by_tokens, key=int)]


def tokens_carry_the_image(results: dict) -> list[dict]:
    """The gates that every trained tokenizer has to pass."""
    steps = [b - a for a, b in zip(ladder(results), ladder(results)[1:], strict=False)]
    return [
        at_least("images evaluated", results["n"], 1000),
        gate("smallest rise of PSNR with tokens", round(min(steps), 3), "> 0", min(steps) > 0),
        at_least("PSNR lost by shuffling codes", results["psnr_drop_shuffled"], 3.0),
    ]


def quiet(outcomes: list[Outcome]) -> list[dict]:
    return [
        at_most("warnings and tracebacks", sum(len(o.complaints) for o in outcomes), 0),
        at_most("processes left over", sum(o.leftover for o in outcomes), 0),
    ]


# ---------------------------------------------------------------- measurements: (options, folder) -> part of the record


def quickstart(options, folder: Path) -> dict:
    """Seeds, one after the other: train, evaluate, check the gates of the quickstart."""
    runs, gates, began = {}, [], time.monotonic()
    for done, seed in enumerate(options.seeds):
        left = (time.monotonic() - began) / done * (len(options.seeds) - done) / 60 if done else None
        note(f"seed {seed}, {done + 1} of {len(options.seeds)}" + (f", about {left:.0f} min left" if left else ""))
        results, outcomes = train_and_evaluate("configs/quickstart.py", folder / f"seed{seed}", seed, options)
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


def whole_way(options, folder: Path) -> dict:
    """What `make whole-way` does: tokenizer, codes, transformer, pictures from captions and captions of pictures."""
    seed, tokenizer = options.seeds[0], folder / "tokenizer"
    without = ("--config.evaluate.probe_images=0",)
    seen, outcomes = train_and_evaluate("configs/quickstart.py", tokenizer, seed, options, to_evaluate=without)
    for split, count in (("train", 80_000), ("heldout", 2048)):
        more = ("--source", f"scenes:{split}", "--records", str(count))
        tokenize = command("tokenize", "--workdir", str(tokenizer), "--to", str(folder / "codes" / split), *more)
        outcomes.append(must(run(tokenize), "tokenize"))
    config = f"configs/llama_scenes.py:{folder}"
    spoken, more = train_and_evaluate(config, folder / "transformer", seed, options)
    outcomes += more
    gates = [
        at_least("pictures of captions, right count", spoken["t2i_count"], 0.95),
        at_least("pictures of captions, fully right", spoken["t2i_all_correct"], 0.45),
        at_least("captions of pictures, fully right", spoken["caption_all_correct"], 0.6),
        at_most("seconds in all", round(sum(o.seconds for o in outcomes), 1), 900),
        *quiet(outcomes),
    ]
    results = {"tokenizer": seen, "transformer": spoken}
    return {"config": "configs/llama_scenes.py", "seeds": [seed], "results": results, "gates": gates}


def scenes(options, folder: Path) -> dict:
    """The tokenizer of configs/ddt_scenes.py, then a renderer for its codes; both on the same held-out scenes."""
    tokenizer, renderer = "configs/ddt_scenes.py:tokenizer", "configs/ddt_scenes.py:renderer"
    seed, first = options.seeds[0], folder / "tokenizer"
    flow, outcomes = train_and_evaluate(tokenizer, first, seed, options)
    note("the renderer")
    begin = f"--config.init_from={first}"
    rendered, more = train_and_evaluate(renderer, folder / "renderer", seed, options, also=(begin,))
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
        "renderer_settings": dump_config(renderer, options),
        "gates": gates,
    }


def cifar10(options, folder: Path) -> dict:
    """Trains on the Parquet files for some minutes of wall time; PCA on the same held-out images is what to beat."""
    results, outcomes = train_and_evaluate(
        "configs/ddt_cifar10.py", folder / "run", options.seeds[0], options, minutes=options.minutes
    )
    note("fitting PCA to the training images ...")
    baseline = pca_psnr("configs/ddt_cifar10.py", options, components=32, images=results["n"])
    gates = [
        at_least("PSNR against PCA with 32 coefficients", results["psnr"], baseline["psnr"]),
        *tokens_carry_the_image(results),
        *quiet(outcomes),
    ]
    results |= {
        "stopped_by_the_clock": outcomes[0].code == SAVED,
        "wall_seconds_of_training": round(outcomes[0].seconds, 1),
    }
    return {
        "config": "configs/ddt_cifar10.py",
        "seeds": options.seeds[:1],
        "results": {**results, "pca": baseline},
        "gates": gates,
    }


def cifar10_device(options, folder: Path) -> dict:
    """Many more steps of CIFAR-10 than two cores can take, in bfloat16. `--config.train.steps` sets how many."""
    config, pairs = "configs/ddt_cifar10.py", folder / "pairs"
    options.overrides = [*ON_DEVICE, *options.overrides]  # the last of two wins
    bench = [sys.executable, "tools/bench.py", "step", "--config", config, *options.overrides]
    speed = json.loads(must(run(bench), "bench.py step").stdout)
    note(f"{speed['examples_per_second']:,.0f} images/s, {speed['tflops_per_device']} TFLOP/s")
    to_evaluate = ("--config.evaluate.images=10000", f"--config.evaluate.save_images={pairs}")
    results, outcomes = train_and_evaluate(
        config, folder / "run", options.seeds[0], options, minutes=options.minutes, to_evaluate=to_evaluate
    )
    note("training a classifier on the same images ...")
    judge = [sys.executable, "tools/cifar_features.py", "--config", config, "--pairs", str(pairs)]
    features = json.loads(must(run(judge), "cifar_features.py").stdout)
    gates = [
        at_least("PSNR, above that of two cores (docs/soak/cifar10.json)", results["psnr"], 22.4),
        at_least("originals that the classifier names right", features["accuracy"]["originals"], 0.85),
        at_least("images compared", features["images"], 10_000),
        *tokens_carry_the_image(results),
        *quiet(outcomes),
    ]
    results |= {
        "stopped_by_the_clock": outcomes[0].code == SAVED,
        "wall_seconds_of_training": round(outcomes[0].seconds, 1),
        "speed": speed,
        "classifier": features,
    }
    return {"config": config, "seeds": options.seeds[:1], "results": results, "gates": gates}


def kill(options, folder: Path) -> dict:
    """SIGKILL again and again; each time the same command goes on. One kill in five hits the start-up, the others hit
    random steps, from the last checkpoint to some checkpoints later, saves included.
    """
    rng = random.Random(options.seeds[0])
    steps, every, reach = 200, 10, 40
    overrides = [f"--config.seed={options.seeds[0]}", f"--config.train.steps={steps}", *options.overrides]
    overrides += [f"--config.train.checkpoint_every={every}", "--config.train.log_every=1"]

    def train(workdir):
        return command("train", "--config", "configs/smoke.py", "--workdir", str(workdir), *overrides)

    undisturbed = must(run(train(folder / "undisturbed")), "the undisturbed run")
    wanted, log = digest(folder / "undisturbed"), (folder / "undisturbed" / "metrics.jsonl").read_bytes()
    note(f"undisturbed: {undisturbed.seconds:.1f} s, digest {wanted[:16]}")

    kills, ends, outcomes, runs, began = [], [], [undisturbed], 0, time.monotonic()
    workdir = folder / "killed0"
    while True:
        enough = len(kills) >= options.kills
        saved = max(saved_steps(workdir), default=0)
        moment = None if enough else next_kill(rng, workdir, saved, reach, undisturbed.seconds)
        outcome = run(train(workdir), after=moment)
        outcomes.append(outcome)
        if outcome.code == -signal.SIGKILL:
            at = logged_step(workdir)
            kills.append({"run": runs, "after_seconds": round(outcome.seconds, 2), "went_on_from": saved, "step": at})
            left = (time.monotonic() - began) / len(kills) * (options.kills - len(kills)) / 60
            note(f"kill {len(kills)} of {options.kills}: from step {saved} to {at}; about {left:.0f} min left")
            continue
        must(outcome, f"run {runs} after {sum(k['run'] == runs for k in kills)} kills")
        same = (workdir / "metrics.jsonl").read_bytes() == log
        count = sum(k["run"] == runs for k in kills)
        ends.append({"run": runs, "kills": count, "digest": digest(workdir), "same_log": same})
        note(f"run {runs} reached its end after {count} kills, digest {ends[-1]['digest'][:16]}")
        if enough:
            break
        shutil.rmtree(workdir)
        runs += 1
        workdir = folder / f"killed{runs}"
    disturbed = [end for end in ends if end["kills"]]
    return {
        "config": "configs/smoke.py",
        "seeds": options.seeds[:1],
        "results": {
            "digest": wanted,
            "undisturbed_seconds": round(undisturbed.seconds, 1),
            "kills": kills,
            "ends": ends,
        },
        "gates": [
            at_least("kills", len(kills), options.kills),
            at_least(
                "of these, of a run that had gone on from a checkpoint",
                sum(k["went_on_from"] > 0 for k in kills),
                options.kills // 3,
            ),
            at_least("runs that were killed and reached their end", len(disturbed), 1),
            at_most("of these, with another digest", sum(end["digest"] != wanted for end in disturbed), 0),
            at_most("of these, with another log", sum(not end["same_log"] for end in disturbed), 0),
            *quiet(outcomes),
        ],
    }


def schedules(options, folder: Path) -> dict:
    """All arms, seed by seed. What comes out is reported, not judged: the gates ask whether the runs are sound."""
    from schedule_arms import ARMS, ordering

    runs, gates, began = {arm: {} for arm in ARMS}, [], time.monotonic()
    todo = [(arm, seed) for seed in options.seeds for arm in ARMS]
    for done, (arm, seed) in enumerate(todo):
        left = (time.monotonic() - began) / done * (len(todo) - done) / 60 if done else None
        note(f"{arm}, seed {seed}, {done + 1} of {len(todo)}" + (f", about {left:.0f} min left" if left else ""))
        config = f"configs/schedule_ablation.py:{arm}"
        results, outcomes = train_and_evaluate(config, folder / f"{arm}_{seed}", seed, options)
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


def next_kill(rng: random.Random, workdir: Path, saved: int, reach: int, seconds: float) -> float | Callable[[], bool]:
    """When the next kill is due: see `run`."""
    if rng.random() < 0.2:
        return rng.uniform(0.1, 0.5) * seconds
    step, delay = saved + rng.randint(1, reach), rng.uniform(0, 0.3)
    before = (workdir / "metrics.jsonl").stat().st_mtime_ns if (workdir / "metrics.jsonl").exists() else 0
    due = None

    def reached():
        nonlocal due
        path = workdir / "metrics.jsonl"
        # The log of the killed run may be ahead of its checkpoint, until the new one cuts it back.
        if due is None and path.exists() and path.stat().st_mtime_ns > before and logged_step(workdir) >= step:
            due = time.monotonic() + delay
        return due is not None and time.monotonic() >= due

    return reached


def logged_step(workdir: Path) -> int:
    """The last step in a run's log; 0 without one."""
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last line may be half written
    return json.loads(lines[-1])["step"] if lines else 0


def train_and_evaluate(
    config: str,
    workdir: Path,
    seed: int,
    options,
    minutes: float | None = None,
    also: tuple[str, ...] = (),
    to_evaluate: tuple[str, ...] = (),
):
    """The figures of `evaluate`, and the outcomes of both commands; after `minutes` training is asked to stop.

    also, to_evaluate: more arguments of the training and of the evaluation.
    """
    overrides = (f"--config.seed={seed}", *also, *options.overrides)
    args = command("train", "--config", config, "--workdir", str(workdir), *overrides)
    trained = run(args, after=minutes and minutes * 60, send=signal.SIGTERM)
    must(trained, "train", (0, SAVED) if minutes else (0,))
    path = workdir / "soak.json"
    evaluated = must(run(command("evaluate", "--workdir", str(workdir), "--json", str(path), *to_evaluate)), "evaluate")
    return json.loads(path.read_text()), [trained, evaluated]


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the committed checkpoints in a folder; unfinished ones have a longer name."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def load_config(config: str, options):
    from ddt_jax import config as configs

    pairs = [text.removeprefix("--config.").partition("=") for text in options.overrides]
    return configs.load(str(ROOT / config), tuple((key, value) for key, _, value in pairs))


def dump_config(config: str, options) -> dict:
    from ddt_jax import config as configs

    return configs.dump(load_config(config, options))


def pca_psnr(config: str, options, *, components: int, images: int) -> dict:
    """PSNR of PCA with unquantised coefficients, fitted to the training images, on the images that `evaluate` takes."""
    import numpy as np
    from scipy.linalg import eigh

    from ddt_jax.data.base import open_source
    from ddt_jax.data.images import prepare
    from ddt_jax.data.loader import Loader
    from ddt_jax.evaluation.metrics import psnr

    s = load_config(config, options)
    source, held_out = (
        open_source(spec, image_size=s.data.image_size, cache_dir=s.data.cache_dir)
        for spec in (s.data.source, s.data.eval_source)
    )
    rows = np.stack([prepare(source[i]["image"], s.data).ravel() for i in range(len(source))]).astype(np.float32)
    mean = rows.mean(axis=0)
    rows -= mean
    size = rows.shape[1]
    basis = eigh(rows.T @ rows / len(rows), subset_by_index=[size - components, size - 1])[1]

    loader = Loader(held_out, s.data, batch_size=s.train.batch_size, seed=s.seed)
    batches = list(loader.eval_batches(images, s.evaluate.batch_size))
    truth = np.concatenate([batch["image"][batch["valid"]] for batch in batches])
    flat = truth.reshape(len(truth), -1) - mean
    decoded = np.clip(np.rint(flat @ basis @ basis.T + mean), 0, 255).astype(np.uint8).reshape(truth.shape)
    return {
        "components": components,
        "fitted_to": len(rows),
        "n": len(truth),
        "psnr": round(float(psnr(truth, decoded).mean()), 4),
    }


MEASUREMENTS: dict[str, Callable] = {
    "quickstart": quickstart,
    "whole_way": whole_way,
    "scenes": scenes,
    "cifar10": cifar10,
    "cifar10_device": cifar10_device,
    "kill": kill,
    "schedules": schedules,
}


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.NAME.NAME=VALUE changes a setting of the config, for a trial; the record keeps it.",
    )
    parser.add_argument("name", choices=MEASUREMENTS, help="which measurement")
    parser.add_argument("--seeds", default="", metavar="N,N", help="seeds of the runs (quickstart: 0,1,2; others: 0)")
    parser.add_argument(
        "--minutes", type=float, default=10, help="cifar10, cifar10_device: wall time of training, start-up included"
    )
    parser.add_argument("--kills", type=int, default=50, help="kill: how many (default: 50)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "soak", metavar="DIR", help="where NAME.json goes")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep the runs in this new folder (else they are removed)"
    )
    options, rest = parser.parse_known_args(argv)
    wrong = [text for text in rest if not text.startswith("--config.") or "=" not in text]
    if wrong:
        parser.error(f"unknown: {' '.join(wrong)}")
    if options.keep and options.keep.exists():
        parser.error(f"--keep {options.keep} exists already; give a new folder")
    options.overrides = rest
    options.seeds = [int(n) for n in (options.seeds or ("0,1,2" if options.name == "quickstart" else "0")).split(",")]
    return options


def main(argv=None) -> int:
    options = parse(argv)
    changed = git("status", "--porcelain").splitlines()
    if changed:
        note(f"{len(changed)} files differ from the commit, as the record will say; to publish a figure, commit first")
    record = {
        "name": options.name,
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(changed),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python tools/soak.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": machine(),
    }
    began = time.monotonic()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    try:
        found = MEASUREMENTS[options.name](options, folder)
    except Failed as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("soak: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    record |= {
        **found,
        "overrides": options.overrides,
        "settings": dump_config(found["config"], options),
        "wall_seconds": round(time.monotonic() - began, 1),
        "passed": all(check["passed"] for check in found["gates"]),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    missed = sum(not check["passed"] for check in record["gates"])
    note(f"{path}: {len(record['gates']) - missed} gates passed, {missed} missed, {record['wall_seconds']:.0f} s")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run that is going on ends as well
    sys.exit(main())
