"""Rows of earlier parts of a comparison, which other machines may have made: what they hold is not run again.

python tools/compare.py run --config configs/sweeps/image_languages.py --to runs/second_part --known comparison.json
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compare_plan import Arm, Step, named, on_ladder

from ddt_jax.errors import UserError
from ddt_jax.evaluation import comparison
from ddt_jax.evaluation.comparison import Row
from ddt_jax.scaling.trial import Trial


class Known:
    """Rows by the names of the steps that they spare.

    Args:
      paths: of comparison.json of earlier parts; of equal rows the last counts.
      root: the comparison's folder, as if they had been made in it.

    Raises:
      UserError: a file cannot be read, or holds a row that is not of this trial.
    """

    def __init__(self, paths: Sequence[str], found: Trial, arms: Sequence[Arm], root: str):
        self._evaluated: dict[str, Row] = {}
        self.diverged: dict[str, Row] = {}
        by_name = {arm.name: arm for arm in arms}
        for path in paths:
            for row in _read(path):
                _check(row, path, found, by_name)
                row = replace(row, run=str(Path(root) / row.run))
                if row.diverged:
                    self.diverged[named(row.arm, row.lr, row.seed)] = row
                else:
                    self._evaluated[_name(row)] = row

    def rows(self, arm: str) -> list[Row]:
        """Of an arm, without those that have diverged."""
        return [row for row in self._evaluated.values() if row.arm == arm]

    def merged(self, arm: str, made: Sequence[Row]) -> list[Row]:
        """Rows of an arm, where those that are made here stand in place of equal ones that are known."""
        return list({_name(row): row for row in (*self.rows(arm), *made)}.values())

    def spared(self, steps: Sequence[Step]) -> set[str]:
        """Names of the steps whose outcome is known, and of those that nothing needs which is left to be done.

        Args:
          steps: all there are; what needs a step comes after it.
        """
        if not self._evaluated and not self.diverged:
            return set()
        spared, over = set(), set(self.diverged)  # over: spared, or never to be
        for step in reversed(steps):
            if step.kind == "evaluation":
                known = step.name in self._evaluated
            elif step.kind == "pictures":
                known = any(comparison.TOKENIZER.keys() <= row.results.keys() for row in self.rows(step.arm))
            else:
                after = [other for other in steps if step.name in other.needs]
                known = bool(after) and all(other.name in over for other in after)
            if known and step.name not in self.diverged:
                spared.add(step.name)
            if known or any(need in self.diverged for need in step.needs):
                over.add(step.name)
        return spared


def _read(path) -> list[Row]:
    try:
        rows = comparison.from_json(json.loads(Path(path).read_text()))
        for row in rows:  # what is looked at below is there
            if not row.diverged:
                _name(row), row.total_flops
        return rows
    except OSError as error:
        raise UserError(f"compare: --known {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"compare: --known {path} is no comparison.json that `compare.py` has written ({error!r:.80})"
        ) from error


def _check(row, path, found, by_name) -> None:
    where = f"compare: --known {path}: {row.run} of {row.arm}"
    if row.arm not in by_name or not on_ladder(found, row.lr) or row.seed not in found.seeds:
        raise UserError(f"{where}, learning rate {row.lr:g} and seed {row.seed}, is not of this trial; leave it out")
    arm = by_name[row.arm]
    if row.steps != arm.steps:
        raise UserError(f"{where} was to have {row.steps:,} steps, here {arm.steps:,} are paid for; the trial differs")
    if row.diverged:
        return
    total = sum(arm.flops.values())
    if abs(row.total_flops / total - 1) > found.tolerance:
        raise UserError(f"{where} cost {row.total_flops:.3e} FLOPs in all, here {total:.3e}; the trial differs")
    if comparison.guidance(row.point) not in found.guidances:
        raise UserError(f"{where} was drawn with guidance {comparison.guidance(row.point):g}, which is not tried here")


def _name(row) -> str:
    return named(row.arm, row.lr, row.seed, comparison.guidance(row.point))
