"""Samples of an evaluation one by one, `WORKDIR/samples.json`: picture, text, what the verifier says of the two."""

import base64
import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from ddt_jax.io import atomic, json_object

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


def of(pictures, texts: Sequence[str], right: Sequence[bool] | None = None) -> list[Sample]:
    """Pictures uint8 [N, H, W, 3] beside their texts. right: what the verifier says of each pair; None: it was not
    asked.
    """
    marks = [None] * len(texts) if right is None else right
    return [Sample(*each) for each in zip(pictures, texts, marks, strict=True)]


def write(path, by_kind: dict[str, Sequence[Sample]]):
    """Writes samples by what was asked, "text_to_image" and so on. Returns the path."""
    tree = {
        kind: [{"text": s.text, "right": s.right, "picture": data_uri(s.picture)} for s in samples]
        for kind, samples in by_kind.items()
    }
    return atomic.write_text(path, json.dumps(tree, indent=1) + "\n")


def read(path) -> dict[str, list[Sample]]:
    """What `write` has written."""
    tree = json_object.loads(epath.Path(path).read_bytes())
    one = lambda s: Sample(_picture(s["picture"]), s["text"], s["right"])  # noqa: E731
    return {kind: list(map(one, samples)) for kind, samples in tree.items()}


def _picture(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def data_uri(picture) -> str:
    """A picture uint8 [H, W, 3] for a page that needs no other file."""
    small = max(picture.shape[:2]) <= _SMALL
    buffer = io.BytesIO()
    how = {"format": "PNG"} if small else {"format": "JPEG", "quality": 88}
    Image.fromarray(np.asarray(picture)).save(buffer, **how)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
