"""Compiles the train step of a config for TPU chips that are not there, with the TPU compiler, and prints JSON.

    .venv-tpu/bin/python tools/compile_tpu.py --config configs/quickstart.py --topology v5e:2x2

It needs libtpu, for which `make test-tpu` makes an environment. What it shows: that the whole step has a program for
these chips, with all kernels and collectives, and how much memory of a chip the compiler gives it. What it does not:
how fast the step is. At the least effort (-1) the program and its memory are not quite those of a run, whose effort
is 0; compiling takes about half of the time.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed

# libtpu reads these when it is loaded; without them it looks for a TPU and complains that there is none.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
HBM_BYTES = {"TPU v5 lite": 16e9, "TPU v5": 95e9, "TPU v6 lite": 32e9}  # of a chip, by the vendor
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def abstract_chips(topology: str):
    """Devices of a topology such as "v5p:2x2x2". ENVIRONMENT has to be set."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


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
    os.environ.update(ENVIRONMENT)
    if importlib.util.find_spec("libtpu") is None:
        parser.error("libtpu is not installed; `make test-tpu` makes an environment with it, .venv-tpu")
    chips = abstract_chips(options.topology)
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
        "hbm_bytes": HBM_BYTES.get(chips[0].device_kind),
        "collectives": [name for name in COLLECTIVES if name in text],
    }
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
