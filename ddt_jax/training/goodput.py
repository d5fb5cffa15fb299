"""Where the time of a run went, over all its restarts: WORKDIR/goodput.json, kept by process 0.

A try is a process that trains, from its start to its end. What it did after the checkpoint from which the next one goes
on is `lost`: its steps are done again, and whatever else happened then was in vain.
"""

import json
from collections.abc import Callable

from etils import epath

from ddt_jax.io import atomic, json_object
from ddt_jax.training.progress import duration
from ddt_jax.training.speed import RATE

FILE = "goodput.json"
KINDS = ("init", "compile", "data", "step", "checkpoint", "evaluation", "other", "lost")
_PHASES = {"compiling": "compile", "saving": "checkpoint", "evaluating": "evaluation"}  # of the progress line
_SNAPSHOTS = 64  # checkpoints of a try that are remembered, the last ones


class Goodput:
    """Seconds of a run by KINDS.

    `step` are those of the loop outside of everything else, `data` those that it waited for a batch while no step was
    under way, `init` those before the first batch was asked for; `compile` holds the first step of a try as well.

    Args:
      start: the step that this try goes on from; 0: from the beginning.
      init: seconds of this try that are over.
      spent: → seconds so far, {"training", "waiting", phase: ...}, as `Progress.spent`.
    """

    def __init__(self, workdir, start: int, init: float, spent: Callable[[], dict[str, float]]):
        self._path = epath.Path(workdir) / FILE
        try:
            self._before, self._tries = _settled(_read(self._path), start)
        except (AttributeError, KeyError, TypeError, ValueError):  # what a disk has made of it: accounts begin anew
            self._before, self._tries = {}, 0
        self._init, self._spent = init, spent
        self._saved: dict[str, dict[str, float]] = {}
        self.figures: dict[str, float] = {}  # speed and memory, which are kept beside the seconds

    def saved(self, step: int) -> None:
        """A checkpoint of the state after `step` has been begun: what was done up to here is not lost with this try."""
        last = list((self._saved | {str(step): self._now()}).items())[-_SNAPSHOTS:]
        self._saved = dict(last)  # another one: the thread that writes may be reading the old one

    def seconds(self) -> dict[str, float]:
        """By KINDS, over all tries; no zeros."""
        return _kept(_sum(self._before, self._now()))

    def share(self) -> float:
        """Of all time, that of steps which counted."""
        seconds = self.seconds()
        return seconds.get("step", 0.0) / max(sum(seconds.values()), 1e-9)

    def report(self) -> dict:
        """The share as "goodput", "seconds" by KINDS, "tries", and `figures`."""
        seconds = self.seconds()
        return {"goodput": round(self.share(), 4), "seconds": seconds, "tries": self._tries + 1, **self.figures}

    def write(self) -> None:
        """Raises OSError if it cannot."""
        own = {"before": _kept(self._before), "try": _kept(self._now())}
        own["saved"] = {step: _kept(seconds) for step, seconds in self._saved.items()}
        atomic.write_text(self._path, json.dumps(self.report() | own, indent=2) + "\n")

    def _now(self) -> dict[str, float]:
        found = {"init": self._init}
        for name, seconds in self._spent().items():
            kind = {"training": "step", "waiting": "data"}.get(name) or _PHASES.get(name, "other")
            found[kind] = found.get(kind, 0.0) + seconds
        found["step"] -= found.get("data", 0.0)  # waiting is a part of training
        return found


def read(workdir) -> dict:
    """The last `report` of a run; {} if there is none."""
    tree = _read(epath.Path(workdir) / FILE)
    return {name: value for name, value in tree.items() if name not in ("before", "try", "saved")}


def lines(report: dict) -> list[str]:
    """For the log: where the time went, the most first, then speed and memory."""
    seconds, total = report["seconds"], max(sum(report["seconds"].values()), 1e-9)
    shares = [f"{kind} {value / total:.1%}" for kind, value in sorted(seconds.items(), key=lambda pair: -pair[1])]
    tries = f" in {report['tries']} tries" if report["tries"] > 1 else ""
    rates = {unit: report.get(RATE.format(unit)) for unit in ("token", "image")}
    texts = [f"{rate:,.1f} {unit}s/s/chip" for unit, rate in rates.items() if rate]
    texts += [f"MFU {report['mfu']:.1%}"] if "mfu" in report else []
    for name, text in {"peak_device_bytes": "of a device", "peak_host_bytes": "of the host"}.items():
        texts += [f"{report[name] / 2**30:.2f} GiB {text} at most"] if name in report else []
    first = f"goodput {report['goodput']:.1%} of {duration(total)}{tries}: {', '.join(shares)}"
    return [first, f"speed and memory: {', '.join(texts)}"] if texts else [first]


def _read(path) -> dict:
    """{} for a file that is missing, or is none of ours."""
    if not path.exists():
        return {}
    try:
        tree = json_object.loads(path.read_bytes())
        return tree if {"seconds", "tries", "before", "try", "saved"} <= tree.keys() else {}
    except ValueError:
        return {}


def _settled(tree: dict, start: int) -> tuple[dict[str, float], int]:
    """(seconds of all tries so far, when the next one goes on from `start`; how many they were)."""
    if not tree:
        return {}, 0
    ended = tree["try"]
    kept = max((int(step) for step in tree["saved"] if int(step) <= start), default=None)
    counted = {} if kept is None else tree["saved"][str(kept)]
    lost = max(sum(ended.values()) - sum(counted.values()), 0.0)
    return _sum(tree["before"], counted, {"lost": lost}), tree["tries"]


def _sum(*parts: dict[str, float]) -> dict[str, float]:
    return {kind: sum(part.get(kind, 0.0) for part in parts) for kind in KINDS}


def _kept(seconds: dict[str, float]) -> dict[str, float]:
    return {kind: round(value, 2) for kind, value in seconds.items() if value}
