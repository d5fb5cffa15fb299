"""Samples of an evaluation one by one, `WORKDIR/samples.json`: picture, text, what the verifier says of the two."""

import base64
import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ddt_jax.evaluation import compositional
from ddt_jax.io import atomic

FILE = "samples.json"
_SMALL = 128  # pixels of a side up to which a picture is kept exactly


class Sample(NamedTuple):
    """Attributes:
    picture: uint8 [H, W, 3].
    text: the prompt that it was drawn from, or what was said of it.
    right: whether a verifier finds that they agree; None: nobody has looked.
    """

    picture: np.ndarray
    text: str
    right: bool | None = None


def drawn(pictures, captions: Sequence[str], valid, *, verified: bool) -> list[Sample]:
    """Pictures uint8 [N, H, W, 3] of captions. verified: whether they are scenes, which a program can judge."""
    found = []
    for i, text in enumerate(captions):
        one = pictures[i : i + 1], [text], valid[i : i + 1]
        found.append(Sample(pictures[i], text, _right(compositional.pictures(*one)) if verified else None))
    return found


def described(pictures, said: Sequence[str], captions: Sequence[str], *, verified: bool) -> list[Sample]:
    """What was said of pictures. captions: the truth."""
    return [
        Sample(picture, text, _right(compositional.captions([text], [truth])) if verified else None)
        for picture, text, truth in zip(pictures, said, captions, strict=True)
    ]


def _right(figures) -> bool:
    return next(figure["value"] for name, figure in figures.items() if name.endswith("_all_correct")) == 1


def write(path, by_kind: dict[str, Sequence[Sample]]):
    """Writes samples by what was asked, "text_to_image" and so on. Returns the path."""
    tree = {
        kind: [{"text": s.text, "right": s.right, "picture": data_uri(s.picture)} for s in samples]
        for kind, samples in by_kind.items()
    }
    return atomic.write_text(path, json.dumps(tree, indent=1) + "\n")


def data_uri(picture) -> str:
    """A picture uint8 [H, W, 3] for a page that needs no other file."""
    small = max(picture.shape[:2]) <= _SMALL
    buffer = io.BytesIO()
    how = {"format": "PNG"} if small else {"format": "JPEG", "quality": 88}
    Image.fromarray(np.asarray(picture)).save(buffer, **how)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
