"""Batches of skipped steps, kept to be looked at and replayed: WORKDIR/bad_batches/step_STEP.HOST.safetensors."""

import jax
from etils import epath

from ddt_jax.errors import UserError
from ddt_jax.io import safetensors_file

MOST = 16  # files of a host; a run in which everything is bad must not fill the disk
_FOLDER = "bad_batches"


class BadBatches:
    """Keeps the rows of this host.

    Args:
      seed: of the run; with the step it says which rows these are.
    """

    def __init__(self, workdir, seed: int):
        self._folder = epath.Path(workdir) / _FOLDER
        self._seed = seed

    def keep(self, step: int, batch: dict) -> str:
        """Writes the batch of a step, and says how to find it again. Never fails: the run goes on without the file."""
        which = f"its batch: seed {self._seed}, step {step}"
        try:
            host = f".{jax.process_index()}.safetensors"
            kept = [p.name for p in self._folder.iterdir() if p.name.endswith(host)] if self._folder.exists() else []
            path = _path(self._folder, step)
            if path.name not in kept and len(kept) >= MOST:
                return which
            safetensors_file.save(path, batch, {"seed": str(self._seed), "step": str(step)})
        except (OSError, UserError, KeyError) as error:  # KeyError: a type that the format has no name for
            return f"{which} (not kept: {error})"
        return f"{which}, kept in {path}"


def kept(workdir, step: int) -> dict | None:
    """This host's rows of the batch of a skipped step; None if they were not kept. Raises UserError if damaged."""
    path = _path(epath.Path(workdir) / _FOLDER, step)
    return safetensors_file.load(path) if path.exists() else None


def _path(folder, step):
    return folder / f"step_{step:08d}.{jax.process_index()}.safetensors"
