"""The text of a compiled program as computations and instructions: just enough to count what it does.

%name = TYPE opcode(%operand, ...), attribute=value, ...
"""

import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_BITS = {"pred": 8, "bf16": 16}


@dataclass(frozen=True)
class Array:
    """A dense array: element type, dimensions, and whether it lies in memory on the chip rather than in HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.size * _bits(self.dtype) // 8

    @property
    def hbm_bytes(self) -> int:
        return 0 if self.on_chip else self.bytes


def _bits(dtype: str) -> int:
    return _BITS.get(dtype) or int(re.match(r"[a-z]+(\d+)", dtype).group(1))


@dataclass(frozen=True)
class Instruction:
    """Attributes:
    arrays: what it makes; of a tuple all that are in it, whatever the nesting.
    operands: names of instructions of the same computation.
    rest: text behind the operands.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str  # text between the parentheses: the value of a constant, the number of a parameter
    rest: str
    is_root: bool = False

    def attribute(self, name: str) -> str:
        """The value of `name=value`, braces and brackets included; "" if there is none."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.rest)
        return _value(self.rest, found.end()) if found else ""

    def computations(self) -> tuple[str, ...]:
        """Names of computations it calls once."""
        names = ("calls", "to_apply", "branch_computations", "true_computation", "false_computation")
        found = ",".join(self.attribute(name) for name in names)
        return tuple(re.findall(r"[\w.\-]+", found))

    @functools.cached_property
    def backend_config(self) -> dict:
        text = self.attribute("backend_config")
        try:
            return json.loads(text) if text.startswith("{") else {}
        except ValueError:
            return {}


def _value(text: str, start: int) -> str:
    """From `start` to the comma that ends a value, or the end."""
    depth, quoted, i = 0, False, start
    while i < len(text):
        c = text[i]
        if c == '"' and text[i - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            if c in "{[(":
                depth += 1
            elif c in "}])":
                depth -= 1
            elif c == "," and depth == 0:
                break
        i += 1
    return text[start:i].strip()


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    def arrays(self, name: str) -> tuple[Array, ...]:
        """What an operand is; nothing if it is not of this computation."""
        found = self.instructions.get(name)
        return found.arrays if found else ()

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.is_root)

    def users(self, name: str) -> Iterator[Instruction]:
        return (i for i in self.instructions.values() if name in i.operands)


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Raises ValueError for text that is no program."""
    computations, entry, name, body = {}, "", "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, body = header.group(2), {}
            computations[name] = Computation(name, body)
            entry = name if header.group(1) else entry
        elif name and (start := _INSTRUCTION.match(line)):
            found = _instruction(start, line)
            body[found.name] = found
    if not entry:
        raise ValueError("the text has no ENTRY: it is no compiled program")
    return Module(computations, entry)


def _instruction(start, line) -> Instruction:
    text = _COMMENT.sub("", line[start.end() :])
    end = _closing(text, 0) + 1 if text.startswith("(") else re.search(r"(?<=[\]}]) ", text).start()
    opcode = _OPCODE.match(text, end)
    closing = _closing(text, opcode.end() - 1)
    inside = text[opcode.end() : closing]
    return Instruction(
        start.group(2),
        opcode.group(1),
        tuple(_arrays(text[:end])),
        tuple(re.findall(r"%([\w.\-]+)", inside)),
        inside,
        text[closing + 1 :],
        bool(start.group(1)),
    )


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(text):
        yield Array(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), "S(1)" in layout)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in re.finditer(r"[()]", text[start:]):
        depth += 1 if at.group() == "(" else -1
        if depth == 0:
            return start + at.start()
    raise ValueError(f"an instruction that never ends: {text[:80]}")
