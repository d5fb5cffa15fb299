"""Handwritten digits that scikit-learn ships: 1,797 real images of 8 x 8 grey levels (UCI optical digits)."""

import numpy as np

from ddt_jax.data.base import Record
from ddt_jax.data.permutation import Permutation
from ddt_jax.errors import UserError

HELD_OUT = 360  # one fifth, the same images for every seed
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class DigitsSource:
    """The train or test part, enlarged to the model's size without smoothing.

    Raises:
      UserError: scikit-learn is not installed.
    """

    label_names = NAMES

    def __init__(self, split: str, image_size: int):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("data: digits come with scikit-learn; run: pip install 'ddt-jax[digits]'") from None
        self.name = f"digits:{split}"
        digits = load_digits()
        # The file is in the order in which people wrote; a fixed shuffle gives both parts all hands.
        order = Permutation(len(digits.images), 0, "digits")(np.arange(len(digits.images)))
        self._rows = np.sort(order[:HELD_OUT] if split == "test" else order[HELD_OUT:])
        self._images = np.round(digits.images[self._rows] * (255 / 16)).astype(np.uint8)
        self._labels = digits.target[self._rows]
        self._pick = np.arange(image_size) * 8 // image_size

    def __len__(self):
        return len(self._rows)

    def describe(self, index):
        return f"digits row {self._rows[index]}"

    def __getitem__(self, index) -> Record:
        grey = self._images[index][self._pick][:, self._pick]
        label = int(self._labels[index])
        image = np.repeat(grey[..., None], 3, axis=2)
        return Record(image=image, label=label, caption=f"a handwritten digit {NAMES[label]}")
