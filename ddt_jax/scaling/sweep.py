"""A sweep: a grid of runs under one budget of FLOPs, from a Python file to a list of runs that each are one command.

def get_sweep():
    return sweep.Sweep(
        name="widths", arms={"ddt": "../ddt_scenes.py"}, sizes=(32, 64), dial=widths,
        amount="flops", amounts=(1e12, 1e13), lrs=(3e-3, 6e-3), seeds=(0, 1), budget=1e15)
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddt_jax import config, settings
from ddt_jax.errors import UserError

AMOUNTS = ("flops", "steps", "examples", "tokens")


@dataclass(frozen=True)
class Sweep:
    """What to run: every arm at every size, amount, learning rate and seed.

    Attributes:
      arms: name → "FILE.py" or "FILE.py:VARIANT", seen from the sweep's own file.
      dial: (arm, size) → settings that make a model of that size, {"model.width": 64}.
      amount: what `amounts` count for each run: its own training "flops" (sizes of one amount are then an iso-FLOP
        curve), "steps", "examples" (images, or rows of a transformer), "tokens" (places in its rows).
      lrs: learning rates; none: the config's own.
      changes: settings of all runs.
      budget: FLOPs that all runs together may take.
      evaluate: whether each is evaluated when it is trained.
    """

    name: str
    arms: Mapping[str, str]
    amount: str
    amounts: tuple[float, ...]
    budget: float
    sizes: tuple[Any, ...] = ("",)
    dial: Callable[[str, Any], Mapping[str, Any]] = lambda arm, size: {}
    lrs: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)
    changes: Mapping[str, Any] = field(default_factory=dict)
    evaluate: bool = True


@dataclass(frozen=True)
class Cost:
    """What a config costs. flops, examples, tokens: of a step."""

    params: float
    flops: float
    examples: float
    tokens: float


@dataclass(frozen=True)
class Run:
    """A run of the grid.

    Attributes:
      overrides: (dotted name, text), as on the command line.
      steps, cost: 0 and None until `planned`.
    """

    name: str
    arm: str
    config: str
    overrides: tuple[tuple[str, str], ...]
    amount: float
    steps: int = 0
    cost: Cost | None = None

    @property
    def flops(self) -> float:
        return self.steps * self.cost.flops

    def arguments(self, verb: str, workdir: str) -> list[str]:
        """Of `ddt-jax`, to train or evaluate it."""
        if verb == "evaluate":
            return ["evaluate", "--workdir", workdir]
        texts = [f"--config.{name}={text}" for name, text in self.overrides]
        return ["train", "--config", self.config, "--workdir", workdir, *texts]


def described(path: str, who: str, function: str, kind: type):
    """What a function of a Python file in configs/sweeps returns, which must be of a type. who: begins the messages.

    Raises:
      UserError: the file is missing or fails, or returns something else.
    """
    if not Path(path).is_file():
        files = (file for file in sorted(Path().glob("configs/sweeps/*.py")) if f"def {function}(" in file.read_text())
        known = ", ".join(map(str, files))
        raise UserError(f"{who}: {path} does not exist" + (f"; there are {known}" if known else ""))
    try:
        found = getattr(config.sibling(path, Path(path).stem), function)()
    except UserError:
        raise
    except Exception as error:  # whatever the user's file did
        raise UserError(f"{who}: {path} failed with {type(error).__name__}: {error}".replace("\n", " ")) from error
    if not isinstance(found, kind):
        raise UserError(f"{who}: {function}() of {path} must return a {kind.__name__}, got {type(found).__name__}")
    return found


def load(path: str) -> Sweep:
    """The sweep that a Python file describes.

    Raises:
      UserError: the file is missing or fails, or a field of the sweep is wrong.
    """
    found = described(path, "sweep", "get_sweep", Sweep)
    if found.amount not in AMOUNTS:
        raise UserError(f"sweep: amount={found.amount!r} of {path} is not one of {', '.join(AMOUNTS)}")
    for name in ("arms", "amounts", "sizes", "seeds"):
        if not getattr(found, name):
            raise UserError(f"sweep: {name} of {path} is empty, so there is nothing to run")
    if not all(value > 0 for value in (*found.amounts, *found.lrs, found.budget)):
        raise UserError(f"sweep: amounts, lrs and budget of {path} must be above 0")
    return found


def grid(found: Sweep, path: str, more: Sequence[tuple[str, str]] = ()) -> list[Run]:
    """All runs, the cheapest amounts first, so that what is wrong shows early.

    Args:
      path: of the sweep's file.
      more: overrides of all runs, from the command line.

    Raises:
      UserError: two runs would have one name.
    """
    runs = []
    axes = (found.amounts, found.arms.items(), found.sizes, found.lrs or (None,), found.seeds)
    for amount, (arm, file), size, lr, seed in itertools.product(*axes):
        values = {**found.changes, **found.dial(arm, size), "seed": seed}
        if lr is not None:
            values["optimizer.lr"] = lr
        parts = [arm, f"{size}", f"{amount:.6g}{found.amount[0]}", "" if lr is None else f"lr{lr:g}", f"s{seed}"]
        name = "-".join(part for part in parts if part).replace("+", "").replace("/", "_")
        overrides = tuple((key, f"{value}") for key, value in values.items()) + tuple(more)
        place, colon, variant = file.partition(":")
        place = str((Path(path).parent / place).resolve())
        runs.append(Run(name, arm, f"{place}{colon}{variant}", overrides, amount))
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"sweep: two runs would be called {twice}; give sizes, amounts and rates that differ")
    return runs


def planned(run: Run, amount: str, cost: Callable[[settings.Experiment], Cost]) -> Run:
    """The run with its steps and what they cost.

    Args:
      amount: of the sweep.
      cost: of a config's step.

    Raises:
      UserError: its config is wrong, or the amount is less than a step.
    """
    of = cost(config.load(run.config, run.overrides))
    each = {"flops": of.flops, "steps": 1, "examples": of.examples, "tokens": of.tokens}[amount]
    steps = round(run.amount / each)
    if steps < 1:
        raise UserError(f"sweep: {run.name}: {run.amount:g} {amount} are less than a step of {each:g}; give more")
    return replace(run, steps=steps, cost=of, overrides=(*run.overrides, ("train.steps", str(steps))))


def check_budget(found: Sweep, runs: Sequence[Run]) -> None:
    """Raises UserError if the runs together cost more than the sweep may."""
    total = sum(run.flops for run in runs)
    if total > found.budget:
        raise UserError(
            f"sweep: {len(runs)} runs of {found.name} take {total:.3g} FLOPs, its budget is {found.budget:.3g}; "
            "shorten the grid or raise budget"
        )
