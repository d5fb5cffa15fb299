"""Systems against each other at equal cost, by the protocol of docs/comparison.md.

    python tools/compare.py run --config configs/sweeps/image_languages.py --to runs/image_languages --jobs 2
    python tools/compare.py table --config configs/sweeps/image_languages.py --to runs/image_languages

`run` trains and evaluates everything that the comparison is made of, and goes on with the same command where it was
stopped or killed; with --plan it lists the commands and runs none. `table` writes comparison.md, comparison.json and
plots from the workdirs that are there, as `run` does in the end, and below the tables every way in which the runs do
not keep the protocol. With --known FILE, rows of an earlier part's comparison.json count as made, on whatever machine
that was, and nothing that they alone need is run: a comparison can take several sittings, without their weights. Exit
codes: 0 kept, or --draft; 1 not kept, or a step has failed; 2 something you can mend; 75 asked to stop.
"""

import argparse
import datetime
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed
sys.path.insert(0, str(ROOT / "tools"))
from ddt_jax.errors import UserError  # noqa: E402

NOT_KEPT = 1


def run(options) -> int:
    """Runs what is not done, then makes the table."""
    import compare_plan
    import compare_run

    from ddt_jax.training.loop import EXIT_STOPPED

    work = _work(options, jobs=options.jobs, retry=options.retry)
    if options.plan:
        print(compare_run.listing(work))
        return 0
    compare_plan.check_judges(work.arms)
    if not compare_run.run(work):
        print("stopped; the same command goes on")
        return EXIT_STOPPED
    return _write(work, options)


def table(options) -> int:
    """Reads workdirs, writes and prints the comparison."""
    return _write(_work(options), options)


def _work(options, **how):
    """How the comparison stands. Nothing here needs an accelerator, which the runs are to have."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    import compare_plan
    import compare_run

    from ddt_jax.scaling import trial

    found, root = trial.load(options.config), str(Path(options.to).resolve())
    return compare_run.Work(found, compare_plan.priced(found, options.config, root), root, known=options.known, **how)


def _write(work, options) -> int:
    import compare_run

    from ddt_jax import ledger
    from ddt_jax.evaluation import comparison, comparison_plots
    from ddt_jax.io import atomic

    to = Path(options.out or Path(work.root) / "result")
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"compare: cannot write to {to}: {error.strerror or error}") from error
    rows, lost = [], work.lost()
    for arm, workdirs in compare_run.workdirs(work).items():
        made = [row for workdir in workdirs for row in ledger.rows(arm, workdir, work.found.codecs)]
        of = work.known.merged(arm, made)
        if any(row.seed == work.found.seeds[0] for row in of):
            rows += of
        else:
            lost.append(f"{arm} is left out: none of its runs with seed {work.found.seeds[0]} was evaluated")
    rows = [replace(row, run=os.path.relpath(row.run, work.root)) for row in rows + work.diverged()]
    found = comparison.compare(rows, tolerance=work.found.tolerance, lost=lost)
    drawn = comparison_plots.draw(found, rows, _samples(work, found), to)
    text = "\n".join([comparison.markdown(found), *(f"![{path.stem}]({path.name})" for path in drawn), ""])
    atomic.write_text(to / "comparison.md", text)
    tree = {"made": _made(options), **comparison.as_json(found, rows)}
    atomic.write_text(to / "comparison.json", json.dumps(tree, indent=2) + "\n")
    print(text)
    print("\n".join(["written:", *(f"  {to / name}" for name in ("comparison.md", "comparison.json")),
                     *(f"  {path}" for path in drawn)]))  # fmt: skip
    return NOT_KEPT if found.violations and not options.draft else 0


def _samples(work, found) -> dict:
    """What each arm has drawn with the second seed: of that there is one evaluation, as the first has chosen."""
    from ddt_jax.evaluation import samples

    if len(work.found.seeds) < 2:
        return {}
    seed, drawn = work.found.seeds[1], {}
    for arm in found.arms:
        path = next((Path(work.root, row.run, samples.FILE) for row in arm.rows if row.seed == seed), None)
        if path is None or not path.exists():
            return {}
        drawn[arm.name] = samples.read(path).get("text_to_image", [])
    return drawn


def _made(options) -> dict:
    """Where and from what a table was made. The runs say it of themselves, in their workdirs."""
    import soak_runs

    config = Path(options.config)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": soak_runs.git("rev-parse", "HEAD") or None,
        "machine": soak_runs.machine(),
        "command": f"python tools/compare.py table --config {config.name if config.is_absolute() else config} --to DIR",
    }


def parse(argv):
    described = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="compare.py", **described)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    helps = {run: "run what is not done, then write the table", table: "write the table from what is there"}
    parsers = {}
    for verb, text in helps.items():
        p = parsers[verb] = verbs.add_parser(verb.__name__, help=text, allow_abbrev=False, **described)
        p.add_argument("--config", required=True, metavar="FILE", help="a trial: configs/sweeps/image_languages.py")
        p.add_argument("--to", required=True, metavar="DIR", help="the folder of all its runs")
        p.add_argument("--out", default="", metavar="DIR", help="where the table and plots go (default: DIR/result)")
        more = {"metavar": "FILE", "action": "append", "default": []}
        p.add_argument("--known", **more, help="comparison.json of an earlier part, whose rows are not made again")
        p.add_argument("--draft", action="store_true", help="exit with 0 though the protocol is not kept")
        p.set_defaults(call=verb)
    p = parsers[run]
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="steps at one time, each on its cores (default: 1)")
    p.add_argument("--retry", action="store_true", help="run what has failed or diverged once more")
    p.add_argument("--plan", action="store_true", help="list costs and commands; run none")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    options = parse(sys.argv[1:] if argv is None else list(argv))
    try:
        return options.call(options)
    except UserError as error:
        print(str(error), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
