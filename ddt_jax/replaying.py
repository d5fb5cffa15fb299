"""What `ddt-jax replay` does: a step of a run once more, from the checkpoint before it, against the log."""

import jax
import numpy as np

from ddt_jax import experiment
from ddt_jax import mesh as meshes
from ddt_jax.errors import UserError
from ddt_jax.training import bad_batches, checkpoint, feed, step_log
from ddt_jax.training.tokenizer_step import STOP


def replay(workdir: str, step: int, overrides: tuple[tuple[str, str], ...] = ()) -> dict:
    """Does the steps from the newest checkpoint before `step` up to it, and compares each with what the run logged.

    The program is that of the run, over the devices that are there: on another mesh or another kind of device the bits
    may differ for that reason alone. Nothing in the workdir is changed.

    Args:
      step: as the log counts: the first is 1.

    Returns:
      step, seed, from (step of the checkpoint; 0: the beginning), logged, replayed (loss and grad_norm), equal (None if
      the run has not logged the step), first_difference (the first step on the way that differs; None), skipped, batch
      ("as made", or, for a skipped step, "as kept" or "not as kept": the data has changed; then the kept one was used).

    Raises:
      UserError: if there is no run or no such step, or whatever data, mesh and checkpoints raise.
    """
    s = experiment.saved_settings(workdir, overrides)
    if not 1 <= step <= s.train.steps:
        raise UserError(f"--step {step}: the run has steps 1 to {s.train.steps}")
    opened = feed.open_feed(s, workdir)
    s, loader = opened.settings, opened.loader
    built = experiment.build(s)
    names, metrics = feed.batch_shapes(s, built.model), []
    points = checkpoint.Checkpoints(workdir, s.train, experiment.to_stderr, read_only=True)
    with jax.set_mesh(built.mesh):
        state = points.restore(built.abstract, step - 1)
        points.close()
        state = experiment.fresh(built, experiment.to_stderr) if state is None else state
        start = int(state.step)
        for done in range(start, step):
            (batch,) = feed.step_inputs([loader.batch_at(done)], names)
            which = "as made"
            if (kept := bad_batches.kept(workdir, done + 1)) is not None:
                which = "as kept" if all(np.array_equal(batch[name], kept[name]) for name in batch) else "not as kept"
                batch = {name: np.array(kept[name]) for name in batch}
            placed = meshes.put_batch(batch, built.mesh) | {STOP: meshes.put_flag(False, built.mesh)}
            state, found = built.step(state, placed)
            metrics.append([found[name] for name in (*step_log.FIGURES, "bad_step")])
    values = np.array(jax.device_get(metrics), np.float32)
    replayed, logged = values[:, :-1], step_log.read(workdir, start + 1, step)
    known = logged.view(np.uint32).any(axis=1)
    same = ((replayed.view(np.uint32) == logged.view(np.uint32)) | (np.isnan(replayed) & np.isnan(logged))).all(axis=1)
    differing = np.flatnonzero(known & ~same)
    figures = [dict(zip(step_log.FIGURES, map(float, row), strict=True)) for row in (logged[-1], replayed[-1])]
    return {
        "step": step,
        "seed": s.seed,
        "from": start,
        "logged": figures[0] if known[-1] else None,
        "replayed": figures[1],
        "equal": bool(same[-1]) if known[-1] else None,
        "first_difference": start + 1 + int(differing[0]) if len(differing) else None,
        "skipped": bool(values[-1, -1]),
        "batch": which,
    }


def text(found: dict) -> str:
    """What `replay` has found, for people."""
    origin = f"the checkpoint at step {found['from']:,}" if found["from"] else "the beginning"
    lines = [f"step {found['step']:,} (seed {found['seed']}, batch {found['batch']}), replayed from {origin}"]
    for name, value in found["replayed"].items():
        before = "not logged" if found["logged"] is None else f"logged {found['logged'][name]!r}"
        lines.append(f"{name}: {value!r}, {before}")
    lines += ["the step is skipped"] if found["skipped"] else []
    verdict = {None: "the run has not logged this step", True: "equal in every bit", False: "NOT equal"}[found["equal"]]
    if found["first_difference"]:
        verdict += f"; the first step that differs is {found['first_difference']:,}"
    return "\n".join([*lines, verdict])
