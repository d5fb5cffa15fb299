"""Whether two arms of a comparison differ: their runs have the same seeds, hence the same data in the same order, and
are asked the same prompts, so it is differences that have to be looked at, not whether two intervals overlap.

Seeds are few, and vary what is learned; prompts are many, and some are harder for all. So each difference has Student's
interval over seeds and, of a share, over prompts too (of the mean over seeds for each); the wider of the two is given.
"""

import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from ddt_jax.evaluation.metrics import mean_interval

# Figure → where `marks` of results.json has it prompt by prompt.
MARKS = {"t2i_all_correct": "t2i", "caption_all_correct": "caption"}


@dataclass(frozen=True)
class Difference:
    """Of the figure of `first` less that of `second`, over the seeds that both have.

    Attributes:
      low, high: of 95 %. of: "seeds" or "prompts", what the interval is over.
    """

    figure: str
    first: str
    second: str
    value: float
    low: float
    high: float
    of: str

    @property
    def is_one(self) -> bool:
        """Whether 0 lies outside the interval."""
        return not self.low <= 0 <= self.high


def differences(arms: Mapping[str, Mapping[int, Mapping[str, Any]]], figures: Collection[str]) -> Iterator[Difference]:
    """Between every two arms, where they have two seeds or more in common. arms: name → seed → results of a run."""
    for first, second in combinations(arms, 2):
        pairs = [(arms[first][seed], arms[second][seed]) for seed in sorted(arms[first].keys() & arms[second].keys())]
        for figure in figures:
            if found := _difference(figure, first, second, pairs):
                yield found


def _difference(figure, first, second, pairs) -> Difference | None:
    by_seed = [a[figure] - b[figure] for a, b in pairs if None not in (a.get(figure), b.get(figure))]
    if len(by_seed) < max(2, len(pairs)):
        return None
    (low, high), of = mean_interval(by_seed), "seeds"
    by_prompt = _by_prompt(figure, pairs)
    if len(by_prompt) > 1:
        other = mean_interval(by_prompt)
        if other[1] - other[0] > high - low:
            (low, high), of = other, "prompts"
    return Difference(figure, first, second, statistics.fmean(by_seed), low, high, of)


def _by_prompt(figure, pairs) -> list[float]:
    """The mean difference of each prompt; [] where marks are not there, or not of the same number of prompts."""
    name = MARKS.get(figure, "")
    marks = [[run.get("marks", {}).get(name, "") for run in pair] for pair in pairs]
    count = len(marks[0][0])
    if any(len(of) != count for pair in marks for of in pair):
        return []
    return [statistics.fmean(int(a[i]) - int(b[i]) for a, b in marks) for i in range(count)]


def table(found: Collection[Difference], figures: Mapping[str, str], shares: Collection[str]) -> list[str]:
    """Lines of Markdown: a row for every two arms. figures: figure → heading; those in `shares` are in points."""
    rows: dict[tuple[str, str], dict[str, Difference]] = {}
    for one in found:
        rows.setdefault((one.first, one.second), {})[one.figure] = one
    if not rows:
        return []
    lines = [f"| difference | {' | '.join(figures.values())} |", "|---|" + "---:|" * len(figures)]
    for (first, second), of in rows.items():
        cells = (_cell(of[name], name in shares) if name in of else "–" for name in figures)
        lines.append(f"| {first} less {second} | {' | '.join(cells)} |")
    apart = sum(one.is_one for one in found)
    lines += [
        "",
        "Over seeds that both have, shares in points, with intervals of 95 % over seeds or over prompts, whichever is",
        f"wider; bold where 0 lies outside: {apart} of {len(found)}, of which one in twenty would by chance.",
        "",
    ]
    return lines


def _cell(one: Difference, is_share: bool) -> str:
    scale, form = (100, "+.1f") if is_share else (1, "+.3f")
    value, low, high = (f"{scale * x:{form}}" for x in (one.value, one.low, one.high))
    text = f"{value} ({low} to {high}, {one.of})"
    return f"**{text}**" if one.is_one else text
