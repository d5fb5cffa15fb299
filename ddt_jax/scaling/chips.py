"""What a chip can do, by its maker: data for estimates, never measurements of ours.

Units: FLOP/s of dense bf16 products, bytes, bytes per second. "One way" is what a chip can send while it receives as
much. `docs/plan.md` says how the figures enter an estimate.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Attributes:
    peak_flops: dense bf16, without sparsity.
    hbm_bytes, hbm_bandwidth: of its own memory.
    link_bandwidth: one way, of one link of a TPU's torus; of all NVLinks of a GPU together.
    torus: dimensions of the network of a TPU, with two links for each; 0: all GPUs of a host reach all at once.
    network_bandwidth: one way, a chip's share of what leaves its slice or host.
    host_bandwidth: one way, between a chip and the memory of its host.
    source: where the figures are from.
    """

    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    torus: int
    network_bandwidth: float
    host_bandwidth: float
    source: str

    @property
    def is_tpu(self) -> bool:
        return self.torus > 0


_TPU_SOURCE = (
    "cloud.google.com/tpu/docs/{name} (peak, HBM); jax-ml.github.io/scaling-book, chapter 2 (links, network, PCIe)"
)
_GPU_SOURCE = (
    "nvidia.com/{name} (SXM: dense bf16, HBM, NVLink 4, PCIe 5); network: one 400 Gbit/s port for each GPU (DGX)"
)

CHIPS = {
    "v5e": Chip(197e12, 16e9, 0.82e12, 45e9, 2, 3.125e9, 15e9, _TPU_SOURCE.format(name="v5e")),
    "v5p": Chip(459e12, 95e9, 2.77e12, 90e9, 3, 6.25e9, 15e9, _TPU_SOURCE.format(name="v5p")),
    "v6e": Chip(918e12, 32e9, 1.64e12, 90e9, 2, 12.5e9, 15e9, _TPU_SOURCE.format(name="v6e")),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9, 0, 50e9, 64e9, _GPU_SOURCE.format(name="h100")),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9, 0, 50e9, 64e9, _GPU_SOURCE.format(name="h200")),
}

# `jax.Device.device_kind`. TPUs: what the TPU compiler's abstract devices say (tests/tpu/test_flags.py), and the short
# names of jax.experimental.pallas.tpu; GPUs: the cards' own names. Other cards of these families have other figures.
DEVICE_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def of_device(kind: str) -> Chip | None:
    """The chip of a device by its `device_kind`; None for one whose figures are not here, as a CPU."""
    return CHIPS[DEVICE_KINDS[kind]] if kind in DEVICE_KINDS else None
