"""What checkpoints cost: their time beside that of the steps, and the memory of the host over many of them."""

import contextlib
import statistics
import time
from dataclasses import replace
from pathlib import Path

import soak_runs as programs
from soak_gates import at_least, at_most, note, quiet

TIMED = "configs/acdit_scenes.py"  # a third of a second a step: what a save costs does not depend on that
SMALL = "configs/smoke.py"  # of the many saves
STEPS, TURNS = 100, 5  # steps between two saves that the cost is a share of; pairs of turns
EVERY, SAVES = 2, 220  # steps between the many saves, and how many
SETTLED, LAST = 20, 20  # saves before memory is looked at, and over how many it is looked at, both times


def saves(options, folder: Path) -> dict:
    """Both measurements; the second is of a program on its own."""
    results = {"cost": cost(folder / "cost", options)}
    results["memory"], outcome = memory(folder / "memory", options)
    gates = [
        at_most("time of a save, share of the time of 100 steps", results["cost"]["share"], 0.02),
        at_least("saves over which memory was watched", results["memory"]["saves"], 200),
        at_most("growth of the host's memory over them, either way", abs(results["memory"]["growth"]), 0.05),
        *quiet([outcome]),
    ]
    return {"config": TIMED, "seeds": options.seeds[:1], "results": results, "gates": gates}


def cost(folder: Path, options) -> dict:
    """Turns of 100 steps of one run: one that begins with a save, which is then written and read back while steps go
    on, and one without. The real loop, feed and step, in this process.

    Returns:
      share: of 100 steps' time that a save costs, median over the pairs of turns; shares: of each pair;
      blocked_seconds: of a save, in which no step was started; step_seconds; processor_share: as share, of processor
      time.
    """
    import jax

    from ddt_jax import config, experiment
    from ddt_jax.training import feed as feeds
    from ddt_jax.training import loop
    from ddt_jax.training.checkpoint import Checkpoints
    from ddt_jax.training.progress import Progress
    from ddt_jax.training.writers import MultiWriter

    s = programs.load_config(TIMED, options)
    total = 2 * STEPS * (TURNS + 1)
    s = replace(s, seed=options.seeds[0], train=replace(s.train, steps=total, checkpoint_every=2 * STEPS, eval_every=0))
    feed = feeds.open_feed(s, str(folder))
    built = experiment.build(feed.settings)
    points, progress = Checkpoints(folder, s.train), Progress(total, 0, s.train.batch_size)
    stamps = []  # (seconds, processor seconds) before each step

    def stamped(batches):
        for batch in batches:
            stamps.append((time.monotonic(), time.process_time()))
            yield batch

    with jax.set_mesh(built.mesh), contextlib.closing(feed.loader.iterate(0, total)) as batches:
        state, _ = loop.train(
            built.init(),
            built.step,
            stamped(feeds.step_inputs(batches, feeds.batch_shapes(feed.settings, built.model))),
            mesh=built.mesh,
            train=s.train,
            checkpoints=points,
            config=config.dump(feed.settings),
            progress=progress,
            writer=MultiWriter([]),
        )
    points.close()
    return {**shares(stamps, TURNS, STEPS), "arrays": len(jax.tree.leaves(state)), "bytes": _bytes(state)}


def shares(stamps: list[tuple[float, float]], turns: int, steps: int) -> dict:
    """The figures of `cost` from what the clocks said before each step; saves follow every 2 · steps of them."""
    found = {"shares": [], "processor_shares": [], "blocked_seconds": [], "step_seconds": []}
    for turn in range(1, turns + 1):
        begin = 2 * steps * turn - 1  # before the step after which it is saved
        for clock, name in enumerate(("shares", "processor_shares")):
            first, middle, last = (stamps[begin + n][clock] for n in (0, steps, 2 * steps))
            found[name].append(round((middle - first) / (last - middle) - 1, 4))
        step = (stamps[begin + 2 * steps][0] - stamps[begin + steps][0]) / steps
        found["blocked_seconds"].append(round(stamps[begin + 1][0] - stamps[begin][0] - step, 4))
        found["step_seconds"].append(round(step, 4))
    share, processor = (round(statistics.median(found[name]), 4) for name in ("shares", "processor_shares"))
    return {"share": share, "processor_share": processor, **found}


def _bytes(state) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def memory(folder: Path, options) -> tuple[dict, programs.Outcome]:
    """A run that saves all the time, watched from outside.

    Returns:
      ({saves, mb_settled: resident memory after the first saves, mb_at_end, growth, mb: after every tenth save},
      outcome)
    """
    seen = {}  # number of a save → MB when it was the last one

    def watch(pid):
        if saved := programs.saved_steps(folder):
            with contextlib.suppress(OSError, IndexError):
                status = Path(f"/proc/{pid}/status").read_text()
                seen[saved[-1] // EVERY] = int(status.partition("VmRSS:")[2].split()[0]) / 1e3

    settings = (f"steps={EVERY * SAVES}", f"checkpoint_every={EVERY}", "log_every=20", "eval_every=0")
    train = programs.command("train", "--config", SMALL, "--workdir", str(folder), f"--config.seed={options.seeds[0]}")
    outcome = programs.run([*train, *(f"--config.train.{text}" for text in settings)], watch=watch)
    programs.must(outcome, "the run that saves all the time")
    numbers = sorted(seen)
    after = [n for n in numbers if n > SETTLED]
    settled = statistics.median(seen[n] for n in after[:LAST])
    end = statistics.median(seen[n] for n in after[-LAST:])
    note(f"memory: {settled:.0f} MB after {SETTLED} saves, {end:.0f} MB at the end")
    found = {"saves": numbers[-1] - SETTLED, "mb_settled": round(settled, 1), "mb_at_end": round(end, 1)}
    return {**found, "growth": round(end / settled - 1, 4), "mb": [round(seen[n], 1) for n in numbers[::10]]}, outcome
