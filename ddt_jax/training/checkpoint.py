"""Checkpoints: the whole state, its checksums and the run's config, saved as one object in the background.

Orbax writes and commits them; what is ours is trust. Orbax restores flipped bits without an error and takes any
directory with a number for a name to be a checkpoint, so a restore computes the checksums of what arrived and goes
back to the newest checkpoint whose arrays are those that were saved.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import contextmanager

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.training.checksum import checksums
from ddt_jax.training.state import TrainState

FORMAT = 1
_UNFINISHED = ".orbax-checkpoint-tmp"  # part of the name of a checkpoint that is being written


class Checkpoints:
    """The checkpoints of one run, in WORKDIR/checkpoints/STEP.

    Args:
      workdir: directory of the run; any path that etils.epath knows.
      train: how many to keep.
      note: receives one line about each checkpoint that had to be passed over.
      read_only: nothing in the directory is changed, damaged checkpoints are only passed over.
    """

    def __init__(
        self,
        workdir,
        train: settings.Train | None = None,
        note: Callable[[str], None] = lambda line: None,
        *,
        read_only: bool = False,
    ):
        self._note = note
        self._read_only = read_only
        self._directory = epath.Path(workdir) / "checkpoints"
        if "://" not in str(workdir):
            self._directory = self._directory.resolve()  # Orbax refuses relative paths
        train = train or settings.Train()
        if not read_only:
            self._clean_up()
        keep = {} if read_only else {"max_to_keep": train.keep_checkpoints, "keep_period": train.keep_every or None}
        with _quiet_orbax(), _storage_errors(self._directory):
            options = ocp.CheckpointManagerOptions(
                enable_async_checkpointing=not read_only, create=not read_only, read_only=read_only, **keep
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, state: TrainState, config: dict) -> None:
        """Starts to save a state; errors of an earlier save that failed in the background surface here.

        Raises:
          UserError: if the directory cannot be written or the disk is full.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        meta = {"format": FORMAT, "step": step, "checksums": checksums(state), "config": config}
        with _storage_errors(self._directory):
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            )

    def wait(self) -> None:
        """Blocks until nothing is being written. Raises UserError as `save`."""
        with _storage_errors(self._directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest state that verifies, laid out as `abstract` says; None if there is no checkpoint at all.

        Checkpoints newer than the one that verifies are put aside, as STEP.bad, so that the run can save that step
        again.

        Raises:
          UserError: if there are checkpoints and none of them verifies.
        """
        bad = []
        for step in reversed(self.steps()):
            try:
                state, meta = self._read(step, abstract)
                problem = _difference(meta["checksums"], checksums(state))
            except Exception as error:  # anything a damaged directory can cause in the layers below
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            if problem is None:
                for s in () if self._read_only else bad:
                    self._put_aside(s)
                return state
            bad.append(step)
            self._note(f"checkpoint: step {step} passed over: {problem}"[:400])
        if bad:
            raise UserError(
                f"checkpoint: none of the {len(bad)} checkpoints in {self._directory} verifies (steps {sorted(bad)}); "
                "restore them from a copy, or use another --workdir"
            )
        return None

    def _read(self, step, abstract):
        with _quiet_orbax():
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))[
                "state"
            ]
        return state, meta

    def _clean_up(self):
        """Removes what a killed process left half written."""
        if jax.process_index() == 0 and self._directory.exists():
            for path in self._directory.iterdir():
                if _UNFINISHED in path.name:
                    path.rmtree()

    def _put_aside(self, step):
        path = self._directory / str(step)
        if jax.process_index() == 0 and path.exists():
            target = self._directory / f"{step}.bad"
            if target.exists():
                target.rmtree()
            path.rename(target)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"put aside {step}")
        self._manager.reload()


def saved_config(workdir, setting: str = "workdir") -> dict:
    """The config tree that a run was started with.

    Args:
      setting: what the user calls this directory.

    Raises:
      UserError: if there is no run in that directory.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{setting}: {workdir} holds no run (no config.json); give the --workdir of `ddt-jax train`")
    return json.loads(path.read_text())


def saved_steps(workdir) -> list[int]:
    """Steps of the checkpoints that a run has, oldest first."""
    if not (epath.Path(workdir) / "checkpoints").exists():
        return []
    points = Checkpoints(workdir, read_only=True)
    steps = points.steps()
    points.close()
    return steps


def digest(state) -> str:
    """SHA-256 over the arrays of a tree (a TrainState): names, types, shapes and bytes, in the order of paths."""
    sha = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for name, leaf in sorted((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves):
        array = np.ascontiguousarray(_whole(leaf))
        sha.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _whole(leaf):
    """An array of any sharding on the host; one that is spread over processes is gathered by all of them."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(leaf)


def _difference(saved: dict, found: dict) -> str | None:
    if saved.keys() != found.keys():
        names = sorted(saved.keys() ^ found.keys())
        return f"holds other arrays than this run ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    wrong = [name for name in saved if saved[name] != found[name]]
    return f"{len(wrong)} arrays are not what was saved (first: {wrong[0]})" if wrong else None


@contextmanager
def _storage_errors(directory):
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"checkpoint: cannot write to {directory}: {reason}; earlier checkpoints are unharmed"
        ) from error


@contextmanager
def _quiet_orbax():
    """Orbax and its reader warn about a damaged directory at length; we say it in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
