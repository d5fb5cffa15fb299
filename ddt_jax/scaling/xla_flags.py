"""Flags of the compiler by chip, as data, with where each group comes from. Nothing of it has been measured here.

Flags are read when JAX starts, so they belong into the environment of the process: launch scripts take them from
`ddt-jax flags --chip v5p`. A flag that a compiler does not know ends the process as it starts; that the compilers of
the tests know all of them is tested (`tests/tpu/test_flags.py`, `tests/scaling/test_xla_flags.py`). What helped others
need not help here: measure a run with and without.
"""

from dataclasses import dataclass

from ddt_jax.errors import UserError
from ddt_jax.scaling.chips import CHIPS

TPU = "LIBTPU_INIT_ARGS"
GPU = "XLA_FLAGS"


@dataclass(frozen=True)
class Group:
    """Attributes:
    flags: for the command line of the compiler.
    why: what they are for.
    source: who sets them, and for what.
    """

    flags: tuple[str, ...]
    why: str
    source: str


_MAXTEXT = "github.com/AI-Hypercomputer/maxtext: "

_GATHERS = Group(
    (
        "--xla_enable_async_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
        "--xla_tpu_overlap_compute_collective_tc=true",
    ),
    "gather parameters (FSDP) while the layer before computes",
    _MAXTEXT + "MaxText/configs/v5e/16b.sh, v5p/32b.sh; benchmarks/xla_flags_library.py, CF_FOR_ALL_GATHER, which the "
    "dense LLaMAs of benchmarks/maxtext_trillium_model_configs.py take (v6e)",
)
_SLICES = Group(
    (
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    ),
    "reduce gradients between slices (data parallel, over the data centre's network) while the next steps compute",
    _MAXTEXT + "MaxText/configs/v5e/16b.sh, v5p/32b.sh; benchmarks/xla_flags_library.py, DATA_PARALLEL_OVERLAP, which "
    "gpt_3_175b of benchmarks/maxtext_trillium_model_configs.py takes (v6e)",
)
_PERMUTES = Group(
    (
        "--xla_enable_async_collective_permute=true",
        "--xla_tpu_enable_ag_backward_pipelining=true",
        "--xla_tpu_megacore_fusion_allow_ags=false",
    ),
    "the same for what tensor parallelism sends, and for gathers of the backward pass",
    _MAXTEXT + "MaxText/configs/v5p/32b.sh (FSDP with tensor parallelism)",
)
_SCOPED_MEMORY = Group(
    ("--xla_tpu_scoped_vmem_limit_kib=98304",),
    "more of a core's fast memory for one fusion, of dense models (81920 for mixtures of experts)",
    _MAXTEXT + "benchmarks/xla_flags_library.py, DENSE_VMEM_LIMIT_FLAG; maxtext_trillium_model_configs.py (v6e)",
)
_HIDDEN = Group(
    ("--xla_gpu_enable_latency_hiding_scheduler=true",),
    "begin collectives early, so that they run beside computation",
    "docs.nvidia.com/jax-toolbox/environment-variables (set in NVIDIA's JAX images)",
)

FLAGS: dict[str, tuple[Group, ...]] = {
    "v5e": (_GATHERS, _SLICES),
    "v5p": (_GATHERS, _SLICES, _PERMUTES),
    "v6e": (_GATHERS, _SLICES, _SCOPED_MEMORY),
    "h100": (_HIDDEN,),
    "h200": (_HIDDEN,),
}


def of(chip: str) -> list[str]:
    """The flags of a chip. Raises UserError for a chip that has none."""
    if chip not in FLAGS:
        raise UserError(f"--chip {chip}: no flags are known for it; choose from {', '.join(FLAGS)}")
    return [flag for group in FLAGS[chip] for flag in group.flags]


def variable(chip: str) -> str:
    """The environment variable that the chip's compiler reads. Raises as `of`."""
    of(chip)
    return TPU if CHIPS[chip].is_tpu else GPU


def shell(chip: str) -> str:
    """A line for a shell to evaluate. What is set already stands behind, and has the last word. Raises as `of`."""
    flags, name = " ".join(of(chip)), variable(chip)
    return f'export {name}="{flags} ${{{name}:-}}"'


def listing(chip: str) -> str:
    """For people: each group with its reason and source, as comments, then the line of `shell`. Raises as `of`."""
    last = shell(chip)
    return "\n".join([*(f"# {' '.join(g.flags)}\n#   {g.why}\n#   {g.source}" for g in FLAGS[chip]), last])
