"""Checkpoints: the whole state, its checksums and the run's config, saved as one object in the background.

Orbax writes and commits them; what is ours is trust. Orbax restores flipped bits without an error and takes any
directory with a number for a name to be a checkpoint. So what was written is read back before it counts
(`training/readback.py`), and a restore looks at the hashes of the files, computes the checksums of what arrived, and
goes back to the newest checkpoint that is what was saved.
"""

import errno
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ddt_jax import peers, settings
from ddt_jax.errors import Away, UserError
from ddt_jax.io import atomic, json_object
from ddt_jax.training import offload
from ddt_jax.training.checksum import checksums
from ddt_jax.training.readback import ReadBack, own_parts
from ddt_jax.training.retention import superfluous
from ddt_jax.training.state import TrainState
from ddt_jax.training.stored import READ_BACK, Damaged, Stored, is_there, patiently

FORMAT = 1
_UNFINISHED = ".orbax-checkpoint-tmp"  # part of the name of a checkpoint that is being written, or removed
_AHEAD = 2  # checkpoints that may wait to be read back; then saving waits
# What the user must mend before a save can succeed; other errors of storage are taken for an outage.
_NAMES = ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG")
_TO_MEND = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}


class Checkpoints:
    """The checkpoints of one run, in WORKDIR/checkpoints/STEP.

    Args:
      workdir: directory of the run; any path that etils.epath knows.
      train: which to keep.
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
        self._directory = checkpoints_folder(workdir)
        self._train = train or settings.Train()
        self._failed = self._abandoned = False
        self._metrics: dict[int, float | None] = {}
        self._read_back = ReadBack(is_committed, self._settle, jax.process_index(), jax.process_count())
        self._quiet = ExitStack()  # a save that fails does so in the background, at any moment
        if not read_only:
            self._clean_up()
        with _quiet_orbax(), self._storage_errors():
            # Orbax would remove old checkpoints as soon as a new one is written; here it must be read back first.
            options = ocp.CheckpointManagerOptions(
                enable_async_checkpointing=not read_only, create=not read_only, read_only=read_only
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        if not read_only:
            self._quiet.enter_context(_quiet_orbax())

    def save(self, state: TrainState, config: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts to save a state; errors of an earlier save that failed in the background surface here.

        Args:
          metrics: figures of the log at this step, by which the best checkpoints are kept.

        Raises:
          UserError: if the directory may not be written or the disk is full; an Away, if the storage fails otherwise.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        while self._read_back.pending >= _AHEAD:
            self.check()
            time.sleep(0.05)
        self.check()
        sums = checksums(state)
        meta = {"format": FORMAT, "step": step, "checksums": sums, "metrics": metrics or {}, "config": config}
        with self._storage_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(offload.apart(state)), meta=ocp.args.JsonSave(meta)
                ),
            )
        self._read_back.expect(self._directory / str(step), sums, own_parts(state))

    def check(self) -> None:
        """Raises UserError if a save, or reading it back, has failed in the background. Cheap: for every step."""
        with self._storage_errors():
            self._manager.check_for_errors()
            self._read_back.check()

    def wait(self) -> None:
        """Blocks until nothing is being written, and all that was is read back. Raises UserError as `save`."""
        with self._storage_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            if not self._failed:  # else there may be nothing to read back
                self._read_back.wait()

    def abandon(self) -> None:
        """Another process is gone: what is being saved never will be, and `close` waits for nothing."""
        self._abandoned = True

    def close(self) -> None:
        with self._quiet:
            if self._abandoned:
                self._read_back.close()
                return
            try:
                self.wait()
            finally:
                self._read_back.close()
                with self._storage_errors():
                    self._manager.close()

    def steps(self) -> list[int]:
        return _steps(self._directory)

    def restore(self, abstract: TrainState, at_most: int | None = None, *, partial: bool = False) -> TrainState | None:
        """The newest state that verifies, laid out as `abstract` says; None if there is no checkpoint at all.

        Checkpoints newer than the one that verifies are put aside, as STEP.bad, so that the run can save that step
        again.

        Args:
          at_most: the newest step to look at.
          partial: fields that are None in `abstract` are not read. For checkpoints that are `read_only`.

        Raises:
          UserError: if there are checkpoints and none of them verifies.
          Away: if the storage stays away, which says nothing about a checkpoint.
        """
        bad = []
        for step in reversed([s for s in self.steps() if at_most is None or s <= at_most]):
            problem = self._agree(self._file_problem(step))
            if problem is None:
                state, problem = self._verified(step, abstract, partial)
                problem = self._agree(problem)
            if problem is None:
                if not self._read_only:
                    for s in bad:
                        self._put_aside(s)
                    self._read_back_now(step, state)
                return state
            bad.append(step)
            self._note(f"checkpoint: step {step} passed over: {problem}"[:400])
        if bad:
            raise UserError(
                f"checkpoint: none of the {len(bad)} checkpoints in {self._directory} verifies (steps {sorted(bad)}); "
                "restore them from a copy, or use another --workdir"
            )
        return None

    def _file_problem(self, step) -> str | None:
        """What is wrong with this process's share of the files. First of all: nothing may parse a damaged file."""
        stored = Stored(self._directory / str(step))
        try:
            if stored.is_read_back:
                return stored.file_problem(jax.process_index(), jax.process_count())
        except Damaged as error:
            self._note(f"checkpoint: step {step}: {error}; its arrays decide")
        return None  # killed before it was read back: its arrays decide

    def _verified(self, step, abstract, partial):
        """(state, None), or (None, what is wrong)."""
        try:
            meta = Stored(self._directory / str(step)).meta()
            if meta["format"] != FORMAT:
                return None, f"format {meta['format']}, this version reads {FORMAT}"
            saved = meta["checksums"]
            saved = _of_fields(saved, abstract) if partial else saved
            # Orbax has processes wait for each other: one alone may not read again.
            seconds = {} if jax.process_count() == 1 else {"seconds": 0.0}
            with _quiet_orbax():
                state = patiently(lambda: self._read(step, abstract, partial), self._directory / str(step), **seconds)
            problem = _difference(saved, checksums(state))
            if problem is None and int(state.step) != step:
                problem = f"holds step {int(state.step)}"
        except Damaged as error:
            state, problem = None, str(error)
        except Away:
            raise
        except Exception as error:  # anything a damaged directory can cause in the layers below
            state = None
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        return (state, None) if problem is None else (None, problem)

    def _read(self, step, abstract, partial):
        if partial:
            return _read_part(self._directory / str(step) / "state", abstract)
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]

    def _agree(self, problem: str | None) -> str | None:
        """A problem of any process is one for all of them."""
        if jax.process_count() == 1:
            return problem
        from jax.experimental import multihost_utils

        bad = multihost_utils.process_allgather(np.int32(problem is not None))
        return problem or (f"process {int(np.argmax(bad))} found it damaged" if bad.any() else None)

    def _read_back_now(self, step, state):
        """Reads back what a killed process could not, so that it counts."""
        stored = Stored(self._directory / str(step))
        if not self._agree("missing" if not stored.is_read_back else None):
            return
        self._read_back.expect(stored.folder, stored.meta()["checksums"], own_parts(state))

    def _settle(self, folder):
        """A checkpoint has been read back, so others may go. In the thread of process 0."""
        wanted, metrics = self._train.best_metric, {}
        if self._train.keep_best:
            for step in self.steps():
                if step not in self._metrics:
                    try:
                        self._metrics[step] = Stored(self._directory / str(step)).meta().get("metrics", {}).get(wanted)
                    except Damaged:
                        self._metrics[step] = None
            metrics = self._metrics
        for step in superfluous(self.steps(), int(folder.name), self._train, metrics):
            path = self._directory / str(step)
            if atomic.is_local(path):  # in one move: a kill must not leave a part of a checkpoint behind
                path = path.rename(self._directory / f"{step}{_UNFINISHED}-removed")
            path.rmtree()

    def _clean_up(self):
        """Removes what a killed process left half written, half removed or half read back."""
        if jax.process_index() == 0 and self._directory.exists():
            for path in self._directory.iterdir():
                if _UNFINISHED in path.name:
                    path.rmtree()
                elif path.name.isdigit():
                    for left in path.glob(f"{READ_BACK}*.json"):
                        left.unlink()

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

    @contextmanager
    def _storage_errors(self):
        try:
            yield
        except Away:  # of what reads it back
            self._failed = True
            raise
        except (OSError, ValueError, Damaged) as error:
            self._failed = True
            if peers.is_lost(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            what = "is damaged" if isinstance(error, Damaged) else f"cannot be written to {self._directory}"
            line = f"checkpoint: {what}: {reason}; earlier checkpoints are unharmed"
            if isinstance(error, Damaged) or _is_to_mend(error):
                raise UserError(line) from error
            raise Away(f"{line}, start the same command again when the storage is back") from error


def checkpoints_folder(workdir) -> epath.Path:
    """Where the checkpoints of a run are. Raises nothing: it may not be there."""
    folder = epath.Path(workdir) / "checkpoints"
    return folder.resolve() if atomic.is_local(folder) else folder  # Orbax refuses relative paths


def _is_to_mend(error: Exception) -> bool:
    """Whether a save has failed for a reason that somebody must remove; TensorStore only quotes the system."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TO_MEND
    text = str(error).replace("_", " ").lower()  # PERMISSION_DENIED
    return "forbidden" in text or any(os.strerror(number).lower() in text for number in _TO_MEND)


def is_committed(folder) -> bool:
    """Whether a checkpoint is there as a whole: renamed into its place, or marked so where nothing can be renamed."""
    return is_there(folder) if atomic.is_local(folder) else (folder / "commit_success.txt").exists()


def saved_config(workdir, setting: str = "workdir") -> dict:
    """The config tree that a run was started with.

    Args:
      setting: what the user calls this directory.

    Raises:
      UserError: if there is no run in that directory, or its config is damaged; an Away, if the storage stays away.
    """
    path = epath.Path(workdir) / "config.json"
    if not is_there(path):
        raise UserError(f"{setting}: {workdir} holds no run (no config.json); give the --workdir of `ddt-jax train`")
    try:
        tree = json_object.loads(patiently(path.read_text, path))
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}: {path} is damaged ({error}); put it back from a copy") from error
    if isinstance(mesh := tree.get("mesh"), dict):
        mesh.pop("sequence", None)  # of an earlier version: an axis over which nothing lay
    return tree


def saved_steps(workdir) -> list[int]:
    """Steps of the checkpoints that a run has, oldest first."""
    return _steps(checkpoints_folder(workdir))


def _steps(folder):
    if not is_there(folder):
        return []
    paths = patiently(lambda: list(folder.iterdir()), folder)
    return sorted(int(path.name) for path in paths if path.name.isdigit() and is_committed(path))


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


def _of_fields(sums: dict, state: TrainState) -> dict:
    """The checksums of the fields that a state has."""
    return {name: value for name, value in sums.items() if getattr(state, name.partition("/")[0], None) is not None}


def _read_part(folder, abstract: TrainState) -> TrainState:
    """The fields of an abstract state that are not None; what else the checkpoint holds is not read."""
    wanted = {name: value for name, value in vars(abstract).items() if value is not None}
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
        return abstract.replace(**reader.restore(folder, args))


def _difference(saved: dict, found: dict) -> str | None:
    if saved.keys() != found.keys():
        names = sorted(saved.keys() ^ found.keys())
        return f"holds other arrays than this run ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    wrong = [name for name in saved if saved[name] != found[name]]
    return f"{len(wrong)} arrays are not what was saved (first: {wrong[0]})" if wrong else None


@contextmanager
def _quiet_orbax():
    """Orbax and what reads and writes for it say at length what has failed; it reaches us too, and is one line here."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def without_writes(said):
        # Writes that end after the first has failed find nobody waiting for them, each with a traceback of its own.
        if not (said.exc_type is RuntimeError and str(said.exc_value) == "Event loop is closed"):
            hook(said)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = without_writes
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook
