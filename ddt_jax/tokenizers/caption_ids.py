"""Captions as rows of ids. No JAX here: data workers encode captions."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ddt_jax import settings
from ddt_jax.tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class CaptionIds:
    """Captions → int32 [n, length], `settings.NO_TOKEN` behind a caption's end; longer ones are cut. Picklable.

    Case and spaces do not count.
    """

    text: TextTokenizer
    length: int

    def __call__(self, captions: Iterable[str]) -> np.ndarray:
        rows = [self.text.encode(" ".join(caption.lower().split()))[: self.length] for caption in captions]
        ids = np.full((len(rows), self.length), settings.NO_TOKEN, np.int32)
        for row, found in zip(ids, rows, strict=True):
            row[: len(found)] = found
        return ids
