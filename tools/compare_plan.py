"""The steps of a comparison that keeps its protocol: commands of `ddt-jax`, what each needs, and what it makes.

Which steps come after a choice, of a learning rate or of guidance, is known before it is made; what they run is not.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddt_jax import config, ledger, settings
from ddt_jax.data import files
from ddt_jax.errors import UserError
from ddt_jax.scaling import trial
from ddt_jax.scaling.trial import Trial
from ddt_jax.training import checkpoint


@dataclass(frozen=True)
class Stage:
    """Of an image tokenizer's training. config: as `ddt-jax` takes it; named: as the trial's file does."""

    config: str
    named: str
    steps: int
    flops: float


@dataclass(frozen=True)
class Arm:
    """An arm whose cost is known.

    Attributes:
      config, named: of the transformer, as of a Stage.
      steps: that cost what all arms may cost.
      flops: name → operations: "training" of the transformer; the rest is what it reads.
      tokenizer: stages of its image tokenizer; () = images are not codes.
      workdir: of the tokenizer, where the transformer's config expects it.
      folders: (source, records, folder of codes) of each part that the transformer reads.
      uncounted: as in `comparison.Row`.
      classifier: workdir of the run that judges its pictures; "" = a program does.
    """

    name: str
    config: str
    named: str
    steps: int
    flops: Mapping[str, float]
    tokenizer: tuple[Stage, ...] = ()
    workdir: str = ""
    folders: tuple[tuple[str, int, str], ...] = ()
    uncounted: tuple[str, ...] = ()
    classifier: str = ""

    def run(self, root: str, rate: float, seed: int) -> str:
        """The workdir of a run."""
        return str(Path(root) / self.name / f"lr{rate:g}_seed{seed}")


@dataclass(frozen=True)
class Chosen:
    """Of an arm, on the first seed; None: not yet. beyond: rates that its grid went on to."""

    rate: float | None = None
    guidance: float | None = None
    beyond: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    """Something to run.

    Attributes:
      kind: "tokenizer", "codes", "training" or "evaluation".
      arguments: of `ddt-jax`; () while a choice is awaited.
      overrides: (name, text) of what decides what it makes: a step that began with others is another one.
      workdir: that it writes to; two steps are not at one at the same time.
      made: file or folder that is there when it is done.
      steps: that `made` is of, where it is of any.
      needs: names of the steps before it.
      awaits: names of the steps that the choice looks at, while it is awaited.
      flops: of it, 0 where nobody counts them.
    """

    name: str
    arm: str
    kind: str
    arguments: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()
    workdir: str = ""
    made: str = ""
    steps: int = 0
    needs: tuple[str, ...] = ()
    awaits: tuple[str, ...] = ()
    flops: float = field(default=0.0, compare=False)

    @property
    def verb(self) -> str:
        return self.arguments[0] if self.arguments else self.kind

    def done(self) -> bool:
        """Whether what it makes is there, whoever made it."""
        if not self.made:
            return False
        if self.verb == "train":
            return self.steps in checkpoint.saved_steps(self.made)
        path = Path(self.made)
        return path.exists() and (self.verb == "tokenize" or json.loads(path.read_text()).get("step") == self.steps)


def priced(found: Trial, path: str, root: str) -> list[Arm]:
    """The arms with the steps that each can pay for.

    Args:
      path: of the trial's file; root: the folder that it is run in.

    Raises:
      UserError: a config is wrong, an arm reads codes and has no tokenizer, or what it reads costs too much; or arms
        draw from more images than others.
    """
    arms, loaded_arms = [], {}
    for name, arm in found.arms.items():  # of all of them, before the work of counting begins
        loaded_arms[name] = config.load(trial.place(path, arm.config, root), _overrides(found.changes))
        _check_records(found, arm, loaded_arms[name])
    for name, arm in found.arms.items():
        s = loaded_arms[name]
        if not (s.evaluate.verifier or s.evaluate.classifier):
            raise UserError(
                f"compare: evaluate.verifier of {arm.config} is False and evaluate.classifier empty; rates are chosen "
                "by what they find"
            )
        places = [trial.place(path, text, root) for text in arm.tokenizer]
        loaded = [
            config.load(place, (("train.steps", f"{steps}"),))
            for place, steps in zip(places, arm.tokenizer.values(), strict=True)
        ]
        planned = ledger.plan(s, loaded[-1] if loaded else None, found.records, loaded[:-1])
        steps = planned.steps_within(found.total)
        stages, folders = [], ()
        for place, named, of in zip(places, arm.tokenizer, loaded, strict=True):
            stages.append(Stage(place, named, of.train.steps, of.train.steps * ledger.step_flops(of)))
        if loaded:
            parts = (*s.sequences.sources, *s.sequences.eval_sources)
            if len(parts) != 2:
                raise UserError(
                    f"compare: {arm.config} reads {len(parts)} folders; a plan knows one to train on, one held out"
                )
            data = loaded[-1].data
            sources = ((data.source, found.records), (data.eval_source, found.held_out))
            # As records of pictures call them: the order of formats is keyed by it.
            folders = tuple((files.expand(x), n, part.folder) for (x, n), part in zip(sources, parts, strict=True))
        flops = {"training": steps * planned.step, **planned.before}
        place = trial.place(path, arm.config, root)
        workdir = s.sequences.tokenizer if loaded else ""
        read, uncounted = (tuple(stages), workdir, folders), tuple(planned.uncounted)
        arms.append(Arm(name, place, arm.config, steps, flops, *read, uncounted, s.evaluate.classifier))
    return arms


def check_judges(arms: Sequence[Arm]) -> None:
    """Raises UserError if a classifier that judges pictures is not there: evaluations would fail, hours later."""
    for arm in arms:
        if arm.classifier and not checkpoint.saved_steps(arm.classifier):
            raise UserError(
                f"compare: evaluate.classifier={arm.classifier} of {arm.named} has no checkpoint; train it first, as "
                "the head of that config says, or name another in the trial's `changes`"
            )


def _check_records(found: Trial, arm: trial.Arm, s: settings.Experiment) -> None:
    """Images that are denoised are as many as those that other arms' codes are made of."""
    if not isinstance(s.model, settings.Multimodal) or not any(other.tokenizer for other in found.arms.values()):
        return
    for part in s.sequences.sources:
        if part.kind == "pictures" and part.records != found.records:
            raise UserError(
                f"compare: {arm.config} draws from {f'{part.records:,}' if part.records else 'all'} images of "
                f"{part.source}, and codes are made of {found.records:,}; make `records` of its sequences.sources and "
                "of the trial alike"
            )


def steps(found: Trial, arms: list[Arm], root: str, chosen: Mapping[str, Chosen]) -> list[Step]:
    """Everything that a comparison runs, what is to come first first: tokenizers and codes; the grids, all arms at one
    rate before the next, and beyond them where that was chosen; other seeds, guidance, and the other seeds at the best
    guidance.
    """
    rows: list[Step] = []
    for arm in arms:
        rows += _read(arm)
    tried = [(rate, arm) for rate in found.rates for arm in arms]
    tried += [(rate, arm) for arm in arms for rate in chosen.get(arm.name, Chosen()).beyond]
    for rate, arm in tried:
        rows += [_train(found, arm, root, rate, found.seeds[0]), _judge(found, arm, root, rate, found.seeds[0])]
    rows += [_judge_tokenizer(arm) for arm in arms if arm.tokenizer]
    for arm in arms:
        rows += _chosen(found, arm, root, chosen.get(arm.name, Chosen()))
    return rows


def grid(found: Trial, arm: str, beyond: tuple[float, ...]) -> dict[float, str]:
    """Rate → name of the evaluation that the choice of a rate looks at, the lowest first."""
    rates = sorted((*found.rates, *beyond))
    return {rate: named(arm, rate, found.seeds[0], found.first_guidance) for rate in rates}


def next_rate(rates: Sequence[float], best: float) -> float | None:
    """What comes beyond the edge of a rising grid at which its best rate is; None if it is at none."""
    if best == rates[0]:
        return float(f"{best * rates[0] / rates[1]:.6g}")
    return float(f"{best * rates[-1] / rates[-2]:.6g}") if best == rates[-1] else None


def on_ladder(found: Trial, rate: float) -> bool:
    """Whether a rate is one of the grid, or one that it may go on to."""
    down = up = found.rates
    for _ in range(found.beyond):
        down, up = (next_rate(down, down[0]), *down), (*up, next_rate(up, up[-1]))
    return rate in (*down, *up)


def _read(arm: Arm):
    """Training of the tokenizer, and the codes."""
    before, begun = (), ()
    for number, stage in enumerate(arm.tokenizer, 1):
        last = number == len(arm.tokenizer)
        workdir = arm.workdir if last else f"{arm.workdir}_stage{number}"
        overrides = (("train.steps", f"{stage.steps}"),)
        name = f"{arm.name}-tokenizer" + ("" if len(arm.tokenizer) == 1 else f"{number}")
        arguments = ("train", "--config", stage.config, "--workdir", workdir, *_flags((*overrides, *begun)))
        known = (("config", stage.named), *overrides)
        made = {"workdir": workdir, "made": workdir, "steps": stage.steps, "needs": before, "flops": stage.flops}
        yield Step(name, arm.name, "tokenizer", arguments, known, **made)
        before, begun = (name,), (("init_from", workdir),)
    of_all = sum(records for _, records, _ in arm.folders)
    for source, records, folder in arm.folders:
        arguments = ("tokenize", "--workdir", arm.workdir, "--to", folder, "--source", source)
        known = (("source", source), ("records", f"{records}"))
        cost = arm.flops["encoding"] * records / of_all
        made = {"workdir": folder, "made": f"{folder}/index.json", "needs": before, "flops": cost}
        name = f"{arm.name}-codes-{Path(folder).name}"
        yield Step(name, arm.name, "codes", (*arguments, "--records", f"{records}"), known, **made)


def _codes(arm: Arm) -> tuple[str, ...]:
    return tuple(f"{arm.name}-codes-{Path(folder).name}" for *_, folder in arm.folders)


def _train(found, arm, root, rate, seed) -> Step:
    changed = {**found.changes, "train.steps": arm.steps, "optimizer.lr": f"{rate:g}", "seed": seed}
    overrides, workdir = _overrides(changed), arm.run(root, rate, seed)
    arguments = ("train", "--config", arm.config, "--workdir", workdir, *_flags(overrides))
    made = {"workdir": workdir, "made": workdir, "steps": arm.steps, "needs": _codes(arm)}
    known = (("config", arm.named), *overrides)
    return Step(
        named(arm.name, rate, seed), arm.name, "training", arguments, known, **made, flops=arm.flops["training"]
    )


def _judge(found, arm, root, rate, seed, guidance=None) -> Step:
    guidance = found.first_guidance if guidance is None else guidance
    overrides, workdir = (("evaluate.text_to_image.guidance", f"{guidance:g}"),), arm.run(root, rate, seed)
    file = f"{workdir}/{ledger.SAMPLING}/{guidance:g}.json"
    arguments = ("evaluate", "--workdir", workdir, *_flags(overrides), "--json", file)
    made = {"workdir": workdir, "made": file, "steps": arm.steps, "needs": (named(arm.name, rate, seed),)}
    return Step(named(arm.name, rate, seed, guidance), arm.name, "evaluation", arguments, overrides, **made)


def _judge_tokenizer(arm: Arm) -> Step:
    """Its pictures: what no transformer on its codes can better."""
    stages, overrides = len(arm.tokenizer), (("evaluate.probe_images", "0"),)
    needs = (f"{arm.name}-tokenizer" + ("" if stages == 1 else f"{stages}"),)
    arguments = ("evaluate", "--workdir", arm.workdir, *_flags(overrides))
    made = {"workdir": arm.workdir, "made": f"{arm.workdir}/results.json", "steps": arm.tokenizer[-1].steps}
    return Step(f"{arm.name}-pictures", arm.name, "pictures", arguments, overrides, needs=needs, **made)


def _chosen(found, arm, root, choice: Chosen):
    """The steps after a choice. Those that await it have neither a command nor a number of their own."""
    first, *others = found.seeds
    name, rate = arm.name, choice.rate
    waits = () if rate else tuple(grid(found, name, choice.beyond).values())
    swept = []
    for guidance in (g for g in found.guidances if g != found.first_guidance):
        step = _judge(found, arm, root, rate, first, guidance) if rate else None
        swept.append(step or Step(f"{name}-best-s{first}-g{guidance:g}", name, "evaluation", awaits=waits))
    trained = []
    for seed in others:
        step = _train(found, arm, root, rate, seed) if rate else None
        left = {"awaits": waits, "flops": arm.flops["training"]}
        trained.append(step or Step(f"{name}-best-s{seed}", name, "training", **left))
    yield from (*swept, *trained)
    looked = (*waits, *(step.name for step in swept))
    for seed, step in zip(others, trained, strict=True):
        if rate and choice.guidance is not None:
            yield _judge(found, arm, root, rate, seed, choice.guidance)
        else:
            label = f"{name}-best-s{seed}-best"
            yield Step(label, name, "evaluation", needs=(step.name,), awaits=looked)


def named(arm: str, rate: float, seed: int, guidance: float | None = None) -> str:
    """The step that trains a run, or with guidance the one that evaluates it."""
    return f"{arm}-lr{rate:g}-s{seed}" + ("" if guidance is None else f"-g{guidance:g}")


def _overrides(changes) -> tuple[tuple[str, str], ...]:
    return tuple((name, f"{value}") for name, value in changes.items())


def _flags(overrides) -> tuple[str, ...]:
    return tuple(f"--config.{name}={value}" for name, value in overrides)
