"""The commands of a comparison that keeps its protocol, without running any. What `compare.py plan` prints."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Arm:
    """An arm that is to be trained.

    Attributes:
      config: of the transformer, FILE.py:VARIANT.
      steps: that cost what all arms may cost.
      tokenizer: (config, overrides) of its image tokenizer's stages, each begins with the one before; () = images are
        not codes.
      workdir: of the tokenizer, where the transformer's config expects it.
      folders: (source, records, folder of codes) of each part that the transformer reads.
      rate: the learning rate that was chosen; 0 = not yet.
    """

    name: str
    config: str
    steps: int
    tokenizer: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    workdir: str = ""
    folders: tuple[tuple[str, int, str], ...] = field(default=())
    rate: float = 0.0


def run_of(to: str, arm: str, rate: float, seed: int) -> str:
    """The workdir of a run."""
    return str(Path(to) / arm / f"lr{rate:g}_seed{seed}")


def commands(
    arms: list[Arm], to: str, *, rates: list[float], seeds: list[int], guidances: list[float], base: float
) -> list[str]:
    """Lines for a shell.

    While a rate is missing: tokenizers, codes, and the grid on the first seed, evaluated with `base` guidance. With all
    rates: the other seeds at each arm's rate, all of them evaluated with each guidance.
    """
    if not all(arm.rate for arm in arms):
        grids = [line for arm in arms for line in _grid(arm, to, rates, seeds[0], base)]
        return [*grids, *_judge(arms, to, rates, seeds[:1], draft=True)]
    lines = []
    for arm in arms:
        lines.append(f"# {arm.name}: seeds {', '.join(map(str, seeds))} at learning rate {arm.rate:g}")
        for seed in seeds:
            workdir = run_of(to, arm.name, arm.rate, seed)
            lines += [_train(arm, workdir, arm.rate, seed)] if seed != seeds[0] else []
            lines += [_evaluate(workdir, guidance) for guidance in guidances]
    return [*lines, *_judge(arms, to, rates, seeds, draft=False)]


def _grid(arm, to, rates, seed, base):
    if arm.tokenizer:
        yield f"# {arm.name}: what it reads"
        begun = ()
        for number, (stage, changed) in enumerate(arm.tokenizer, 1):
            workdir = arm.workdir if number == len(arm.tokenizer) else f"{arm.workdir}_stage{number}"
            flags = [f"--config.{name}={value}" for name, value in changed]
            yield _line("ddt-jax", "train", "--config", stage, "--workdir", workdir, *flags, *begun)
            begun = (f"--config.init_from={workdir}",)
        for source, records, folder in arm.folders:
            more = ("--source", source, "--records", records)
            yield _line("ddt-jax", "tokenize", "--workdir", arm.workdir, "--to", folder, *more)
    yield f"# {arm.name}: learning rates, {arm.steps:,} steps each"
    for rate in rates:
        workdir = run_of(to, arm.name, rate, seed)
        yield _train(arm, workdir, rate, seed)
        yield _evaluate(workdir, base)


def _train(arm, workdir, rate, seed):
    changed = {"train.steps": arm.steps, "optimizer.lr": f"{rate:g}", "seed": seed}
    flags = (f"--config.{name}={value}" for name, value in changed.items())
    return _line("ddt-jax", "train", "--config", arm.config, "--workdir", workdir, *flags)


def _evaluate(workdir, guidance):
    flag = f"--config.evaluate.text_to_image.guidance={guidance:g}"
    return _line("ddt-jax", "evaluate", "--workdir", workdir, flag, "--json", f"{workdir}/sampling/{guidance:g}.json")


def _judge(arms, to, rates, seeds, *, draft):
    given = []
    for arm in arms:
        runs = {run_of(to, arm.name, rate, seeds[0]): None for rate in rates}
        runs |= {run_of(to, arm.name, arm.rate, seed): None for seed in seeds if arm.rate}
        given += ["--arm", f"{arm.name}={','.join(runs)}"]
    where = str(Path(to) / ("draft" if draft else "result"))
    yield "# " + ("the best rates, for `plan --chosen ARM=RATE`" if draft else "the table")
    yield _line("python", "tools/compare.py", *given, "--to", where, *(["--draft"] if draft else []))


def _line(*parts):
    return shlex.join(map(str, parts))
