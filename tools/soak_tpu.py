"""The released tokenizer's train step, compiled at full size for a TPU pod slice that is not there."""

import json
import sys
from pathlib import Path

import soak_runs as programs
from soak_gates import at_most, gate, note, quiet

CHIPS = "v5p:2x2x2"  # 8 chips over which parameters and moments are divided (fsdp)
# On latents, as from `ddt-jax latents`: the frozen autoencoder is in no step. Six images for each chip, as 384 on 64.
SETTINGS = (
    "--config.data.source=latents:DIR",
    "--config.model.codec.random_weights=True",
    "--config.train.batch_size=48",
)


def selftok_tpu(options, folder: Path) -> dict:
    """Compiles configs/ddt_selftok_256.py's step; run it with the Python of .venv-tpu."""
    config = "configs/ddt_selftok_256.py"
    options.overrides = [*SETTINGS, *options.overrides]
    tool = [sys.executable, "tools/compile_tpu.py", "--config", config, "--topology", CHIPS, *options.overrides]
    outcome = programs.must(programs.run(tool), "compile_tpu.py")
    found = json.loads(outcome.stdout)
    note(f"compiled for {found['chips']} in {found['seconds']:.0f} s")
    talk = ", ".join(found["collectives"])
    gates = [
        at_most("bytes of a chip", found["bytes_of_a_chip"]["total"], found["hbm_bytes"]),
        gate("collectives between chips", talk, "some", bool(talk)),
        *quiet([outcome]),
    ]
    return {"config": config, "seeds": [], "results": found, "gates": gates}
