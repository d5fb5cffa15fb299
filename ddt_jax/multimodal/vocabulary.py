"""One range of ids for text, special tokens and image codes, each found by its name.

    [0, text_size)      ids of the text tokenizer, where it puts them
    then                special tokens that the text tokenizer has no id for, and spare ids
    then                image codes, in one run to the end

A LLaMA vocabulary keeps its place, its own begin and end of text among it: a checkpoint of text becomes one of both by
adding rows at the end. No JAX here: data workers lay out sequences.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ddt_jax.data.base import nearest
from ddt_jax.errors import UserError

# What the layout of sequences needs (multimodal/documents.py). PAD also stands where an image is not made of codes.
SPECIAL = ("BOS", "EOS", "PAD", "BOV", "EOV", "USER", "ASSISTANT")
FORMAT = 1


@dataclass(frozen=True)
class Vocabulary:
    """A layout of ids. Make one with `extend`, or read one with `from_json`.

    Attributes:
      text_size: ids of the text tokenizer.
      special: (name, id) of each special token, in the order of ids of their own.
      codes_start: id of code 0.
      num_codes: image codes, the last ids.
      text_fingerprint: of the text tokenizer (`TextTokenizer.fingerprint`), "" if unknown.
    """

    text_size: int
    special: tuple[tuple[str, int], ...]
    codes_start: int
    num_codes: int
    text_fingerprint: str = ""

    def __post_init__(self):
        names, ids = [name for name, _ in self.special], [i for _, i in self.special]
        missing = [name for name in SPECIAL if name not in names]
        if missing:
            raise UserError(f"vocabulary: it has no special token {', '.join(missing)}; make it again")
        if len(set(names)) < len(names) or len(set(ids)) < len(ids):
            raise UserError(f"vocabulary: special tokens {dict(self.special)} share a name or an id; give each its own")
        if min(ids) < 0 or max(ids) >= self.codes_start or not 0 <= self.text_size <= self.codes_start:
            raise UserError(
                f"vocabulary: text_size={self.text_size}, special tokens up to {max(ids)} and codes from "
                f"{self.codes_start} overlap; make it again"
            )
        if self.num_codes < 0 or self.size >= 1 << 31:
            raise UserError(f"vocabulary: {self.num_codes:,} image codes do not fit; ids must lie below 2^31")

    @classmethod
    def extend(
        cls,
        text_size: int,
        num_codes: int,
        *,
        existing: Mapping[str, int] | None = None,
        more: tuple[str, ...] = (),
        multiple: int = 1,
        text_fingerprint: str = "",
    ) -> "Vocabulary":
        """A text vocabulary with special tokens and image codes behind it.

        Args:
          existing: special tokens that the text tokenizer has an id for, e.g. {"BOS": 128000, "EOS": 128001}.
          more: names of further special tokens.
          multiple: spare ids before the codes make the whole a multiple of this, so that the embedding divides over a
            mesh axis.

        Raises:
          UserError: an existing id is not one of the text's, or a name comes twice.
        """
        existing = dict(existing or {})
        for name, i in existing.items():
            if not 0 <= i < text_size:
                raise UserError(f"vocabulary: {name}={i} is not one of the {text_size:,} text ids; leave it out")
        new = [name for name in (*SPECIAL, *more) if name not in existing]
        special = [*existing.items(), *((name, text_size + k) for k, name in enumerate(new))]
        codes_start = text_size + len(new)
        codes_start += -(codes_start + num_codes) % multiple
        return cls(text_size, tuple(special), codes_start, num_codes, text_fingerprint)

    @property
    def size(self) -> int:
        """All ids lie in [0, size)."""
        return self.codes_start + self.num_codes

    def __getitem__(self, name: str) -> int:
        """The id of a special token. Raises UserError for an unknown name."""
        for known, i in self.special:
            if known == name:
                return i
        raise UserError(f"vocabulary: {name} is not a special token{nearest(name, [n for n, _ in self.special])}")

    def code_to_id(self, codes) -> np.ndarray:
        """Ids int32 of image codes. Raises UserError for one outside [0, num_codes)."""
        codes = _integers(codes, "image codes")
        self._check(codes, 0, self.num_codes, "an image code")
        return (codes + self.codes_start).astype(np.int32)

    def id_to_code(self, ids) -> np.ndarray:
        """Image codes int32 of ids. Raises UserError for an id that is no image code."""
        ids = _integers(ids, "ids")
        self._check(ids, self.codes_start, self.size, "the id of an image code")
        return (ids - self.codes_start).astype(np.int32)

    def check_text(self, ids) -> np.ndarray:
        """Text ids as int32. Raises UserError for one that the text tokenizer cannot have made."""
        ids = _integers(ids, "text ids")
        self._check(ids, 0, self.text_size, "a text id")
        return ids.astype(np.int32)

    def is_code(self, ids) -> np.ndarray:
        """bool like ids."""
        return np.asarray(ids) >= self.codes_start

    def is_text(self, ids) -> np.ndarray:
        """bool like ids: text that may be decoded. Special tokens inside the text's range are not."""
        ids = np.asarray(ids)
        return (ids < self.text_size) & ~np.isin(ids, [i for _, i in self.special])

    def describe(self, ids) -> str:
        """Ids for a person: special tokens by name, codes as v123, text ids as numbers."""
        names = {i: name for name, i in self.special}
        words = (names.get(i, f"v{i - self.codes_start}" if i >= self.codes_start else str(i)) for i in map(int, ids))
        return " ".join(words)

    def _check(self, values, low, high, what):
        outside = values[(values < low) | (values >= high)] if values.size else values
        if outside.size:
            raise UserError(f"vocabulary: {outside[0]} is not {what}; they lie in [{low}, {high})")

    def to_json(self) -> str:
        fields = {
            "format": FORMAT,
            "text_size": self.text_size,
            "special": dict(self.special),
            "codes_start": self.codes_start,
            "num_codes": self.num_codes,
            "text_fingerprint": self.text_fingerprint,
        }
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Vocabulary":
        """Raises UserError if the text is not what `to_json` wrote."""
        try:
            fields = json.loads(text)
            form = fields.pop("format")
            special = tuple((str(name), int(i)) for name, i in fields.pop("special").items())
            numbers = {name: int(fields.pop(name)) for name in ("text_size", "codes_start", "num_codes")}
            fingerprint = str(fields.pop("text_fingerprint"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"vocabulary: not a vocabulary ({type(error).__name__}: {error}); make it again") from None
        if form != FORMAT or fields:
            raise UserError(f"vocabulary: format {form} with {sorted(fields)} is not format {FORMAT}; make it again")
        return cls(special=special, text_fingerprint=fingerprint, **numbers)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the layout: two models with the same one mean the same by each id."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _integers(values, what) -> np.ndarray:
    values = np.asarray(values)
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise UserError(f"vocabulary: {what} must be whole numbers, got {values.dtype}")
    return values.astype(np.int64)
