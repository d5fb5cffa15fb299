"""What watches a run while it trains: speed and MFU, where its time goes, heartbeats, the watchdog, profiles.

Nothing here changes what is learned. The settings are `train.silence_limit`, `train.profile_at` and
`train.profile_steps`; docs/monitoring.md says what is written.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import jax

from ddt_jax import settings
from ddt_jax.scaling import model_flops
from ddt_jax.scaling.chips import of_device
from ddt_jax.training import goodput as goodputs
from ddt_jax.training.goodput import Goodput
from ddt_jax.training.heartbeat import Heartbeat, peak_memory
from ddt_jax.training.loop import Watch
from ddt_jax.training.profiling import Profiler
from ddt_jax.training.progress import Progress
from ddt_jax.training.speed import Speed
from ddt_jax.training.watchdog import Watchdog


def speed(s: settings.Experiment, count: int, build: Callable, batch: Callable) -> Speed:
    """Of a run on so many chips, with MFU where their kind is known. build, batch: as `model_flops.traced`."""
    rows = isinstance(s.model, settings.Multimodal)
    device = jax.local_devices()[0]
    chip = of_device(device.device_kind)
    work = model_flops.of_step(s, build, batch, [device]) / s.train.batch_size if chip else 0.0
    peak = chip.peak_flops if chip else 0.0
    return Speed("token" if rows else "image", s.sequences.context if rows else 1, count, work, peak)


@contextmanager
def watching(workdir, s: settings.Train, progress: Progress, speed: Speed, begun: float, watch: Watch):
    """Watches the block, and says at its end where its time went. Process 0 keeps the accounts.

    Args:
      begun: `time.perf_counter()` at which this try began.
      watch: for the loop; what is given has its other parts as well.
    """
    process = jax.process_index()
    goodput = Goodput(workdir, progress.step, time.perf_counter() - begun - progress.age, progress.spent)

    def measured():
        rate = progress.examples_per_second
        goodput.figures = peak_memory() | (speed.figures(rate) if rate else {})
        return {f"speed/{name}": value for name, value in (goodput.figures | {"goodput": goodput.share()}).items()}

    also = goodput.write if process == 0 else lambda: None
    beat = Heartbeat(workdir, progress, process=process, processes=jax.process_count(), also=also)
    with beat, Watchdog(workdir, progress, s.silence_limit, process=process):
        profiler = Profiler(workdir, s.profile_at, s.profile_steps)
        yield replace(watch, measured=measured, saved=goodput.saved, profiler=profiler)
        goodput.saved(progress.step)  # it has ended in good order: nothing after the last checkpoint was lost
        measured()
    for line in goodputs.lines(goodput.report()):
        progress.note(line)
