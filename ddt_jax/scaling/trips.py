"""How often a loop of a compiled program turns, where its text says it: by its condition, which is asked turn by turn.

A compiler may count in place of the program's counter another number that moves along with it, or add up constants in
between. So the condition is computed, for what the loop begins with and what its body adds.
"""

import operator
import re
from collections.abc import Mapping
from typing import Any

from ddt_jax.scaling.hlo import Computation, Instruction, Module

_MOST = 1 << 31
_OPERATIONS = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul}
_COMPARISONS = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_READ = {*_OPERATIONS, "compare", "copy", "bitcast", "convert", "not", "and", "or"}


def of(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Turns of a `while`, or those after which it ends at the latest: what the text does not say about whether it goes
    on, as whether all rows are done, lets it go on. None: numbers do not end it, or are not in the text.

    Args:
      computation: that the loop stands in.
    """
    known = loop.backend_config.get("known_trip_count", {}).get("n")
    if known is not None:
        return int(known)
    condition, body = (module.computations[loop.attribute(name).lstrip("%")] for name in ("condition", "body"))
    counters = _counters(module, computation, loop, condition, body)

    def ends(turns: int) -> bool:
        carried = {i: None if first is None else first + turns * step for i, (first, step) in counters.items()}
        return _value(module, condition, condition.root.name, {0: carried}) is False

    least, most = 0, 1
    while not ends(most - 1):
        least, most = most, 2 * most
        if most > _MOST:
            return None
    while most - least > 1:  # it goes on after least - 1 turns and ends after most - 1
        half = (least + most) // 2
        least, most = (least, half) if ends(half - 1) else (half, most)
    return most - 1


def _counters(module, computation, loop, condition, body) -> dict[int, tuple[int | None, int]]:
    """(first, what a turn adds) of each number that a condition looks at, by its place in what the loop carries."""
    places = {
        int(i.attribute("index"))
        for i in condition.instructions.values()
        if i.opcode == "get-tuple-element" and i.arrays[0].dims == () and i.arrays[0].dtype[0] in "su"
    }
    found = {}
    for at in places:
        step, first = _step(module, body, at), _element(module, computation, loop.operands[0], at, {})
        if step is None and len(places) == 1:
            step = 1  # where a text does not say it, a counter goes in steps of 1, and from 0
        if first is None and step == 1:
            first = 0
        found[at] = (None, 0) if step is None else (first, step)
    return found


def _step(module, body, at) -> int | None:
    """What a turn adds to a number; None where the text does not say it."""
    after = [_element(module, body, body.root.name, at, {0: {at: n}}) for n in (0, 1)]
    return after[0] if None not in after and after[1] - after[0] == 1 else None


def _element(module: Module, computation: Computation, name: str, at: int, given: Mapping[int, Any]) -> Any:
    """`_value` of one place of a tuple."""
    i = computation.instructions.get(name)
    if i is None:
        return None
    if i.opcode == "parameter":
        carried = given.get(int(i.inside))
        return carried.get(at) if isinstance(carried, dict) else None
    if i.opcode == "tuple":
        return _value(module, computation, i.operands[at], given)
    if i.opcode in ("copy", "opt-barrier"):
        return _element(module, computation, i.operands[0], at, given)
    if i.opcode in ("fusion", "call"):
        return _called(module, computation, i, given, at)
    return None


def _called(module, computation, i, given, at: int | None = None):
    """What a computation makes that an instruction calls, or one place of it."""
    inner = module.computations[i.computations()[0]]
    values = {n: _given(module, computation, name, given) for n, name in enumerate(i.operands)}
    if at is None:
        return _value(module, inner, inner.root.name, values)
    return _element(module, inner, inner.root.name, at, values)


def _given(module, computation, name, given):
    """What a computation is called with; a tuple is handed on as it came."""
    i = computation.instructions.get(name)
    if i is not None and i.opcode == "parameter":
        return given.get(int(i.inside))
    return _value(module, computation, name, given)


def _value(module: Module, computation: Computation, name: str, given: Mapping[int, Any]) -> Any:
    """What a scalar instruction makes, a number or a bool; None where the text does not say it.

    Args:
      given: value of each parameter by its number; of a tuple a dict by place.
    """
    i = computation.instructions.get(name)
    if i is None:
        return None
    if i.opcode == "get-tuple-element":
        return _element(module, computation, i.operands[0], int(i.attribute("index")), given)
    if i.opcode == "parameter":
        value = given.get(int(i.inside))
        return None if isinstance(value, dict) else value
    if i.opcode == "constant":
        if i.inside in ("true", "false"):
            return i.inside == "true"
        return int(i.inside) if re.fullmatch(r"-?\d+", i.inside) else None
    if any(a.dims for a in i.arrays):
        return None
    if i.opcode in ("fusion", "call"):
        return _called(module, computation, i, given)
    if i.opcode not in _READ:
        return None
    values = [_value(module, computation, operand, given) for operand in i.operands]
    if i.opcode in ("copy", "bitcast", "convert"):
        return values[0]
    if i.opcode == "not":
        return None if values[0] is None else not values[0]
    if i.opcode == "and":
        return False if False in values else None if None in values else True
    if i.opcode == "or":
        return True if True in values else None if None in values else False
    if None in values:
        return None
    if i.opcode == "compare":
        return _COMPARISONS[i.attribute("direction")](*values)
    return _wrapped(_OPERATIONS[i.opcode](*values), i.arrays[0].dtype)


def _wrapped(value: int, dtype: str) -> int:
    """An integer as its type holds it."""
    bits = int(dtype[1:])
    value %= 1 << bits
    return value - (1 << bits) if dtype[0] == "s" and value >> (bits - 1) else value
