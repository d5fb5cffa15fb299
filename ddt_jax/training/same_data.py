"""Whether all processes of a run have found the same data, from whose numbers the order of rows follows."""

import hashlib
import json
from collections.abc import Sequence
from itertools import zip_longest

import jax
import numpy as np

from ddt_jax.errors import UserError
from ddt_jax.training.feed import Feed, RowFeed

_TEXT = 2000  # bytes that a process says; the digest tells apart what differs behind them
_CUT = "..."


def check(feed: Feed) -> None:
    """Raises UserError on every process if one has found other data than process 0. Called by all of them."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    text, digest = found(feed)
    said = np.frombuffer(digest + _cut(text).ljust(_TEXT), np.uint8)
    rows = [bytes(row) for row in np.asarray(multihost_utils.process_allgather(said))]
    size = len(digest)
    if problem := difference([(row[size:].decode(errors="ignore").rstrip(), row[:size]) for row in rows]):
        raise UserError(problem)


def found(feed: Feed) -> tuple[str, bytes]:
    """What this process has: a line for each thing, for a person, and a digest.

    Names of sources are not in the digest: hosts may keep their files in different places.
    """
    counts, rows = [count for _, count in feed.records], isinstance(feed, RowFeed)
    classes = None if rows else feed.loader.source.label_names
    vocabulary = feed.corpus.vocabulary.fingerprint if rows else ""
    lines = [f"{count:,} records of {name}" for name, count in feed.records]
    if classes:
        lines.append(f"{len(classes):,} classes with names {_sha256(classes).hex()[:8]}…")
    if vocabulary:
        lines.append(f"vocabulary {vocabulary[:8]}…")
    return "\n".join(lines), _sha256([counts, classes, vocabulary])


def difference(of_all: Sequence[tuple[str, bytes]]) -> str:
    """What is wrong with the data of processes, "" if nothing is. of_all: of each, what `found` says."""
    first_text, first_digest = of_all[0]
    other = next((i for i, (_, digest) in enumerate(of_all) if digest != first_digest), None)
    if other is None:
        return ""
    both = [text.splitlines() for text in (of_all[other][0], first_text)]
    whole = [[line for line in text if line != _CUT] for text in both]
    # What one of them has no room for may be the other's next line.
    lines = zip_longest(*whole, fillvalue="nothing") if whole == both else zip(*whole, strict=False)
    apart = (pair for pair in lines if len({line.partition(" of ")[0] for line in pair}) == 2)
    theirs, first = next(apart, ("other sources", "its own"))
    return (
        f"data: process {other} of {len(of_all)} has found {theirs} where process 0 has {first}; all must learn from "
        "the same, so give every host the same files"
    )


def _cut(text: str) -> bytes:
    """As many whole lines as there is room for, and `_CUT` if those are not all."""
    raw = text.encode()
    if len(raw) <= _TEXT:
        return raw
    whole = raw[: _TEXT - len(_CUT) - 1].rpartition(b"\n")[0]
    return whole + f"\n{_CUT}".encode()


def _sha256(value) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()
