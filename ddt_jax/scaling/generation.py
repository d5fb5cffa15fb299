"""Answers of a model, compiled for a pod that is not there: what they need, and how long they might take.

An answer is made by one program, or by several that run one after the other. What takes the time is a loop in one of
them: over tokens, over steps of a solver, over blocks of an image. A turn of it is looked at by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddt_jax.scaling import program, roofline, wholes
from ddt_jax.scaling.program import Loop, Work
from ddt_jax.scaling.topology import Topology

KINDS = ("parameters", "cache", "batch", "padding", "temporary", "outputs", "code")


@dataclass(frozen=True)
class Stage:
    """A program.

    Attributes:
      name: what it does, for people.
      compiled: of `plan.compile_program`.
      kinds: bytes of a chip that its arguments take, by kind: "parameters", "cache", "batch".
      turn: what one turn of its longest loop makes, "token", "step" or "block"; "": it has none worth a look.
      cache: the last two dimensions of keys and values where the loop carries a cache that the program makes itself.
      makes: the kind of memory that its outputs are.
    """

    name: str
    compiled: Any
    kinds: dict[str, int]
    turn: str = ""
    cache: tuple[int, int] | None = None
    makes: str = "outputs"


@dataclass(frozen=True)
class Answers:
    """What is planned: some answers at once.

    Attributes:
      stages: in the order in which they run.
      mesh: over abstract or fake devices.
      params: what the programs compute with, ShapeDtypeStructs with shardings.
      loading: bytes of a chip before they run, when what was restored becomes what they compute with.
      prompt: positions that prompts are filled up to.
      answer: "image" or "text"; answers: how many of them.
      unit: "token" or "image"; units: of them in all answers, at most.
    """

    stages: Sequence[Stage]
    mesh: Any
    params: Any
    loading: int
    prompt: int
    answer: str
    answers: int
    unit: str
    units: int


def measured(planned: Answers, topology: Topology) -> dict:
    """What was found. Bytes and operations are of all answers; `docs/plan.md` explains each key."""
    chip, mesh, unit = topology.chip, planned.mesh, planned.unit
    total, parts = Work(), []
    for stage in planned.stages:
        text = stage.compiled.as_text()
        work = program.read(text, mesh.size)
        total.add(work)
        parts += _parts(stage, work, program.loops(text, mesh.size), mesh, topology)
    kinds = max((_memory(stage, mesh) for stage in planned.stages), key=lambda kinds: sum(kinds.values()))
    needed, hardware, traffic = sum(kinds.values()), total.flops * mesh.size, total.hbm_bytes * mesh.size
    seconds = sum(part["times"] * part["seconds"] for part in parts)
    longest = max(parts, key=lambda part: part["times"] * part["seconds"])
    return {
        "fits": max(needed, planned.loading) <= chip.hbm_bytes,
        "hbm_bytes_per_chip": max(needed, planned.loading),
        "memory": kinds,
        "loading_bytes_per_chip": planned.loading,
        "hardware_flops": hardware,
        f"hardware_flops_per_{unit}": hardware / planned.units,
        "hbm_traffic_bytes_per_chip": total.hbm_bytes,
        f"hbm_traffic_bytes_per_{unit}": traffic / planned.units,
        "parts": parts,
        "collectives": roofline.collectives(total, mesh, topology),
        "whole_parameters": wholes.find(total, mesh, planned.params),
        "estimate": {
            "seconds": seconds,
            **{f"{part['part']}_seconds": part["seconds"] for part in parts if part["times"] > 1},
            f"seconds_per_{planned.answer}": seconds / planned.answers,
            "bound": longest["bound"],
            f"{unit}s_per_second_per_chip": planned.units / seconds / mesh.size,
        },
        "uncounted": sorted(total.unknown_loops | total.unknown_kernels),
    }


def _parts(stage: Stage, work: Work, loops, mesh, topology: Topology) -> list[dict]:
    """A stage as what it does once, and what it does again and again: rows of "part", "times", and of one of them on a
    chip "flops", "hbm_traffic_bytes", the three terms of the estimate, "seconds", the longest of them, and "bound".
    """
    found = [(stage.name, 1, work)]
    if stage.turn and (loop := _longest(loops)):
        times, once = _times(loop), Work()
        once.add(work)
        once.add(loop.turn, -times)
        once.collectives = +once.collectives  # without those that are all in the loop
        found = [(stage.name, 1, once), (stage.turn, times, loop.turn)]
    rows = []
    for name, times, part in found:
        terms = roofline.estimate(part, mesh, topology)
        terms["seconds"] = terms.pop("step_seconds")
        rows.append({"part": name, "times": times, "flops": part.flops, "hbm_traffic_bytes": part.hbm_bytes} | terms)
    return rows


def _longest(loops: Sequence[Loop]) -> Loop | None:
    return max(loops, key=lambda loop: _times(loop) * loop.turn.hbm_bytes, default=None)


def _times(loop: Loop) -> int:
    return 1 if loop.turns is None else loop.turns


def _memory(stage: Stage, mesh) -> dict[str, int]:
    """Bytes of a chip while a stage runs."""
    m = stage.compiled.memory_analysis()
    inside = 0
    if stage.cache and (loop := _longest(program.loops(stage.compiled.as_text(), mesh.size))):
        inside = sum(a.bytes for a in loop.carried if a.dims[-2:] == stage.cache)
    kinds = dict.fromkeys(KINDS, 0) | stage.kinds
    kinds["padding"] = max(m.argument_size_in_bytes - sum(stage.kinds.values()), 0)
    kinds["cache"] += inside
    kinds["temporary"] = m.temp_size_in_bytes - inside
    kinds[stage.makes] += max(m.output_size_in_bytes - m.alias_size_in_bytes, 0)
    kinds["code"] = m.generated_code_size_in_bytes
    return kinds
