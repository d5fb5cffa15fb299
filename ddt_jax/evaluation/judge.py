"""What a judge is: something besides PSNR and SSIM that looks at every batch of an evaluation.

Legend: B rows of a batch on this process, H height, W width, C channels, K tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

_COLUMN = "figure/"


class Seen(NamedTuple):
    """A batch as it was judged; rows that are not valid are padding."""

    image_BHWC: np.ndarray  # uint8
    decoded_BHWC: np.ndarray  # uint8, from all tokens
    on_device: tuple[Any, Any]  # the same two over the mesh
    local: Callable[[Any], np.ndarray]  # an array over the mesh → this process's rows
    codes_BK: np.ndarray  # of an autoencoder: K = 0
    index_B: np.ndarray  # positions in the source
    valid_B: np.ndarray


class Judge(Protocol):
    """One of them."""

    def see(self, seen: Seen) -> dict[str, np.ndarray]:
        """Figures of each image, float [B]; their means become results."""
        ...

    def results(self) -> dict[str, Any]:
        """Figures of all images together, asked for once, on every process."""
        ...


def columns(judges: Sequence[Judge], seen: Seen) -> dict[str, np.ndarray]:
    """What all of them say about a batch, as columns of a table over images."""
    return {_COLUMN + name: column for judge in judges for name, column in judge.see(seen).items()}


def results(judges: Sequence[Judge], table: dict[str, np.ndarray]) -> dict[str, Any]:
    """Means of the columns in a table over all valid images, with their standard errors, and what else they found."""
    found: dict[str, Any] = {}
    for column in [name for name in table if name.startswith(_COLUMN)]:
        name, values = column.removeprefix(_COLUMN), table[column]
        found |= {name: float(values.mean()), f"{name}_standard_error": standard_error(values)}
    for judge in judges:
        found |= judge.results()
    return found


def standard_error(column) -> float:
    """Of the mean of a column."""
    return float(np.std(column) / np.sqrt(len(column)))
