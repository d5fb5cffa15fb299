"""What the benchmarks of tools/bench.py share: seconds of parts in turns, and settings from the command line."""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed


def least_seconds(parts: dict, repeats: int) -> dict[str, float]:
    """Name → seconds of its fastest call. parts: name → function of nothing that returns arrays."""
    import jax

    found = dict.fromkeys(parts, float("inf"))
    for round_ in range(repeats + 1):  # the first compiles
        for name, part in parts.items():
            begun = time.perf_counter()
            jax.block_until_ready(part())
            if round_:
                found[name] = min(found[name], time.perf_counter() - begun)
    return found


def load(options):
    """The settings of --config with those of the command line laid over them."""
    from ddt_jax import config

    pairs = [text.removeprefix("--config.").partition("=") for text in options.overrides]
    return config.load(str(options.config), tuple((key, value) for key, _, value in pairs))
