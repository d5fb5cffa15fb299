"""When a run did its steps: wall times from TensorBoard's event files, for metrics.jsonl holds none on purpose.

A file is a row of records: length (uint64), its checksum, an `Event` of that many bytes, its checksum (uint32 each).
What is torn or damaged ends its file.
"""

import statistics
import struct
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath


class Speed(NamedTuple):
    """Attributes:
    points: (step, steps per second up to it).
    goodput: share of the wall time, from the first record to the last, that its steps would have taken at the usual
      speed: the rest went to pauses, restarts, steps done twice, evaluations and checkpoints.
    """

    points: list[tuple[float, float]]
    goodput: float


def read(workdir) -> list[tuple[int, float]]:
    """(step, seconds) of what a run logged, in the order in which it did; steps that a restart repeats come twice."""
    folder = epath.Path(workdir) / "tensorboard"
    files = [path for path in folder.iterdir() if "tfevents" in path.name] if folder.exists() else []
    found = {(event.step, event.wall_time) for path in files for event in _events(path.read_bytes())}
    return sorted(found, key=lambda pair: (pair[1], pair[0]))


def _events(data: bytes) -> Iterator:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + length]
        checksum = data[at + 12 + length : at + 16 + length]
        at += 16 + length
        if len(checksum) < 4 or struct.unpack("<I", checksum)[0] != masked_crc32c(body):
            return
        event = Event()
        event.ParseFromString(body)
        if event.HasField("summary"):
            yield event


def speed(times: list[tuple[int, float]]) -> Speed | None:
    """Args:
      times: as `read`.

    Returns:
      None for fewer than three records of different steps.
    """
    firsts: list[tuple[int, float]] = []
    for step, second in times:  # a step logs several figures at about the same time: the first one counts
        if not firsts or step != firsts[-1][0]:
            firsts.append((step, second))
    rates = [(b, (b - a) / (y - x)) for (a, x), (b, y) in zip(firsts, firsts[1:], strict=False) if b > a and y > x]
    if len(rates) < 2:
        return None
    usual = statistics.median(rate for _, rate in rates)
    reached = max(step for step, _ in firsts) - firsts[0][0]
    wall = firsts[-1][1] - firsts[0][1]
    return Speed([(float(step), rate) for step, rate in rates], min(1.0, reached / usual / wall))
