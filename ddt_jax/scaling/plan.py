"""A train step, compiled for a pod that is not there: what it needs, and how long it might take.

Nothing here decides how to train. It is given the very step that training runs, over an abstract state.
"""

import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from ddt_jax.scaling import memory, program, roofline, wholes
from ddt_jax.scaling.topology import Topology


@dataclass(frozen=True)
class Step:
    """What is planned.

    Attributes:
      step: jitted (state, batch) → (state, metrics).
      abstract, batch: its arguments as ShapeDtypeStructs with shardings.
      mesh: over abstract or fake devices.
      unit: "token" or "image"; units: of them in a step.
      model_flops: operations of a step that computes nothing twice (docs/plan.md).
      repeated_flops: those that it computes again for its gradients, as it is written.
      attention_share: as `program.read`.
      effort: of the compiler to make the program fast, -1 to 1; a run's is 0.
    """

    step: Any
    abstract: Any
    batch: dict
    mesh: Any
    unit: str
    units: int
    model_flops: float
    repeated_flops: float
    attention_share: float = 1.0
    effort: float = 0.0


def compile_program(program, arguments: tuple, mesh, effort: float = 0.0):
    """(what a jitted program compiles to, {"compile_seconds", "compile_cpu_seconds"}, tracing included).

    Raises:
      Refused: the compiler has found that a chip has not the memory.
    """
    begun, cpu = time.perf_counter(), time.process_time()
    usual = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", effort)
    try:
        with jax.set_mesh(mesh):
            compiled = program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        raise Refused(needed) from error
    finally:
        jax.config.update("jax_exec_time_optimization_effort", usual)
    spent = {"compile_seconds": time.perf_counter() - begun, "compile_cpu_seconds": time.process_time() - cpu}
    return compiled, {name: round(value, 1) for name, value in spent.items()}


class Refused(Exception):
    """needed: bytes of a chip that a TPU's compiler found to be too many."""

    def __init__(self, needed: float):
        super().__init__(f"{needed:,.0f} bytes")
        self.needed = needed


def report(planned: Step, topology: Topology) -> dict:
    """Compiles, and tells what was found. Bytes and operations are per step; `docs/plan.md` explains each key.

    Of a step that the compiler refuses for its memory only what comes before "memory" is known, and of that the state.
    """
    found = where(planned.mesh, topology, planned.abstract.params, planned.effort)
    found |= {"unit": planned.unit, f"{planned.unit}s_per_step": planned.units}
    arguments = planned.abstract, planned.batch
    try:
        compiled, spent = compile_program(planned.step, arguments, planned.mesh, planned.effort)
    except Refused as error:
        kinds, waiting = memory.of_arguments(*arguments), memory.of_hosts(planned.abstract)
        refused = {"fits": False, "hbm_bytes_per_chip": error.needed, "memory": kinds}
        return found | refused | {"host_bytes_per_chip": waiting}
    return found | spent | _measured(compiled, planned, topology)


def where(mesh, topology: Topology, params, effort: float) -> dict:
    """What a report says of where its program runs, and of how it was made."""
    chip = topology.chip
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "compiler": "tpu" if chip.is_tpu else "cpu",
        "effort": effort,
        "jax": jax.__version__,
        "source_of_chip_figures": chip.source,
        "hbm_bytes_of_chip": chip.hbm_bytes,
    }


def _needed(message: str) -> float | None:
    """Bytes that a TPU's compiler found to be too many; None: it complains of something else."""
    # Of what it has laid out, and of what it finds before that it cannot.
    size = r"([\d.]+)([KMGT]?)"
    for said in (f"Used {size} of [\\d.]+[KMGT]? hbm", f"total memory required .*?\\({size}\\) exceeds available HBM"):
        if found := re.search(said, message):
            return float(found.group(1)) * 1024 ** " KMGT".index(found.group(2) or " ")
    return None


def _measured(compiled, planned: Step, topology: Topology) -> dict:
    chip, chips = topology.chip, planned.mesh.size
    work = program.read(compiled.as_text(), chips, planned.attention_share)
    kinds = memory.by_kind(compiled, planned.abstract, planned.batch)
    needed = sum(kinds.values())
    waiting = memory.of_hosts(planned.abstract)
    estimate = roofline.estimate(work, planned.mesh, topology, waiting)
    seconds, unit, hardware = estimate["step_seconds"], planned.unit, work.flops * chips
    estimate |= {
        f"{unit}s_per_second_per_chip": planned.units / seconds / chips,
        "mfu": planned.model_flops / (seconds * chips * chip.peak_flops),
    }
    return {
        "fits": needed <= chip.hbm_bytes,
        "hbm_bytes_per_chip": needed,
        "memory": kinds,
        "host_bytes_per_chip": waiting,
        f"flops_per_{unit}": planned.model_flops / planned.units,
        f"hardware_flops_per_{unit}": hardware / planned.units,
        "model_flops": planned.model_flops,
        "hardware_flops": hardware,
        "hardware_over_model_flops": hardware / planned.model_flops,
        "hardware_over_model_flops_without_remat": (hardware - planned.repeated_flops) / planned.model_flops,
        "hbm_traffic_bytes_per_chip": work.hbm_bytes,
        "collectives": roofline.collectives(work, planned.mesh, topology),
        "whole_parameters": wholes.find(work, planned.mesh, planned.abstract.params),
        "estimate": estimate,
        "uncounted": sorted(work.unknown_loops | work.unknown_kernels),
    }
