"""Compiles the train step of a config for TPU chips that are not there, with the TPU compiler, and prints JSON.

    .venv-tpu/bin/python tools/compile_tpu.py --config configs/quickstart.py --topology v5e:2x2

It needs libtpu, for which `make test-tpu` makes an environment. What it shows: that the whole step has a program for
these chips, with all kernels and collectives, and how much memory of a chip the compiler gives it. `ddt-jax plan` says
more, and of the program of a run; this tool is for checks that need only know that there is one. At the least effort
(-1) the program and its memory are not quite those of a run, whose effort is 0; compiling takes about half of the time.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed

from ddt_jax.errors import UserError  # noqa: E402
from ddt_jax.scaling import program, topology  # noqa: E402


def compile_step(config_file: str, chips, overrides=(), effort: float = -1.0):
    """The compiled train step of a config.

    Args:
      overrides: pairs of setting and value.
      effort: of the compiler to make the program fast, -1 to 1.
    """
    import jax

    from ddt_jax import config, experiment

    built = experiment.build(config.load(config_file, overrides), chips)
    with jax.set_mesh(built.mesh):
        lowered = built.step.lower(built.abstract, experiment.abstract_batch(built))
        usual = jax.config.jax_exec_time_optimization_effort
        jax.config.update("jax_exec_time_optimization_effort", effort)
        try:
            return lowered.compile()
        finally:
            jax.config.update("jax_exec_time_optimization_effort", usual)


def memory_of(compiled) -> dict[str, int]:
    """Bytes of one chip, and "total": of all that is there at once."""
    m = compiled.memory_analysis()
    found = {
        "arguments": m.argument_size_in_bytes,
        "temporary": m.temp_size_in_bytes,
        "new_outputs": m.output_size_in_bytes - m.alias_size_in_bytes,
        "code": m.generated_code_size_in_bytes,
    }
    return {**found, "total": sum(found.values())}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", default="v5e:2x2", help="(default: v5e:2x2)")
    parser.add_argument(
        "--effort", type=float, default=-1.0, help="of the compiler, -1 to 1; a run has 0 (default: -1)"
    )
    options, rest = parser.parse_known_args(argv)
    wrong = [text for text in rest if not text.startswith("--config.") or "=" not in text]
    if wrong:
        parser.error(f"unknown: {' '.join(wrong)}")
    pairs = [text.removeprefix("--config.").partition("=") for text in rest]
    try:
        pod = topology.parse(options.topology)
        chips = topology.devices(pod)
    except UserError as error:
        parser.error(str(error))
    begun, cpu = time.perf_counter(), time.process_time()
    compiled = compile_step(options.config, chips, tuple((key, value) for key, _, value in pairs), options.effort)
    text = compiled.as_text()
    found = {
        "config": options.config,
        "settings": [setting.removeprefix("--config.") for setting in rest],
        "chips": f"{len(chips)} x {chips[0].device_kind}",
        "effort": options.effort,
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "bytes_of_a_chip": memory_of(compiled),
        "hbm_bytes": pod.chip.hbm_bytes,
        "collectives": [name for name in program.COLLECTIVES if name in text],
    }
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
