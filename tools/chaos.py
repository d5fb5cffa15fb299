"""Faults on purpose: a run of one or several processes is hurt again and again, and must end as an undisturbed one.

    python tools/chaos.py --injections 50                       one process, all faults in turn
    python tools/chaos.py --injections 50 --processes 2 --config configs/smoke.py:linear --faults kill,kill_in_save
    python tools/chaos.py --injections 24 --processes 2 --flips 200 --nan --sources --name chaos_faults
                                                                also bits of a checkpoint, and NaN in the data, and
                                                                data sources that are slow or away

Prints a table of faults and outcomes and writes docs/soak/NAME.json as tools/soak.py does. What each fault is, and what
must come of it: tools/chaos_faults.py. All starts share a compilation cache.
"""

import argparse
import random
import shutil
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed
sys.path.insert(0, str(ROOT / "tools"))
import soak  # noqa: E402
import soak_runs as programs  # noqa: E402
from chaos_data import flipped_bits, nan_batches  # noqa: E402
from chaos_faults import FAULTS, Job  # noqa: E402
from chaos_sources import gates as source_gates  # noqa: E402
from chaos_sources import source_faults  # noqa: E402
from soak_gates import at_least, at_most, note  # noqa: E402

STEPS, EVERY = 120, 10


def chaos(options, folder: Path) -> dict:
    """Hurts runs until enough faults are injected; where each of them ends is held against the undisturbed one."""
    rng = random.Random(options.seeds[0])
    env = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    new_job = lambda workdir: Job(workdir, lambda: command(options, workdir), env)  # noqa: E731
    undisturbed = new_job(folder / "undisturbed")
    programs.must(undisturbed.go_on(), "the undisturbed run")
    wanted = undisturbed.result()
    note(f"undisturbed: digest {wanted['digest'][:16]}")
    rows, ends, number = [], [], 0
    while len(rows) < options.injections:
        job, hurt = new_job(folder / f"hurt{number}"), []
        while len(rows) + len(hurt) < options.injections:
            fault = options.faults[(len(rows) + len(hurt)) % len(options.faults)]
            if (row := FAULTS[fault](job, rng)) is None:
                break
            hurt.append({"run": number, "fault": fault, **row})
            note(f"{len(rows) + len(hurt)} of {options.injections}: {fault}: {row['what']}, at step {row['step']}")
        outcome = job.go_on()
        same = outcome.code == 0 and job.result() == wanted
        for row in hurt:
            row["lost"] = max(0, row["expected"] - job.starts[row["next"]])
            row["named"] = row["damaged"] in (None, *job.passed_over)
            row["same_end"] = same
        rows += hurt
        ends.append({"run": number, "code": outcome.code, "same": same, "faults": len(hurt)})
        note(f"run {number} {'ended as the undisturbed one' if same else 'did NOT end as the undisturbed one'}")
        shutil.rmtree(job.workdir)
        number += 1
        if not hurt:
            raise programs.Failed("a run got to its end before it could be hurt: it is too short for this machine")
    results = {"digest": wanted["digest"], "injections": rows, "ends": ends}
    gates = [
        at_least("injections", len(rows), options.injections),
        at_most("of these, in runs with another end (digest, log, steps)", sum(not r["same_end"] for r in rows), 0),
        at_most("of these, with steps lost beyond the last sound checkpoint", sum(r["lost"] > 0 for r in rows), 0),
        at_most("damaged checkpoints that were not named", sum(not r["named"] for r in rows), 0),
    ]
    if options.in_save:
        cut = sum(r["half_written"] > 0 for r in rows)
        gates.append(
            at_least("of these, with a save cut off: a half-written checkpoint was left", cut, options.in_save)
        )
    if options.nan:
        results["nan"] = nan_batches(folder / "nan", options.seeds[0], env)
        gates += [
            at_least("NaN batches: steps skipped", results["nan"]["skipped"], 1),
            at_most("NaN batches: losses not finite in the log", results["nan"]["bad_losses"], 0),
        ]
    if options.sources:

        def on_shards(config, workdir, more):
            changed = {"config": str(config), "overrides": [*options.overrides, *more]}
            return command(argparse.Namespace(**vars(options) | changed), workdir)

        results["sources"] = source_faults(folder / "sources", on_shards, env, rng)
        gates += source_gates(results["sources"])
    if options.flips:
        results["flips"] = flipped_bits(folder / "undisturbed", options.flips, rng)
        gates.append(at_most("flipped bits after which other values were restored", results["flips"]["silent"], 0))
    print(table(rows, results))
    return {"config": options.config, "seeds": options.seeds, "results": results, "gates": gates}


def command(options, workdir: Path) -> list[str]:
    """The run, as one command: of several processes a shell that waits for all of them."""
    train = programs.command("train", "--config", options.config, "--workdir", str(workdir))
    train += [f"--config.seed={options.seeds[0]}", f"--config.train.steps={STEPS}", "--config.train.log_every=1"]
    train += [f"--config.train.checkpoint_every={EVERY}", "--config.train.keep_checkpoints=3", *options.overrides]
    if options.processes == 1:
        return train
    script = (
        'port=$1 count=$2; shift 2; pids=(); status=0; for ((i = 0; i < count; i++)); do "$@" --coordinator '
        'localhost:$port --num-processes $count --process-id $i & pids+=($!); done; for pid in "${pids[@]}"; do '
        "wait $pid || status=$?; done; exit $status"
    )
    return ["bash", "-c", script, "chaos", str(free_port()), str(options.processes), *train]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def table(rows: list[dict], results: dict) -> str:
    """Faults and outcomes as Markdown."""
    lines = ["| fault | injected | in runs that ended as the undisturbed one | steps lost |", "|---|---|---|---|"]
    for fault in dict.fromkeys(row["fault"] for row in rows):
        of = [row for row in rows if row["fault"] == fault]
        same = sum(row["same_end"] for row in of)
        lines.append(f"| {fault} | {len(of)} | {same} of {len(of)} | {max(row['lost'] for row in of)} |")
    if nan := results.get("nan"):
        lines.append(f"| NaN in the data | {nan['skipped']} steps | all were skipped, {nan['kept']} batches kept | 0 |")
    if sources := results.get("sources"):
        what = f"{sources['slow']} reads slow, {sources['failed']} failed"
        ends = f"{sources['same_end'] + sources['same_end_later']} of 2"
        lines.append(f"| data source slow, away, dead | {what} | {ends} | {sources['lost']} |")
    if flips := results.get("flips"):
        found = f"{flips['detected']} found, {flips['harmless']} harmless, {flips['silent']} silent"
        lines.append(f"| bit flip, looked for | {flips['injected']} | {found} | |")
    return "\n".join(lines)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--injections", type=int, default=50, help="how many faults (default: 50)")
    parser.add_argument("--faults", default=",".join(FAULTS), help=f"which, in turn (default: {', '.join(FAULTS)})")
    parser.add_argument("--config", default="configs/smoke.py", help="of the run (default: configs/smoke.py)")
    parser.add_argument("--processes", type=int, default=1, help="of the run (default: 1)")
    parser.add_argument("--in-save", type=int, default=0, metavar="N", help="at least N must cut off a save")
    parser.add_argument("--flips", type=int, default=0, help="bits flipped in one checkpoint besides (default: none)")
    parser.add_argument("--nan", action="store_true", help="also a run on latents of which some are NaN")
    parser.add_argument("--sources", action="store_true", help="also runs on data sources that are slow, away or dead")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the faults")
    parser.add_argument("--name", default="chaos", help="of the record (default: chaos)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "soak", metavar="DIR", help="where the record goes")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs that are not hurt in this new folder")
    options, rest = parser.parse_known_args(argv)
    if wrong := [text for text in rest if not text.startswith("--config.") or "=" not in text]:
        parser.error(f"unknown: {' '.join(wrong)}")
    options.faults = options.faults.split(",")
    if unknown := set(options.faults) - set(FAULTS):
        parser.error(f"unknown faults: {', '.join(sorted(unknown))}; known: {', '.join(FAULTS)}")
    options.overrides, options.seeds = rest, [options.seed]
    return options


def main(argv=None) -> int:
    options = parse(argv)
    arguments = " ".join(soak.without_folders(sys.argv[1:] if argv is None else argv))
    return soak.measured(options.name, f"python tools/chaos.py {arguments}".strip(), options, chaos)


if __name__ == "__main__":
    sys.exit(main())
