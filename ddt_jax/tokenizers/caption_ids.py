"""Captions as rows of ids, for models that read them beside images. No JAX here: data workers encode captions."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ddt_jax import settings
from ddt_jax.data.base import BadRecord
from ddt_jax.errors import UserError
from ddt_jax.tokenizers.text import TextTokenizer


class _Table:
    """What is shared: `data.loader.CaptionRows`, and tables of several captions at once."""

    def __call__(self, captions: Iterable[str]) -> np.ndarray:
        """[n, length]. Raises BadRecord as `row`."""
        rows = [self.row(caption) for caption in captions]
        return np.stack(rows) if rows else self.rows(0)


@dataclass(frozen=True)
class CaptionIds(_Table):
    """Ids of a text tokenizer: int32, `settings.NO_TOKEN` behind a caption's end; longer ones are cut.

    Case and spaces do not count.
    """

    text: TextTokenizer
    length: int

    def row(self, caption: str) -> np.ndarray:
        (ids,), found = self.rows(1), self.text.encode(" ".join(caption.lower().split()))[: self.length]
        ids[: len(found)] = found
        return ids

    def rows(self, n: int) -> np.ndarray:
        return np.full((n, self.length), settings.NO_TOKEN, np.int32)


@dataclass(frozen=True)
class MarkedIds(_Table):
    """Ids as CLIP's text encoder reads them: int32, between its marks, that of the end again in all places behind it;
    longer captions are cut.

    Attributes:
      text: CLIP's text tokenizer.
      length: places.
      vocab_size: ids that the encoder knows.
      name: what an error calls the tokenizer.

    Raises:
      UserError: the tokenizer is not CLIP's, or not that of this encoder.
    """

    text: TextTokenizer
    length: int
    vocab_size: int
    name: str

    def __post_init__(self):
        if not {"BOS", "EOS"} <= self.text.special.keys():
            raise UserError(f"{self.name} has no <|startoftext|> or no <|endoftext|>")
        if (found := self.text.vocab_size) > self.vocab_size:
            raise UserError(f"{self.name} has {found:,} ids, its model {self.vocab_size:,}; fetch both from one place")

    def marked(self, caption: str) -> np.ndarray:
        """[n] up to the mark of the end."""
        special = self.text.special
        return np.array([special["BOS"], *self.text.encode(caption)[: self.length - 2], special["EOS"]], np.int32)

    def row(self, caption: str) -> np.ndarray:
        (ids,), found = self.rows(1), self.marked(caption)
        ids[: len(found)] = found
        return ids

    def rows(self, n: int) -> np.ndarray:
        return np.full((n, self.length), self.text.special["EOS"], np.int32)


@dataclass(frozen=True)
class CaptionBytes(_Table):
    """UTF-8: uint8, zeros behind a caption's end; longer ones are refused, for they might be cut inside a character."""

    length: int

    def row(self, caption: str) -> np.ndarray:
        found = np.frombuffer(caption.encode(), np.uint8)
        if len(found) > self.length:
            raise BadRecord(f"a caption of {len(found)} bytes, more than model.caption_bytes={self.length}")
        (ids,) = self.rows(1)
        ids[: len(found)] = found
        return ids

    def rows(self, n: int) -> np.ndarray:
        return np.zeros((n, self.length), np.uint8)
