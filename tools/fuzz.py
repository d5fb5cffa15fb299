"""Damaged input for every parser: records, tar members, images, configs, imported weights, checkpoints.

    python tools/fuzz.py --minutes 30                  all of them, in turn, each in a process of its own
    python tools/fuzz.py --minutes 5 --targets tar,torch

Hypothesis damages sound inputs (tools/fuzz_targets.py): bits, lengths, pieces that are cut, moved or repeated, and
values of JSON. A parser may refuse with a documented error and nothing else; what else it does is a finding, and so is
a process that dies or takes more than MEMORY. Writes docs/soak/fuzz.json as tools/soak.py does.
tests/tools/test_fuzz.py tries a few inputs of each.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed
sys.path.insert(0, str(ROOT / "tools"))

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

MEMORY = 8 << 30  # bytes of address space beyond those at the start
ROUND = 1000  # inputs between two looks at the clock
PATIENCE = 120  # seconds that a target's process may take beyond its time

_EDGES = [0, 1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
_BYTES = st.binary(max_size=12) | st.builds(
    lambda n, size, order: (n % 256**size).to_bytes(size, order),
    st.sampled_from(_EDGES),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["little", "big"]),
)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [-1, 0, *_EDGES, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 5000, "\ud800", "/etc", ".."]
    )
    | st.floats()
    | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, seeds: list[bytes]) -> bytes:
    """A sound input after some edits; now and then anything at all."""
    if draw(st.integers(0, 49)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "flip", "write", "write", "insert", "remove", "cut", "copy"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "write":
                new = draw(_BYTES)
                data[at : at + len(new)] = new
            case "insert":
                data[at:at] = draw(_BYTES)
            case "remove":
                del data[at : at + draw(st.integers(1, 64))]
            case "cut":
                del data[at:]
            case "copy":
                other = draw(st.sampled_from(seeds))
                begin = draw(st.integers(0, max(0, len(other) - 1)))
                piece = other[begin : begin + draw(st.integers(1, 600))]
                data[at : at + (len(piece) if draw(st.booleans()) else 0)] = piece
    return bytes(data)


@st.composite
def damaged_json(draw, seeds: list[bytes]) -> bytes:
    """A sound tree with other values in some places, or such places gone or added."""
    tree = json.loads(draw(st.sampled_from(seeds)))
    if draw(st.integers(0, 99)) == 0:
        return b"[" * 100_000
    for _ in range(draw(st.integers(1, 3))):
        tree = _edited(draw, tree)
    return json.dumps(tree).encode()


def _edited(draw, tree):
    """A tree with an edit somewhere in it, deeper ones being as likely as others."""
    if isinstance(tree, dict | list) and tree and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(tree) if isinstance(tree, dict) else range(len(tree))))
        match draw(st.integers(0, 9)):
            case 0:
                del tree[key]
            case 1 if isinstance(tree, dict):
                tree[draw(st.text(max_size=5))] = draw(_VALUES)
            case _:
                tree[key] = _edited(draw, tree[key])
        return tree
    return draw(_VALUES)


class Finding(Exception):
    """A parser did what it may not do. Its text has the traceback; data: the input."""

    def __init__(self, text: str, data: bytes):
        super().__init__(text)
        self.data = data


def explore(name: str, folder: Path, *, inputs: int, seconds: float = float("inf"), start: int = 0) -> dict:
    """Tries a parser.

    Args:
      inputs, seconds: what ends it, whichever comes first.
      start: seed of the first round.

    Returns:
      inputs, refused (with a documented error).

    Raises:
      Finding: the smallest input that Hypothesis has found for the first thing that was wrong.
    """
    from fuzz_targets import DOCUMENTED, TARGETS

    target, counts, end = TARGETS[name], {"inputs": 0, "refused": 0}, time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    seeds = target.seeds(folder)
    for data in seeds:
        target.parse(data, folder)  # sound ones are taken
    strategy = damaged(seeds) | damaged_json(seeds) if target.text else damaged(seeds)
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}

    def parse(data):
        counts["inputs"] += 1
        (folder / "last_input").write_bytes(data)  # what killed the process, if it dies
        try:
            target.parse(data, folder)
        except DOCUMENTED as error:
            counts["refused"] += 1
            assert "\n" not in str(error), f"more than a line: {error}"

    failing = []

    def watched(data):
        try:
            parse(data)
        except Exception:
            failing[:] = [(traceback.format_exc(), data)]  # the last one is the smallest
            raise

    while counts["inputs"] < inputs and time.monotonic() < end:
        count = min(ROUND, inputs - counts["inputs"])
        test = settings(max_examples=count, phases=(Phase.generate, Phase.shrink), **options)(given(strategy)(watched))
        try:
            seed(start)(test)()
        except Exception as error:
            text, data = failing[-1] if failing else (traceback.format_exc(), b"")
            raise Finding(text, data) from error
        start += 1
    return counts


def work(options) -> int:
    """One target in this process; prints what was found as JSON."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY,) * 2)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = explore(
                options.work,
                Path(folder),
                inputs=options.inputs,
                seconds=options.minutes * 60,
                start=options.seed,
            )
        except Finding as error:
            found = {"finding": str(error), "data": error.data.hex()}
    print(json.dumps(found))
    return 0


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def fuzz(options, folder: Path) -> dict:
    """All targets, one after the other, each with its share of the time and of the inputs."""
    from soak_gates import at_least, at_most, note

    results, names = {}, options.targets
    for name in names:
        command = [sys.executable, __file__, "--work", name, "--seed", str(options.seed)]
        command += ["--minutes", str(options.minutes / len(names)), "--inputs", str(options.inputs // len(names))]
        try:
            limit = options.minutes / len(names) * 60 + PATIENCE
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
            lines = done.stdout.splitlines()
            found = json.loads(lines[-1]) if done.returncode == 0 and lines else {"finding": _death(done)}
        except subprocess.TimeoutExpired:
            found = {"finding": f"hangs: no end {PATIENCE} s after its time"}
        results[name] = found
        note(f"{name}: {found.get('finding') or '{inputs:,} inputs, {refused:,} refused'.format(**found)}")
    inputs = sum(found.get("inputs", 0) for found in results.values())
    gates = [
        at_most("parsers that did what they may not", sum("finding" in found for found in results.values()), 0),
        at_least("inputs, or minutes", max(inputs / options.inputs, options.minutes / 30), 1),
    ]
    total = {"inputs": inputs, "minutes": options.minutes}
    return {
        "config": "configs/smoke.py",
        "seeds": [options.seed],
        "results": results | {"total": total},
        "gates": gates,
    }


def _death(done) -> str:
    return f"its process ended with code {done.returncode}: {done.stderr[-2000:]}"


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="for all targets together (default: 30)")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="at most so many (default: 1,000,000)")
    parser.add_argument("--targets", default="", metavar="NAME,NAME", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "soak", metavar="DIR", help="where the record goes")
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.work:
        from fuzz_targets import TARGETS

        options.targets = options.targets.split(",") if options.targets else list(TARGETS)
        if unknown := set(options.targets) - set(TARGETS):
            parser.error(f"unknown targets: {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    options.overrides = []
    return options


def main(argv=None) -> int:
    options = parse(argv)
    if options.work:
        return work(options)
    import soak

    arguments = " ".join(soak.without_folders(sys.argv[1:] if argv is None else argv))
    return soak.measured("fuzz", f"python tools/fuzz.py {arguments}".strip(), options, fuzz)


if __name__ == "__main__":
    sys.exit(main())
