"""Loss and gradient norm of every step, bit by bit: WORKDIR/steps.f32, what `ddt-jax replay` holds a step against.

The log proper has means over `train.log_every` steps. Here step N has the 8 bytes from 8 (N - 1) on: two float32,
little-endian. A step is written again when a run goes on from a checkpoint before it; nothing needs to be cut back.
"""

import numpy as np
from etils import epath

from ddt_jax.io import atomic

FILE = "steps.f32"
FIGURES = ("loss", "grad_norm")
_TYPE = np.dtype("<f4")
_SIZE = len(FIGURES) * _TYPE.itemsize


class StepLog:
    """Written by process 0. On an object store, which cannot append, the file is written again now and then: every
    `remote_every` steps, and by `flush`.
    """

    def __init__(self, workdir, *, remote_every: int = 500):
        self._path = epath.Path(workdir) / FILE
        self._remote_every = remote_every
        self._unsaved = 0
        if atomic.is_local(self._path):
            self._path.touch()
            # Unbuffered: a checkpoint must not be ahead of it when the process is killed.
            self._file = open(self._path, "r+b", buffering=0)  # noqa: SIM115 - held open for the run
        else:
            self._file, self._whole = None, bytearray(self._path.read_bytes() if self._path.exists() else b"")

    def put(self, step: int, figures: dict) -> None:
        """Keeps what a step has given. figures: name → float, FIGURES among them. Raises UserError if it cannot."""
        data, at = np.array([figures[name] for name in FIGURES], _TYPE).tobytes(), _SIZE * (step - 1)
        if self._file is not None:
            self._file.seek(at)
            atomic.write_through(self._file, data)
            return
        self._whole.extend(bytes(max(0, at + _SIZE - len(self._whole))))
        self._whole[at : at + _SIZE] = data
        self._unsaved += 1
        if self._unsaved >= self._remote_every:
            self._save()

    def flush(self) -> None:
        """Before a checkpoint, behind which the run goes on after a kill: all that was put is in the file."""
        if self._unsaved:
            self._save()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self.flush()

    def _save(self):
        atomic.write_bytes(self._path, bytes(self._whole))
        self._unsaved = 0


def read(workdir, first: int, last: int) -> np.ndarray:
    """float32 [last - first + 1, 2], FIGURES of the steps first to last; 0, 0 where a step was never logged."""
    path = epath.Path(workdir) / FILE
    data = path.read_bytes()[: _SIZE * last] if path.exists() else b""
    data = data[: len(data) // _SIZE * _SIZE].ljust(_SIZE * last, b"\0")
    return np.frombuffer(data, _TYPE).reshape(-1, len(FIGURES))[first - 1 :]
