"""Verbs of the command line for pods and many runs: `plan`, `flags`, `sweep`, `fit`, `report`. As `cli`: arguments and
calls.
"""

from ddt_jax.errors import UserError


def add_verbs(verb) -> None:
    """Adds the parsers. verb: of `cli`, makes one."""
    p = verb(
        "plan",
        "compile the train step, or what generate runs, for a pod that is not there: does it fit, what does it cost",
        config=True,
        more="TPUs need libtpu: pip install 'ddt-jax[tpu]' into an environment of its own. docs/plan.md.",
    )
    p.add_argument("--topology", required=True, metavar="POD", help="v5p:8x8x8, v6e:16x16, h100:8x16; or POD,POD,...")
    p.add_argument("--slices", type=int, default=1, metavar="N", help="slices of a TPU (default: 1)")
    p.add_argument("--mesh", default="", metavar="AXIS=N,...", help="sizes of the mesh, as fsdp=128,tensor=4")
    p.add_argument(
        "--of",
        choices=("train", "generate", "caption"),
        default="train",
        help="a train step (default), or what generate runs: pictures of prompts, texts of pictures",
    )
    p.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens of a text that is drawn (64)")
    p.add_argument(
        "--rows", type=int, default=0, metavar="N", help="rows of a micro-batch, or prompts, on each part of the mesh"
    )
    p.add_argument(
        "--search",
        nargs="*",
        metavar="NAME=V,V",
        help="try meshes, remat and accumulation (fsdp, tensor, remat, accumulate) and list what fits, fastest first",
    )
    p.add_argument(
        "--effort",
        type=float,
        default=-1.0,
        metavar="E",
        help="of the compiler, -1 (quick, the default) to 1; a run's is 0",
    )
    p.add_argument("--to", "--json", dest="json", metavar="PATH", help="also write the report to this file, as JSON")
    p = verb(
        "sweep",
        "train and evaluate a grid of runs under one budget of FLOPs",
        report=True,
        more="Skips what is done and goes on with what was stopped; Ctrl-C saves the run that is going on and exits "
        "with code 75. A run that fails is kept and shown. --config.NAME=VALUE holds for all runs. docs/scaling.md.",
    )
    p.add_argument("--config", required=True, metavar="FILE", help="a sweep, such as configs/sweeps/smoke.py")
    p.add_argument("--to", default="", metavar="DIR", help="its folder (default: runs/sweeps/NAME)")
    p.add_argument("--only", default="", metavar="NAME", help="one run; what a job of a cluster does")
    p.add_argument("--retry", action="store_true", help="run failed and diverged runs once more")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--plan", action="store_true", help="list the runs with their steps and FLOPs; run none")
    how.add_argument("--collect", action="store_true", help="write sweep.json and show how things stand; run none")
    how.add_argument("--write", choices=("slurm", "jobset"), help="write jobs for a cluster; run none")
    p = verb(
        "fit",
        "fit scaling laws to runs: files of figures, sweeps, or workdirs",
        report=True,
        more="Iso-FLOP parabolas, L(N, D) = E + A/N^alpha + B/D^beta, lines over FLOPs and parity ratios between "
        "families, with intervals; writes fit.json, fit.md, points.csv and plots. docs/scaling.md.",
    )
    p.add_argument("sources", nargs="+", metavar="PATH", help=".csv or .json, a sweep's folder, [FAMILY=]WORKDIR")
    p.add_argument("--to", required=True, metavar="DIR", help="where the files go")
    p.add_argument(
        "--metric", action="append", default=[], metavar="NAME", help="what is fitted (default: loss); can be repeated"
    )
    p.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="RULE",
        help="an outlier rule: 'fid<=100'; can be repeated",
    )
    p.add_argument("--draws", type=int, default=1000, metavar="N", help="of every bootstrap (1,000)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstraps (0)")
    p = verb(
        "report",
        "put runs on one HTML page that needs nothing else: curves, samples, reconstructions, settings, fits",
        report=True,
        more="It shows what `evaluate` has found and what was logged, and computes nothing anew.",
    )
    p.add_argument("sources", nargs="+", metavar="DIR", help="workdirs, folders of `fit` and of `sweep`")
    p.add_argument("--out", metavar="HTML", default="report.html", help="where the page goes (default: report.html)")
    p.add_argument("--title", default="", help="of the page (default: the names of the runs)")
    p = verb(
        "flags",
        "print the compiler's flags for a chip, as a line that launch scripts evaluate",
        report=True,
        more="With --explain also what they are for and who sets them. docs/monitoring.md.",
    )
    p.add_argument("--chip", required=True, metavar="NAME", help="v5e, v5p, v6e, h100 or h200")
    p.add_argument("--explain", action="store_true", help="say where each comes from, in comments")


def plan(args, overrides, report) -> int:
    from ddt_jax import planning

    result, text = planning.run(args, overrides)
    report(args, result, text)
    return 0


def sweep(args, overrides, report) -> int:
    from ddt_jax import sweeping
    from ddt_jax.training.loop import EXIT_STOPPED

    planned = sweeping.plan(args.config, args.to, overrides, args.only)
    if args.plan:
        report(args, planned.as_json(), planned.listing())
        return 0
    if args.write:
        command = ["ddt-jax", "sweep", "--config", args.config, "--to", planned.root]
        path = sweeping.write_jobs(args.write, planned, [*command, *(f"--config.{k}={v}" for k, v in overrides)])
        report(args, {"written": path}, f"written: {path}")
        return 0
    ended = args.collect or sweeping.run(planned, retry=args.retry, alone=bool(args.only))
    if args.only:  # the other jobs write their own records; sweep.json is made of all of them, by --collect
        return 0 if ended else EXIT_STOPPED
    tree = sweeping.collect(planned)
    text = f"{planned.table()}\n" if args.collect else ""
    report(args, tree, f"{text}written: {planned.root}/sweep.json" if ended else "stopped; the same command goes on")
    return 0 if ended else EXIT_STOPPED


def fit(args, overrides, report) -> int:
    from ddt_jax import fitting

    _no_settings("fit", overrides)
    how = {"metrics": args.metric or ["loss"], "keep": args.keep, "draws": args.draws, "seed": args.seed}
    result = fitting.fit(args.sources, args.to, **how)
    report(args, result["study"], "\n".join([result["table"], "written:", *(f"  {p}" for p in result["written"])]))
    return 0


def report(args, overrides, report) -> int:
    from ddt_jax import reporting

    _no_settings("report", overrides)
    result = reporting.report(args.sources, args.out, args.title)
    report(args, result, f"written: {result['written']} ({result['bytes'] / 2**20:.1f} MB)")
    return 0


def flags(args, overrides, report) -> int:
    from ddt_jax.scaling import xla_flags

    _no_settings("flags", overrides)
    tree = {"variable": xla_flags.variable(args.chip), "flags": xla_flags.of(args.chip)}
    report(args, tree, (xla_flags.listing if args.explain else xla_flags.shell)(args.chip))
    return 0


def _no_settings(name, overrides) -> None:
    if overrides:
        raise UserError(f"--config.{overrides[0][0]}: {name} takes no settings")


VERBS = {"plan": plan, "sweep": sweep, "fit": fit, "report": report, "flags": flags}
