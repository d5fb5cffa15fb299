"""Verbs of the command line for what a run has left: `checkpoint`, `replay`. As `cli`: arguments and calls."""

EXIT_DAMAGED = 3

_ACTIONS = {
    "digest": "a SHA-256 of the newest one: step, parameters, optimizer, average, codebook",
    "list": "their steps, sizes and figures, and whether they have been read back",
    "verify": "whether their files are as they were written; --deep: and their arrays those that were saved",
    "diff": "which arrays and settings of two differ, and by how much",
    "average": "a new run with the mean of the weights of several",
}


def add_verbs(verb, choices) -> None:
    """Adds the parsers. verb, choices: of `cli`, make a parser, and the help of a choice."""
    p = verb(
        "checkpoint",
        "look at the checkpoints of a run",
        workdir=True,
        report=True,
        more="Exits with 3 if verify finds damage. Only digest and average need a device.",
    )
    p.add_argument("action", choices=_ACTIONS, help=choices(_ACTIONS))
    p.add_argument("--step", type=int, metavar="N", help="verify, diff: the one at this step")
    p.add_argument("--deep", action="store_true", help="verify: read every array as well")
    p.add_argument("--with", dest="other", default="", metavar="DIR", help="diff: the other run (default: the same)")
    p.add_argument("--with-step", type=int, metavar="N", help="diff: the step of the other (default: its newest)")
    p.add_argument("--steps", default="", metavar="N,N", help="average: of these (default: of all)")
    p.add_argument("--to", default="", metavar="DIR", help="average: workdir of the new run")
    p = verb(
        "replay",
        "do a step of a run again, from the checkpoint before it, and compare it with the log bit by bit",
        workdir=True,
        report=True,
        more="Exits with 3 if they differ. docs/survival.md says what may be the reason.",
    )
    p.add_argument("--step", type=int, required=True, metavar="N", help="as the log counts: the first is 1")


def checkpoint(args, overrides, report) -> int:
    from ddt_jax import experiment, inspection

    sound = True
    if args.action == "digest":
        value = experiment.digest(args.workdir)
        report(args, {"digest": value}, value)
    elif args.action == "diff":
        found = inspection.diff(args.workdir, args.step, args.other or args.workdir, args.with_step)
        report(args, found, inspection.differences(found))
    elif args.action == "average":
        result = inspection.average(args.workdir, args.steps, args.to)
        report(args, result, f"mean of the weights at steps {', '.join(map(str, result['steps']))}: {args.to}")
    else:
        rows = inspection.listed(args.workdir)
        if args.action == "verify":
            rows = inspection.verify(args.workdir, args.step, deep=args.deep)
            sound = all(row["sound"] for row in rows)
        report(args, {"steps": [row["step"] for row in rows], "checkpoints": rows}, inspection.table(rows))
    return 0 if sound else EXIT_DAMAGED


def replay(args, overrides, report) -> int:
    from ddt_jax import replaying

    found = replaying.replay(args.workdir, args.step, overrides)
    report(args, found, replaying.text(found))
    return EXIT_DAMAGED if found["equal"] is False else 0
