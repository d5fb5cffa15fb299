"""Systems against each other at equal cost, by the protocol of docs/comparison.md.

    python tools/compare.py plan --to runs/comparison \
        --arm codes=configs/comparison_scenes.py:codes --tokenizer codes=configs/ddt_scenes.py \
        --arm transfusion=configs/comparison_scenes.py:transfusion
    python tools/compare.py --arm codes=DIR,DIR,... --arm transfusion=DIR,DIR,... --to DIR

`plan` prints the commands of a comparison and runs none: tokenizers, codes and a grid of learning rates; with --chosen
for every arm, seeds and sampling settings. Without it: the table of what was trained, as DIR/comparison.md and
comparison.json, and below it every way in which the runs do not keep the protocol. Exit codes: 0 kept, or --draft; 1
not kept; 2 something you can mend.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed
sys.path.insert(0, str(ROOT / "tools"))
from ddt_jax.errors import UserError  # noqa: E402

NOT_KEPT = 1


def pairs(given: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE arguments as a dictionary. Raises UserError for one that is none, or a name that comes twice."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"compare: --{option} {text} is not NAME=VALUE")
        if name in found:
            raise UserError(f"compare: --{option} {name} is given twice; list its values in one, with commas")
        found[name] = value
    return found


def table(options) -> int:
    """Reads workdirs, writes and prints the comparison."""
    from ddt_jax import ledger
    from ddt_jax.evaluation import comparison
    from ddt_jax.io import atomic

    codecs, to = pairs(options.codec, "codec"), Path(options.to)
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"compare: cannot write to {to}: {error.strerror or error}") from error
    rows = []
    for arm, workdirs in pairs(options.arm, "arm").items():
        for workdir in filter(None, workdirs.split(",")):
            print(f"compare: {arm}: {workdir}", file=sys.stderr)
            rows += ledger.rows(arm, workdir, codecs)
    found = comparison.compare(rows, tolerance=options.tolerance)
    text = comparison.markdown(found)
    atomic.write_text(to / "comparison.md", text)
    atomic.write_text(to / "comparison.json", json.dumps(comparison.as_json(found, rows), indent=2) + "\n")
    print(text)
    print(f"written: {to / 'comparison.md'}, {to / 'comparison.json'}")
    return NOT_KEPT if found.violations and not options.draft else 0


def plan(options) -> int:
    """Prints the commands of a comparison whose arms all cost what the first one costs."""
    import compare_plan

    from ddt_jax import config, ledger

    tokenizers, chosen = pairs(options.tokenizer, "tokenizer"), pairs(options.chosen, "chosen")
    given = pairs(options.arm, "arm")
    for option, names in (("tokenizer", tokenizers), ("chosen", chosen)):
        for name in names:
            if name not in given:
                raise UserError(f"compare: --{option} {name}: there is no such --arm; there are {', '.join(given)}")
    rates = {name: number(value, f"--chosen {name}") for name, value in chosen.items()}
    if options.seeds < 1 or options.records < 1 or options.held_out < 1 or options.steps < 0:
        raise UserError("compare: --seeds, --records and --held-out must be at least 1, --steps must not be negative")
    lists = {name: numbers(getattr(options, name), f"--{name}") for name in ("rates", "guidances")}
    arms, total, base = [], 0.0, 0.0
    for name, path in given.items():
        s = config.load(path)
        stages = tuple(stage_of(text) for text in tokenizers[name].split(",")) if name in tokenizers else ()
        *earlier, first = [config.load(*stage) for stage in stages] or [None]
        planned = ledger.plan(s, first, options.records, earlier)
        if not arms:
            total = planned.total(options.steps or s.train.steps)
            base = s.evaluate.text_to_image.guidance
        steps = planned.steps_within(total)
        folders = ()
        if first:
            parts = (*s.sequences.sources, *s.sequences.eval_sources)
            sources = ((first.data.source, options.records), (first.data.eval_source, options.held_out))
            if len(parts) != 2:
                raise UserError(
                    f"compare: {path} reads {len(parts)} folders; a plan knows one to train on, one held out"
                )
            folders = tuple((*of, part.folder) for of, part in zip(sources, parts, strict=True))
        workdir, rate = s.sequences.tokenizer, rates.get(name, 0.0)
        arms.append(compare_plan.Arm(name, path, steps, stages, workdir, folders, rate))
        costs = {"training": steps * planned.step, **planned.before}
        listed = ", ".join(f"{what} {value:.3e}" for what, value in costs.items())
        print(f"# {name}: {sum(costs.values()):.3e} FLOPs in all: {listed}; {steps:,} steps")
        for line in planned.uncounted:
            print(f"# {name}: {line}")
    lists["guidances"] = sorted({*lists["guidances"], base})
    how = {"rates": lists["rates"], "guidances": lists["guidances"], "base": base}
    print("\n".join(compare_plan.commands(arms, options.to, seeds=list(range(options.seeds)), **how)))
    return 0


def stage_of(text: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """CONFIG or CONFIG@STEPS as a config and overrides. Raises UserError."""
    path, at, steps = text.partition("@")
    if at and not (steps.isdigit() and int(steps)):
        raise UserError(f"compare: --tokenizer {text}: {steps or 'nothing'} is no number of steps; write CONFIG@STEPS")
    return path, (("train.steps", steps),) if at else ()


def number(text: str, what: str) -> float:
    """A number above 0. Raises UserError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UserError(f"compare: {what}={text} is not a number above 0")
    return value


def numbers(text: str, what: str) -> list[float]:
    """Numbers above 0 from text with commas, rising. Raises UserError."""
    return sorted({number(part, what) for part in text.split(",")})


def parse(argv):
    described = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    if argv[:1] == ["plan"]:
        parser, argv = argparse.ArgumentParser(prog="compare.py plan", **described), argv[1:]
        parser.add_argument(
            "--arm", action="append", required=True, metavar="NAME=CONFIG", help="the first sets the cost"
        )
        parser.add_argument(
            "--tokenizer",
            action="append",
            default=[],
            metavar="NAME=CONFIG[@STEPS],...",
            help="of an arm of codes; its stages, in turn",
        )
        parser.add_argument("--to", required=True, metavar="DIR", help="where the runs are to go")
        parser.add_argument(
            "--steps", type=int, default=0, metavar="N", help="of the first arm (default: its config's)"
        )
        parser.add_argument("--rates", default="1.5e-3,3e-3,6e-3", metavar="N,N", help="the grid (%(default)s)")
        parser.add_argument("--guidances", default="1,2,3,5", metavar="N,N", help="the sweep (%(default)s)")
        parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many (default: 3)")
        parser.add_argument("--records", type=int, default=160_000, metavar="N", help="images to encode (160,000)")
        parser.add_argument("--held-out", type=int, default=2048, metavar="N", help="held-out ones (2,048)")
        parser.add_argument(
            "--chosen", action="append", default=[], metavar="NAME=RATE", help="that the grid has chosen"
        )
        return plan, parser.parse_args(argv)
    parser = argparse.ArgumentParser(prog="compare.py", **described)
    parser.add_argument("--arm", action="append", required=True, metavar="NAME=DIR,DIR", help="workdirs, grid included")
    parser.add_argument(
        "--codec", action="append", default=[], metavar="FILE=DIR", help="the run that made frozen weights"
    )
    parser.add_argument("--to", required=True, metavar="DIR", help="where comparison.md and comparison.json go")
    parser.add_argument(
        "--tolerance", type=float, default=0.02, metavar="X", help="between total FLOPs (default: 0.02)"
    )
    parser.add_argument("--draft", action="store_true", help="exit with 0 though the protocol is not kept")
    return table, parser.parse_args(argv)


def main(argv=None) -> int:
    verb, options = parse(sys.argv[1:] if argv is None else list(argv))
    try:
        return verb(options)
    except UserError as error:
        print(str(error), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
