"""Flags of XLA for tests: fake CPU devices, and code that is compiled fast rather than well. Never imports JAX."""

from importlib.metadata import version

FAST = {"--xla_backend_optimization_level": "0"}
# Fusions are emitted by LLVM alone: where it does not optimize, the newer way through MLIR takes two thirds of the time
# of compiling. Later versions have only that one, and end where they are given a flag that they do not know.
if tuple(int(number) for number in version("jaxlib").split(".")[:2]) < (0, 11):
    FAST["--xla_cpu_use_fusion_emitters"] = "false"


def flags(devices: int, given: str = "") -> str:
    """A value of XLA_FLAGS for so many devices; what is `given` stands."""
    wanted = {"--xla_force_host_platform_device_count": devices, **FAST}
    return " ".join([*given.split(), *(f"{flag}={value}" for flag, value in wanted.items() if flag not in given)])
