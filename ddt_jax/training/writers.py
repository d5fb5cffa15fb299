"""Where the figures of a run go: JSON lines in the workdir, TensorBoard, Weights & Biases. No JAX here.

Only process 0 makes writers. The values are host scalars: a writer must never be what waits for the device.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import queue
import secrets
import threading
from typing import Protocol

import numpy as np
from etils import epath

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.io import atomic, json_object

METRICS_FILE = "metrics.jsonl"
_REMOTE_FLUSH_LINES = 20  # an object store has no append: the whole object is written again every so many lines


class Writer(Protocol):
    """What the loop writes to."""

    def write(self, step: int, scalars: dict) -> None:
        """Named scalars after `step` optimizer steps."""

    def measure(self, step: int, scalars: dict) -> None:
        """Figures of the machine at that time: speed, memory. They depend on more than the run itself."""

    def image(self, step: int, name: str, image) -> None:
        """A picture, uint8 [H, W, 3]."""

    def truncate_after(self, step: int) -> None:
        """The run goes on from `step`: what was written beyond it, before a kill, is forgotten."""

    def flush(self) -> None:
        """A checkpoint is about to be saved: no line before it may be lost with this process."""

    def close(self) -> None:
        """Nothing is lost after this."""


def _plain(value):
    """A JSON value of a scalar. JSON has no infinities: they become "nan", "inf", "-inf", which float() reads back."""
    value = np.asarray(value).item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _step_of(line: bytes):
    """The step of a line; None if it is torn."""
    try:
        step = json_object.loads(line)["step"]
    except (ValueError, KeyError):  # ValueError: no object, or a torn character
        return None
    return step if isinstance(step, int) else None


def read_metrics(path) -> list[dict]:
    """The records of a metrics file, non-finite values as floats, without torn and damaged lines."""
    records = []
    for line in epath.Path(path).read_bytes().splitlines():
        if _step_of(line) is not None:
            with contextlib.suppress(ValueError):  # a text that is no number
                record = json.loads(line).items()
                records.append({k: float(v) if isinstance(v, str) else v for k, v in record})
    return records


class JsonlWriter:
    """`metrics.jsonl`: an object per line, `{"step": 50, "loss": ...}`; pictures beside it as `pictures/NAME_STEP.png`.

    Each line is handed to the operating system at once, so a killed process loses none; off a local disk it loses none
    before its last checkpoint (`flush`). There is no wall time in the file: what a run writes is a function of the run,
    and a resumed one continues the same file (`truncate_after`).
    """

    def __init__(self, workdir):
        self._workdir = epath.Path(workdir)
        self.path = self._workdir / METRICS_FILE
        self._local = atomic.is_local(self.path)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._file = None
        self._remote_lines: list[bytes] = []
        self._unsaved = 0
        self._keep(lambda step: True)

    def truncate_after(self, step: int) -> None:
        """Drops what was written beyond a restored step (-1: everything), and any torn line."""
        self._keep(lambda s: s <= step)

    def write(self, step, scalars):
        """As `Writer`. Raises UserError if the disk is full."""
        record = {"step": int(step), **{name: _plain(value) for name, value in scalars.items()}}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        if self._local:
            atomic.write_through(self._file, line)
            return
        self._remote_lines.append(line)
        self._unsaved += 1
        if self._unsaved >= _REMOTE_FLUSH_LINES:
            self._save_remote()

    def measure(self, step, scalars):
        """Left out: another machine, or a restart, would write another file."""

    def image(self, step, name, image):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(np.asarray(image)).save(buffer, format="PNG")
        atomic.write_bytes(self._workdir / "pictures" / f"{name}_{step:08d}.png", buffer.getvalue())

    def flush(self):
        if self._unsaved:
            self._save_remote()

    def close(self):
        if self._file is not None:
            self._file.close()
            self._file = None
        self.flush()

    def _keep(self, wanted):
        """Rewrites the file with the whole lines whose step is wanted; leaves it alone if these are all."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.flush()
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
        kept = [line for line in whole if (step := _step_of(line)) is not None and wanted(step)]
        if b"".join(kept) != content:
            atomic.write_bytes(self.path, b"".join(kept))
        if self._local:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - held open for the run
        else:
            self._remote_lines = kept

    def _save_remote(self):
        atomic.write_bytes(self.path, b"".join(self._remote_lines))
        self._unsaved = 0


class TensorBoardWriter:
    """Event files in `WORKDIR/tensorboard`, opened when there is something to write.

    Non-finite values are left out, for tensorboardX prints a warning for each; the JSON lines have them.
    """

    def __init__(self, workdir):
        self._folder = str(epath.Path(workdir) / "tensorboard")
        self._writer = None
        self._start = None

    def truncate_after(self, step):
        """Tells TensorBoard to hide what earlier files hold beyond the step."""
        self.close()
        self._start = int(step)

    def write(self, step, scalars):
        for name, value in scalars.items():
            if math.isfinite(value):
                self._open().add_scalar(name, float(value), int(step))

    measure = write

    def image(self, step, name, image):
        self._open().add_image(name, np.asarray(image), int(step), dataformats="HWC")

    def flush(self):
        """Left to its own thread, every 30 seconds: waiting for it might be for ever."""

    def close(self):
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self):
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # File names hold whole seconds: the suffix keeps a restart within one from writing over its predecessor.
            suffix = f".from{self._start or 0}.{os.getpid()}"
            purge = None if self._start is None else self._start + 1
            self._writer = SummaryWriter(self._folder, purge_step=purge, flush_secs=30, filename_suffix=suffix)
        return self._writer


class WandbWriter:
    """Weights & Biases, fed by a thread of its own: a slow or dead service costs records, never time.

    Everything, the log-in included, happens in that thread. When its queue is full, or wandb has failed, records are
    dropped and counted.

    Attributes:
      dropped: records that did not get through.
      error: what wandb raised, if it did; it is not tried again.

    Raises:
      UserError: if the package is not installed.
    """

    def __init__(self, *, project: str = "ddt_jax", name: str = "", config: dict | None = None, run_id: str = "",
                 workdir="", capacity: int = 256, close_seconds: float = 10.0):  # fmt: skip
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                "train.wandb: the package wandb is not installed; "
                "run `pip install 'ddt_jax[wandb]'` or set train.wandb=False"
            )
        self.dropped = 0
        self.error: Exception | None = None
        self._close_seconds = close_seconds
        self._queue: queue.Queue = queue.Queue(capacity)
        self._closing = threading.Event()
        init = {"project": project, "name": name or None, "config": config, "dir": str(workdir) or None}
        if run_id:
            init |= {"id": run_id, "resume": "allow"}  # a resumed run goes on in the same place
        self._thread = threading.Thread(target=self._serve, args=(init,), name="wandb-writer", daemon=True)
        self._thread.start()

    def write(self, step, scalars):
        self._offer(("scalars", int(step), {name: np.asarray(value).item() for name, value in scalars.items()}))

    measure = write

    def image(self, step, name, image):
        self._offer(("image", int(step), {name: np.asarray(image)}))

    def truncate_after(self, step):
        """Nothing can be taken back there: the service keeps what came first and ignores a step's repetition."""

    def flush(self):
        """Left to its own thread."""

    def close(self):
        """Waits a bounded time for what is queued."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            self.dropped += self._queue.qsize()

    def _offer(self, record):
        if self.error is not None or self._closing.is_set():
            self.dropped += 1
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def _serve(self, init):
        taken = 0  # records in hand when wandb fails
        try:
            import wandb

            run = wandb.init(**init)
            while True:
                try:
                    kind, step, values = self._queue.get(timeout=0.1)
                except queue.Empty:
                    if self._closing.is_set():
                        break
                    continue
                taken = 1
                if kind == "image":
                    values = {name: wandb.Image(image) for name, image in values.items()}
                run.log(values, step=step)
                taken = 0
            run.finish()
        except Exception as error:  # whatever a service does, the training goes on
            self.error = error
            self.dropped += taken + self._queue.qsize()


class MultiWriter:
    """Several writers as one. Closing reaches all of them even if one fails."""

    def __init__(self, writers):
        self.writers = list(writers)

    def write(self, step, scalars):
        for writer in self.writers:
            writer.write(step, scalars)

    def measure(self, step, scalars):
        for writer in self.writers:
            writer.measure(step, scalars)

    def image(self, step, name, image):
        for writer in self.writers:
            writer.image(step, name, image)

    def truncate_after(self, step):
        for writer in self.writers:
            writer.truncate_after(step)

    def flush(self):
        for writer in self.writers:
            writer.flush()

    def close(self):
        with contextlib.ExitStack() as stack:
            for writer in self.writers:
                stack.callback(writer.close)


def for_run(workdir, train: settings.Train, config: dict) -> MultiWriter:
    """The writers that the settings ask for. `config`: the resolved tree, for services that show it.

    Raises:
      UserError: if one of them needs a package that is not installed.
    """
    writers: list[Writer] = [JsonlWriter(workdir)]
    if train.tensorboard:
        writers.append(TensorBoardWriter(workdir))
    if train.wandb:
        name = config.get("name", "")
        writers.append(WandbWriter(name=name, config=config, run_id=_run_id(workdir), workdir=workdir))
    return MultiWriter(writers)


def _run_id(workdir) -> str:
    """A random name that the workdir keeps, so that a resumed run goes on under the same one."""
    path = epath.Path(workdir) / "wandb_id"
    if not path.exists():
        atomic.write_text(path, secrets.token_hex(4))
    return path.read_text().strip()
