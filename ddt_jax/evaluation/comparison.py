"""Systems against each other at equal cost: what is chosen of each arm, the figures with their intervals, and every way
in which runs do not keep the protocol of docs/comparison.md.

Everything here is a pure function of `Row`s; `ddt_jax/ledger.py` makes them of workdirs.

An arm is one system: a grid of learning rates on the tuning seed (the lowest that all arms have), then more seeds at
the best rate, then a sweep of sampling settings. Both choices look at the tuning seed alone, at the mean of the shares
in `CHOSEN_BY`; of equal ones the lowest rate is taken.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ddt_jax.errors import UserError
from ddt_jax.evaluation import paired
from ddt_jax.evaluation.metrics import binomial_interval, mean_interval

MIN_SEEDS = 3
MIN_RATES = 3  # that all arms have, where some have more
TOLERANCE = 0.02  # by how much total training costs may differ, largest over smallest

# Figure of results.json → heading. Perplexity of text without marks: the only text that all arms predict alike.
FIGURES = {
    "plain_perplexity": "text perplexity",
    "caption_all_correct": "captions right",
    "t2i_all_correct": "pictures right",
}
SHARES = tuple(name for name in FIGURES if name.endswith("_all_correct"))
CHOSEN_BY = SHARES
# Of pictures of scenes: shares of what their captions ask for, by task (`evaluation.compositional`).
TASKS = {
    "t2i_single_object": "one object",
    "t2i_colours": "its colour",
    "t2i_two_objects": "two objects",
    "t2i_counting": "counting",
    "t2i_position": "position",
    "t2i_attribute_binding": "binding",
}
# The same of an arm's image tokenizer, whose reconstructions no picture of the arm can better.
TOKENIZER = {
    "tokenizer_psnr": ("PSNR, dB", ".2f"),
    "tokenizer_scenes_all_correct": ("read back right", ".1%"),
    "tokenizer_codebook_used": ("codes in use", ",.0f"),
    "tokenizer_bits_per_image": ("bits", ",.0f"),
}


@dataclass(frozen=True)
class Row:
    """A run, as it was evaluated with one choice of sampling settings.

    Attributes:
      run: its workdir, for messages.
      step, steps: where it was evaluated, how many it was to have.
      flops: name → operations: "training" of the run itself; the rest is what its input cost.
      seen: name → how many it learned from: images, text tokens, positions of images.
      alike: dotted name → value of everything that has to be the same in all runs.
      uncounted: costs that are not in `flops`, a line each.
      diverged: why a run has no results; such a one has no flops, seen, alike and sampling either, and counts as a
        learning rate that was tried.
      sampling: "text_to_image" and "image_to_text" settings, as JSON.
      results: of `ddt-jax evaluate`.
    """

    arm: str
    run: str
    seed: int
    lr: float
    step: int
    steps: int
    flops: dict[str, float]
    seen: dict[str, float]
    alike: dict[str, Any]
    sampling: dict[str, Any]
    results: dict[str, Any]
    uncounted: tuple[str, ...] = ()
    diverged: str = ""

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def point(self) -> str:
        """Sampling settings as a key."""
        return json.dumps(self.sampling, sort_keys=True)


@dataclass(frozen=True)
class Arm:
    """What is reported of an arm: its runs at the chosen rate and sampling settings, one for each seed.

    Attributes:
      rates: how many learning rates were tried, of which the best is one.
      untuned: figures without the seed that rate and sampling settings were chosen on, which choosing flatters.
      tasks: those of TASKS that it has.
    """

    name: str
    lr: float
    rows: tuple[Row, ...]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    rates: int = 1
    untuned: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    diverged: a line for each run that did.
    differences: between every two arms.
    """

    arms: tuple[Arm, ...]
    violations: tuple[str, ...]
    diverged: tuple[str, ...] = ()
    differences: tuple[paired.Difference, ...] = ()


def compare(rows: Sequence[Row], *, tolerance: float = TOLERANCE, lost: Sequence[str] = ()) -> Comparison:
    """Chooses, computes and checks.

    Args:
      rows: of at least two arms.
      tolerance: see TOLERANCE.
      lost: lines about runs that were to be in it and are not: the first demands that are not kept.

    Raises:
      UserError: there are fewer than two arms, or the tuning seed has no run with the shares of CHOSEN_BY in one.
    """
    tried, rows = rows, [row for row in rows if not row.diverged]
    names = list(dict.fromkeys(row.arm for row in rows))
    if len(names) < 2:
        raise UserError(
            f"compare: a comparison takes two arms or more, of which runs are evaluated; there is {names or 'none'}"
        )
    by_arm = {name: [row for row in rows if row.arm == name] for name in names}
    grids = {name: [row for row in tried if row.arm == name] for name in names}
    seed = _tuning_seed(by_arm)
    chosen = {name: choose(name, of, seed) for name, of in by_arm.items()}
    arms = []
    for name, (lr, point) in chosen.items():
        final = tuple(sorted((r for r in by_arm[name] if r.lr == lr and r.point == point), key=lambda row: row.seed))
        figures, untuned = (
            {figure: _figure(figure, of) for figure in FIGURES}
            for of in (final, [row for row in final if row.seed != seed])
        )
        tasks = {task: of for task in TASKS if (of := _figure(task, final))}
        arms.append(Arm(name, lr, final, figures, len({row.lr for row in grids[name]}), untuned, tasks))
    violations = [
        *lost,
        *_unlike(rows),
        *_costs(rows, tolerance),
        *_unfinished(rows),
        *_grids(grids, seed),
        *_edges(grids, chosen, seed),
        *_seeds(by_arm, chosen),
        *_survivors(grids, chosen, seed),
        *_sweeps(by_arm, chosen, seed),
        *_missing(arms),
    ]
    lines = tuple(f"{row.arm}: {row.run} diverged: {row.diverged}" for row in tried if row.diverged)
    by_seed = {arm.name: {row.seed: row.results for row in arm.rows} for arm in arms}
    differences = paired.differences(by_seed, FIGURES)
    return Comparison(tuple(arms), tuple(dict.fromkeys(violations)), lines, tuple(differences))


def _figure(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Mean over seeds, interval of 95 %, and what that is of.

    "seeds": Student's over the runs. A share also has Wilson's interval of all answers together, "answers": seeds are
    few and may agree by chance, while all of them are asked the same. The wider of the two is given.
    """
    values = [row.results[name] for row in rows if row.results.get(name) is not None]
    if not values:
        return {}
    low, high = mean_interval(values)
    found = {"value": statistics.fmean(values), "low": low, "high": high, "of": "seeds", "values": values}
    counts = [row.results.get(f"{name}_n", 0) for row in rows if row.results.get(name) is not None]
    if (name in SHARES or name in TASKS) and all(counts):
        right = sum(round(value * n) for value, n in zip(values, counts, strict=True))
        answers = binomial_interval(right, sum(counts))
        if not math.isfinite(high - low) or answers[1] - answers[0] > high - low:
            found |= {"low": answers[0], "high": answers[1], "of": "answers"}
        found |= {"low": max(found["low"], 0.0), "high": min(found["high"], 1.0)}
    if not math.isfinite(found["high"] - found["low"]):
        found |= {"low": None, "high": None, "of": "nothing"}
    return found


def guidance(point: str) -> float:
    """That of sampling settings, by their key."""
    return json.loads(point)["text_to_image"]["guidance"]


def _tuning_seed(by_arm) -> int:
    common = set.intersection(*({row.seed for row in of} for of in by_arm.values()))
    if not common:
        seeds = "; ".join(f"{name} {sorted({row.seed for row in of})}" for name, of in by_arm.items())
        raise UserError(f"compare: no seed is in every arm ({seeds}); rates are chosen on one that is")
    return min(common)


def choose(name: str, rows: Iterable[Row], seed: int) -> tuple[float, str]:
    """(learning rate, key of sampling settings) of an arm that do best on the tuning seed.

    Rates are held against each other at sampling settings that all of them have, where there are any.

    Raises:
      UserError: no run of that seed has the shares of CHOSEN_BY.
    """
    scored = {(row.lr, row.point): _score(row) for row in rows if row.seed == seed and _score(row) is not None}
    if not scored:
        raise UserError(
            f"compare: no run of {name} with seed {seed} has {' and '.join(CHOSEN_BY)}, by which rates are chosen; "
            "evaluate them with evaluate.verifier=True"
        )
    rates, points = sorted({lr for lr, _ in scored}), sorted({point for _, point in scored})
    common = [point for point in points if all((lr, point) in scored for lr in rates)] or points
    lr = max(rates, key=lambda lr: max(s for (r, point), s in scored.items() if r == lr and point in common))
    return lr, max((point for point in points if (lr, point) in scored), key=lambda point: scored[lr, point])


def _score(row) -> float | None:
    values = [row.results.get(name) for name in CHOSEN_BY]
    return None if None in values else statistics.fmean(values)


# What does not keep the protocol. Each yields lines that name the arms, the values and what was asked for.


def _unlike(rows) -> Iterable[str]:
    names = dict.fromkeys(name for row in rows for name in row.alike)
    for name in names:
        of_value: dict[str, list[str]] = {}
        for row in rows:
            of_value.setdefault(json.dumps(row.alike.get(name), sort_keys=True), []).append(row.arm)
        if len(of_value) > 1:
            listed = "; ".join(f"{', '.join(dict.fromkeys(arms))} {value}" for value, arms in of_value.items())
            yield f"{name} is not the same in all runs: {listed}"


def _costs(rows, tolerance) -> Iterable[str]:
    low, high = (key(rows, key=lambda row: row.total_flops) for key in (min, max))
    if high.total_flops > (1 + tolerance) * low.total_flops:
        more = high.total_flops / low.total_flops - 1
        yield (
            f"total training FLOPs are not equal: {low.total_flops:.3e} of {low.run} ({low.arm}), "
            f"{high.total_flops:.3e} of {high.run} ({high.arm}), {more:.1%} more; at most {tolerance:.1%} are allowed"
        )
    for row in rows:
        for line in row.uncounted:
            yield f"{row.arm}: {line}"


def _unfinished(rows) -> Iterable[str]:
    for row in rows:
        if row.step != row.steps:
            yield f"{row.arm}: {row.run} was evaluated at step {row.step:,} of {row.steps:,}"


def _grids(by_arm, seed) -> Iterable[str]:
    """One grid for all, of three rates or more where some arms went on beyond its edges."""
    grids = {name: sorted({row.lr for row in of}) for name, of in by_arm.items()}
    common = sorted(set.intersection(*map(set, grids.values())))
    within = {lr for grid in grids.values() for lr in grid if common and common[0] <= lr <= common[-1]}
    if len({tuple(grid) for grid in grids.values()}) > 1 and (len(common) < MIN_RATES or within != set(common)):
        listed = "; ".join(f"{name} {_rates(grid)}" for name, grid in grids.items())
        yield f"learning rates were not tuned over the same grid: {listed}"
    for name, of in by_arm.items():
        lacking = sorted(set(grids[name]) - {row.lr for row in of if row.seed == seed})
        if lacking:
            yield f"{name}: learning rates {_rates(lacking)} have no run with seed {seed}, on which rates are chosen"


def _edges(by_arm, chosen, seed) -> Iterable[str]:
    for name, (lr, _) in chosen.items():
        grid = sorted({row.lr for row in by_arm[name]})
        if lr not in (grid[0], grid[-1]):
            continue
        line = f"{name}: the best learning rate, {lr:g}, is at the edge of its grid, {_rates(grid)}"
        if len(grid) > 1:
            beside = grid[1] if lr == grid[0] else grid[-2]
            mine, others = (
                {r.point: s for r in by_arm[name] if (r.lr, r.seed) == (rate, seed) and (s := _score(r)) is not None}
                for rate in (lr, beside)
            )
            if common := mine.keys() & others.keys():
                more = max(mine[point] for point in common) - max(others[point] for point in common)
                line += f" (shares are {100 * more:.1f} points better than at {beside:g})"
        yield f"{line}; go beyond it"


def _seeds(by_arm, chosen) -> Iterable[str]:
    seeds = {}
    for name, (lr, _) in chosen.items():
        runs = {(row.run, row.seed) for row in by_arm[name] if row.lr == lr}
        seeds[name] = sorted({seed for _, seed in runs})
        if len(seeds[name]) < MIN_SEEDS:
            yield f"{name}: {len(seeds[name])} seeds at learning rate {lr:g}; the protocol asks for {MIN_SEEDS}"
    for name, of in by_arm.items():
        for (lr, seed), count in Counter((lr, seed) for lr, seed, _ in {(r.lr, r.seed, r.run) for r in of}).items():
            if count > 1:
                yield f"{name}: {count} runs have seed {seed} at learning rate {lr:g}; give each run once"
    if len({tuple(found) for found in seeds.values()}) > 1:
        listed = "; ".join(f"{name} {', '.join(map(str, found))}" for name, found in seeds.items())
        yield f"seeds, and with them the order of data, are not the same: {listed}"


def _survivors(grids, chosen, seed) -> Iterable[str]:
    """A mean over the seeds that did not diverge is no mean over seeds."""
    for name, (lr, _) in chosen.items():
        for row in grids[name]:
            if row.diverged and row.lr == lr and row.seed != seed:
                yield f"{name}: seed {row.seed} diverged at its rate, {lr:g}; its figures are of the runs that did not"


def _sweeps(by_arm, chosen, seed) -> Iterable[str]:
    """The tuning seed is evaluated with all sampling settings, the others with those that it has chosen."""
    guidances, sizes, texts = {}, {}, {}
    for name, (lr, best) in chosen.items():
        points: dict[tuple[str, int], set[str]] = {}
        for row in by_arm[name]:
            if row.lr == lr:
                points.setdefault((row.run, row.seed), set()).add(row.point)
        every = set.union(*points.values())
        for (run, of), found in points.items():
            if of == seed and found != every:
                yield f"{name}: {run} was evaluated with {len(found)} of the {len(every)} sampling settings of its arm"
            elif best not in found:
                yield f"{name}: {run} was not evaluated with guidance {guidance(best):g}, which seed {seed} has chosen"
        settings = [json.loads(point) for point in every]
        guidances[name] = sorted({guidance(point) for point in every})
        texts[name] = sorted({json.dumps(s["image_to_text"], sort_keys=True) for s in settings})
        sizes[name] = len(every)
    if len({tuple(found) for found in guidances.values()}) > 1:
        listed = "; ".join(f"{name} {', '.join(f'{g:g}' for g in found)}" for name, found in guidances.items())
        yield f"guidance was not swept over the same values: {listed}"
    if len(set(sizes.values())) > 1:
        listed = "; ".join(f"{name} {count}" for name, count in sizes.items())
        yield f"not as many sampling settings were tried in each arm: {listed}"
    if len({tuple(found) for found in texts.values()}) > 1:
        yield f"captions were not drawn with the same settings: {', '.join(f'{n} {v}' for n, v in texts.items())}"


def _missing(arms) -> Iterable[str]:
    for arm in arms:
        for name in FIGURES:
            without = [row.run for row in arm.rows if row.results.get(name) is None]
            if without:
                yield f"{arm.name}: {', '.join(without)} has no {name}; evaluate it again"


def _rates(rates) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def markdown(found: Comparison) -> str:
    """Tables of figures, differences, tasks, tokenizers and costs, and below them what diverged and what does not keep
    the protocol.
    """
    lines = ["| arm | seeds | " + " | ".join(FIGURES.values()) + " |", "|---|---:|" + "---:|" * len(FIGURES)]
    for arm in found.arms:
        cells = (_cell(name, arm.figures[name]) for name in FIGURES)
        lines.append(f"| {arm.name} | {len(arm.rows)} | {' | '.join(cells)} |")
    lines += [
        "",
        "Means over seeds with intervals of 95 %: of seeds, Student's over runs; of answers, Wilson's over all",
    ]
    lines += ["answers of all runs, where that is wider.", ""]
    lines += paired.table(found.differences, FIGURES, SHARES)
    lines += _tasks(found.arms)
    lines += _tokenizers(found.arms)
    parts = list(dict.fromkeys(name for arm in found.arms for row in arm.rows for name in row.flops))
    seen = list(dict.fromkeys(name for arm in found.arms for row in arm.rows for name in row.seen))
    heads = [
        "steps",
        "learning rate",
        "rates tried",
        "total FLOPs",
        *parts,
        *(f"{name} seen" for name in seen),
        "sampling",
    ]
    lines += [f"| arm | {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}---|"]
    for arm in found.arms:
        first = arm.rows[0]  # costs of seeds are alike, or it is said below
        cells = [f"{first.steps:,}", f"{arm.lr:g}", f"{arm.rates}", f"{first.total_flops:.3e}"]
        cells += [f"{first.flops[part]:.3e}" if part in first.flops else "0" for part in parts]
        cells += [f"{first.seen.get(name, 0):,.0f}" for name in seen]
        drawn = ", ".join(f"{name} {value}" for name, value in first.sampling["text_to_image"].items())
        lines.append(f"| {arm.name} | {' | '.join([*cells, drawn])} |")
    if found.diverged:
        lines += ["", "Runs that have diverged; on the first seed, their learning rates have lost by it:", ""]
        lines += [f"- {line}" for line in found.diverged]
    if found.violations:
        lines += ["", f"NOT KEPT: {len(found.violations)} of the protocol's demands.", ""]
        lines += [f"- {line}" for line in found.violations]
    return "\n".join(lines) + "\n"


def _tasks(arms) -> list[str]:
    names = [name for name in TASKS if any(name in arm.tasks for arm in arms)]
    if not names:
        return []
    lines = [f"| pictures of | {' | '.join(TASKS[name] for name in names)} |", "|---|" + "---:|" * len(names)]
    for arm in arms:
        lines.append(f"| {arm.name} | {' | '.join(_cell(name, arm.tasks.get(name)) for name in names)} |")
    return [
        *lines,
        "",
        "Shares of the pictures whose captions ask for that; further objects do no harm but in counting.",
        "",
    ]


def _tokenizers(arms) -> list[str]:
    with_one = [arm for arm in arms if arm.rows and TOKENIZER.keys() & arm.rows[0].results.keys()]
    if not with_one:
        return []
    heads = [label for label, _ in TOKENIZER.values()]
    lines = [f"| image tokenizer of | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for arm in with_one:
        found = arm.rows[0].results
        cells = (f"{found[name]:{form}}" if name in found else "–" for name, (_, form) in TOKENIZER.items())
        lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(name, figure) -> str:
    if not figure:
        return "–"
    form = ".3f" if name in FIGURES and name not in SHARES else ".1%"
    if figure["low"] is None:
        return f"{figure['value']:{form}} (no interval)"
    return f"{figure['value']:{form}} ({figure['low']:{form}} to {figure['high']:{form}}, {figure['of']})"


def as_json(found: Comparison, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that the tables are made of, the grid and the sweeps included."""
    return {
        "arms": {
            arm.name: {"lr": arm.lr, "rates": arm.rates, "runs": [r.run for r in arm.rows], **arm.figures}
            | {"untuned": arm.untuned, "tasks": arm.tasks}
            for arm in found.arms
        },
        "differences": [vars(difference) for difference in found.differences],
        "violations": list(found.violations),
        "diverged": list(found.diverged),
        "rows": [vars(row) | {"total_flops": row.total_flops} for row in rows],
    }


def from_json(tree: dict[str, Any]) -> list[Row]:
    """The rows of what `as_json` has made. Raises KeyError, TypeError or ValueError if it is something else."""
    names = {f.name for f in fields(Row)}
    rows = [Row(**{name: value for name, value in row.items() if name in names}) for row in tree["rows"]]
    return [replace(row, uncounted=tuple(row.uncounted)) for row in rows]
