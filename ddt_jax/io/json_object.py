"""JSON from files that others wrote, or that a disk has damaged."""

import json
from typing import Any


def loads(text: str | bytes) -> dict[str, Any]:
    """The object that a JSON text is.

    Raises:
      ValueError: it is no JSON, nested too deeply to be read, or something else than an object; for whoever reads the
        file to put into words.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found
