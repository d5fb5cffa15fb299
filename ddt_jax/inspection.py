"""What `ddt-jax checkpoint` does: checkpoints of runs, looked at from outside. Only `average` builds the model."""

import json
from dataclasses import replace

import jax
import numpy as np
from etils import epath

from ddt_jax import config, experiment, settings
from ddt_jax.errors import UserError
from ddt_jax.training import checkpoint, corpus
from ddt_jax.training.claim import claim
from ddt_jax.training.stored import Damaged, Stored

SHOWN = 20  # arrays that `diff` names


def listed(workdir: str) -> list[dict]:
    """Checkpoints of a run, oldest first: step, bytes, whether it has been read back, figures of the log at that step.

    Raises:
      UserError: if there is no run.
    """
    checkpoint.saved_config(workdir)
    rows = []
    for step in checkpoint.saved_steps(workdir):
        stored = _stored(workdir, step)
        try:
            metrics = stored.meta().get("metrics", {})
        except Damaged:
            metrics = {}
        rows.append({"step": step, "bytes": stored.bytes, "read_back": stored.is_read_back, "metrics": metrics})
    return rows


def verify(workdir: str, step: int | None = None, *, deep: bool = False) -> list[dict]:
    """What the hashes of the files say about one checkpoint, or all, and with `deep` the checksums of their arrays.

    Neither needs a device. A checkpoint that was never read back has no hashes: then its arrays are looked at.

    Returns:
      Of each: step, files ("as written", "not listed", or what is wrong), arrays ("as saved", "not looked at", or what
      is wrong), sound.

    Raises:
      UserError: if there is no run, or no checkpoint at that step.
    """
    rows = []
    for s in [_step(workdir, step)] if step is not None else checkpoint.saved_steps(workdir):
        stored, trusted, arrays = _stored(workdir, s), False, "not looked at"
        try:
            files = "not listed"
            if stored.is_read_back:
                problem = stored.file_problem()
                files, trusted = problem or "as written", problem is None
        except Damaged as error:
            files = str(error)
        if deep or files == "not listed":
            try:
                wrong = stored.array_problems()
            except Damaged as error:
                wrong = [str(error)]
            arrays = f"{wrong[0]}{f' (and {len(wrong) - 1} more)' if wrong[1:] else ''}" if wrong else "as saved"
        sound = arrays == "as saved" if files == "not listed" else trusted and arrays in ("as saved", "not looked at")
        rows.append({"step": s, "files": files, "arrays": arrays, "sound": sound})
    return rows


def diff(workdir: str, step: int | None, other: str, other_step: int | None) -> dict:
    """How the arrays and settings of two checkpoints differ; the newest of each run where no step is given.

    Returns:
      first, second ("WORKDIR at STEP"), equal (arrays), different: name, change (‖b - a‖ / ‖a‖), largest (|b - a|),
      most changed first; only_first, only_second (names of arrays, or of arrays of another shape), settings.

    Raises:
      UserError: if a checkpoint is missing or cannot be read.
    """
    places = [(w, _step(w, s)) for w, s in ((workdir, step), (other, other_step))]
    a, b = (_stored(*place) for place in places)
    try:
        shapes = [{name: x.open(name).shape for name in x.names()} for x in (a, b)]
        both = [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]
        changed = [row for name in both if (row := _change(a, b, name))]
        trees = [x.meta()["config"] for x in (a, b)]
    except Damaged as error:
        raise UserError(f"checkpoint: {error}; `ddt-jax checkpoint verify` says which are sound") from error
    return {
        "first": "{} at {}".format(*places[0]),
        "second": "{} at {}".format(*places[1]),
        "equal": len(both) - len(changed),
        "different": sorted(changed, key=lambda row: -row["change"]),
        "only_first": sorted(shapes[0].keys() - both),
        "only_second": sorted(shapes[1].keys() - both),
        "settings": config.difference(*trees),
    }


def average(workdir: str, steps: str, to: str) -> dict:
    """Writes a run whose weights (and their running average, where there is one) are the mean of several checkpoints.

    All else, codebook and optimizer too, is that of the newest of them.

    Args:
      steps: "N,N,...", at least two; "": all that there are.
      to: workdir of the new run.

    Raises:
      UserError: if there are fewer, one of them is damaged, or `to` holds a run already.
    """
    tree = checkpoint.saved_config(workdir)
    try:
        chosen = {int(text) for text in steps.split(",") if text}
    except ValueError:
        raise UserError(f"--steps {steps} is not N,N,... such as 1000,2000") from None
    if not to:
        raise UserError("checkpoint average needs --to DIR, the workdir of the new run")
    steps = sorted({_step(workdir, s) for s in chosen} or checkpoint.saved_steps(workdir))
    if len(steps) < 2:
        raise UserError(
            f"checkpoint: an average needs two checkpoints or more, {workdir} has {steps}; give --steps N,N"
        )
    if checkpoint.saved_steps(to):
        raise UserError(f"--to: {to} holds checkpoints already; name a new folder")
    for row in (row for s in steps for row in verify(workdir, s, deep=True)):
        if not row["sound"]:
            problem = row["files"] if row["files"] not in ("as written", "not listed") else row["arrays"]
            raise UserError(
                f"checkpoint: step {row['step']} of {workdir} is damaged: {problem}; leave it out of --steps"
            )
    built, state = experiment.restore(workdir, at_most=steps[-1], whole=True)
    stored = [_stored(workdir, s) for s in steps]

    def mean(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.startswith(("params/", "ema/")):
            return leaf
        total = sum(x.read(name).astype(np.float64) for x in stored)
        return jax.device_put((total / len(stored)).astype(leaf.dtype), leaf.sharding)

    state = jax.tree_util.tree_map_with_path(mean, state)
    claim(epath.Path(to), tree, lambda: None)
    if isinstance(built.settings.model, settings.Multimodal):
        corpus.save(to, corpus.load(workdir, built.settings))
    points = checkpoint.Checkpoints(to, replace(built.settings.train, keep_checkpoints=1), experiment.to_stderr)
    try:
        points.save(state, tree)
    finally:
        points.close()
    return {"steps": steps, "written": to, "step": steps[-1]}


def table(rows: list[dict]) -> str:
    """Rows of `listed` or `verify` as text."""
    if not rows:
        return "no checkpoints yet"
    names = list(rows[0])
    lines = [names] + [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def differences(found: dict) -> str:
    """What `diff` has found, as text."""
    lines = [f"{found['first']} and {found['second']}: {found['equal']} arrays are equal"]
    lines += [
        f"{row['name']}: changed by {row['change']:.3g}, at most {row['largest']:.3g}" for row in found["different"]
    ]
    if len(found["different"]) > SHOWN:
        lines[SHOWN + 1 :] = [f"and {len(found['different']) - SHOWN} more arrays"]
    lines += [f"only in the first: {name}" for name in found["only_first"]]
    lines += [f"only in the second: {name}" for name in found["only_second"]]
    return "\n".join([*lines, f"settings that differ: {', '.join(found['settings']) or 'none'}"])


def _change(a: Stored, b: Stored, name) -> dict | None:
    """How an array has changed, block by block; None if no bit has."""
    same, squares, largest, size = True, 0.0, 0.0, 0.0
    for where in a.blocks(name):
        x, y = a.read(name, where), b.read(name, where)
        same = same and x.dtype == y.dtype and x.tobytes() == y.tobytes()
        x, y = x.astype(np.float64), y.astype(np.float64)
        delta = np.abs(y - x)
        squares, size = squares + np.square(delta).sum(), size + np.square(x).sum()
        largest = max(largest, float(delta.max(initial=0)))
    return None if same else {"name": name, "change": float(np.sqrt(squares / (size or 1))), "largest": largest}


def _stored(workdir, step) -> Stored:
    return Stored(checkpoint.checkpoints_folder(workdir) / str(step))


def _step(workdir, step: int | None) -> int:
    """A step that there is; the newest if none is given. Raises UserError."""
    checkpoint.saved_config(workdir)
    steps = checkpoint.saved_steps(workdir)
    if not steps or (step is not None and step not in steps):
        asked = (
            "no checkpoint yet" if not steps else f"no checkpoint at step {step}, only at {', '.join(map(str, steps))}"
        )
        raise UserError(f"checkpoint: {workdir} has {asked}")
    return steps[-1] if step is None else step


def _cell(value) -> str:
    if isinstance(value, dict):
        return json.dumps({k: float(f"{v:.4g}") for k, v in value.items()})
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
