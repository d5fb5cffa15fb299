"""When a run did its steps: wall times from TensorBoard's event files, for metrics.jsonl holds none on purpose.

A file is a row of records: length (uint64), its checksum, an `Event` of that many bytes, its checksum (uint32 each).
What is torn or damaged ends its file.
"""

import struct
from collections.abc import Iterator

from etils import epath


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


def rates(times: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """(step, steps per second up to it, from the step logged before). times: as `read`."""
    firsts: list[tuple[int, float]] = []
    for step, second in times:  # a step logs several figures at about the same time: the first one counts
        if not firsts or step != firsts[-1][0]:
            firsts.append((step, second))
    pairs = zip(firsts, firsts[1:], strict=False)
    return [(float(b), (b - a) / (y - x)) for (a, x), (b, y) in pairs if b > a and y > x]
