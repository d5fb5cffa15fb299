"""How names of tensors are told to a user: all of them, and yet in one line."""

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def folded(lines: Iterable[str]) -> list[str]:
    """Lines that differ only in the first number of a dotted name become one, in the order of their first.

    `a.0.b is missing`, `a.1.b is missing`, `a.3.b is missing` → `a.{0..1,3}.b is missing`.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        found = _NUMBER.search(line)
        if found is None:
            groups.setdefault((line, ""), [])
        else:
            groups.setdefault((line[: found.start()], line[found.end() :]), []).append(int(found.group()))
    return [before + _ranges(sorted(numbers)) + after for (before, after), numbers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return f"{{{text}}}" if len(numbers) > 1 else text


def by(shape: Iterable[int]) -> str:
    """A shape in words."""
    return " x ".join(map(str, shape)) or "a single number"
