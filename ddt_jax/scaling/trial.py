"""A trial: systems against each other at equal cost, from a Python file. docs/comparison.md has the protocol.

def get_trial():
    return trial.Trial(
        name="images", total=5e13, rates=(1e-3, 2e-3, 4e-3), guidances=(1.0, 2.0), first_guidance=2.0,
        arms={"codes": trial.Arm("../x.py:codes:{root}/codes", {"../y.py": 2300}), "pixels": trial.Arm("../x.py:z")})
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddt_jax.errors import UserError
from ddt_jax.scaling import sweep

ROOT = "{root}"  # in the text of a config, the folder that the trial is run in


@dataclass(frozen=True)
class Arm:
    """A system.

    Attributes:
      config: of its transformer, "FILE.py" or "FILE.py:VARIANT", seen from the trial's own file; see ROOT.
      tokenizer: config → steps of the stages of its image tokenizer, each of which begins with the one before; none:
        images are not codes.
    """

    config: str
    tokenizer: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """What is compared, and how.

    Attributes:
      total: FLOPs of training that each arm may cost, all that it reads included.
      rates: the grid of learning rates of every arm, rising.
      beyond: how many rates more an arm may have, one after the other and each as far from the last as that is from its
        neighbour, as long as its best one is at an edge.
      guidances: that every arm is tried with.
      first_guidance: of these, the one that rates are compared at.
      seeds: of every arm; rates and guidance are chosen on the first alone.
      records, held_out: images that are made into codes.
      changes: settings of all transformers.
      codecs: file of frozen weights → workdir of the run that made it, which is then counted.
      tolerance: by how much total costs may differ, largest over smallest.
    """

    name: str
    arms: Mapping[str, Arm]
    total: float
    rates: tuple[float, ...]
    guidances: tuple[float, ...]
    first_guidance: float
    seeds: tuple[int, ...] = (0, 1, 2)
    records: int = 160_000
    held_out: int = 2048
    changes: Mapping[str, Any] = field(default_factory=dict)
    codecs: Mapping[str, str] = field(default_factory=dict)
    beyond: int = 0
    tolerance: float = 0.02


def load(path: str) -> Trial:
    """The trial that a Python file describes.

    Raises:
      UserError: the file is missing or fails, or a field of the trial is wrong.
    """
    found = sweep.described(path, "compare", "get_trial", Trial)
    if len(found.arms) < 2:
        raise UserError(f"compare: {path} has {len(found.arms)} arms; a comparison takes two or more")
    for name in ("rates", "guidances", "seeds"):
        values = getattr(found, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"compare: {name} of {path} must be one value or more, each once; got {values}")
    for name in ("total", "records", "held_out", "tolerance"):
        if not getattr(found, name) > 0:
            raise UserError(f"compare: {name} of {path} must be above 0, got {getattr(found, name)}")
    if not min(*found.rates, *found.guidances) > 0:
        raise UserError(f"compare: rates and guidances of {path} must be above 0")
    if list(found.rates) != sorted(found.rates) or (found.beyond and len(found.rates) < 2):
        raise UserError(f"compare: rates of {path} must rise, and be two or more to go beyond; got {found.rates}")
    if found.beyond < 0:
        raise UserError(f"compare: beyond of {path} must be 0 or more, got {found.beyond}")
    if found.seeds[0] != min(found.seeds):
        raise UserError(f"compare: seeds of {path} must begin with the lowest, on which is chosen; got {found.seeds}")
    if found.first_guidance not in found.guidances:
        raise UserError(f"compare: first_guidance={found.first_guidance} of {path} is none of its guidances")
    return found


def place(path: str, text: str, root: str) -> str:
    """The config that a trial's file names, as `config.load` takes it.

    Args:
      path: of the trial's file.
      text: "FILE.py" or "FILE.py:VARIANT".
      root: what ROOT stands for.
    """
    file, colon, variant = text.partition(":")
    return f"{(Path(path).parent / file).resolve()}{colon}{variant.replace(ROOT, root)}"
