"""How fast a run is: tokens or images per second on a chip, and MFU, from examples per second. No JAX here."""

from dataclasses import dataclass

RATE = "{}s_per_second_per_chip"  # of a unit


@dataclass(frozen=True)
class Speed:
    """Attributes:
    unit: "token" or "image"; units: of them in an example (positions of a row, padding among them, as in a plan).
    chips: of the run, over which the work is shared.
    flops: operations of the model for an example, each done once (`scaling/model_flops.py`); 0: not known.
    peak_flops: FLOP/s of a chip; 0: not known, and there is no MFU.
    """

    unit: str
    units: int
    chips: int
    flops: float = 0.0
    peak_flops: float = 0.0

    def figures(self, examples_per_second: float) -> dict[str, float]:
        """`UNITs_per_second_per_chip`, and `mfu` where it is known: the share of the chips' peak that the model's own
        operations take.
        """
        found = {RATE.format(self.unit): examples_per_second * self.units / self.chips}
        if self.flops and self.peak_flops:
            found["mfu"] = examples_per_second * self.flops / (self.chips * self.peak_flops)
        return found
