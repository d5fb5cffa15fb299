"""What has been saved is read again, while the run goes on, before it counts.

A thread of each process waits until a checkpoint is committed, reads the parts of the arrays that this process wrote,
and takes the hashes of its share of the files. Sums of parts only add (`training/checksum.py`), so process 0 needs
nothing but the small files in which the others leave theirs: no message between hosts and no device. If the sum is
that of the live arrays, process 0 writes the list of files, and older checkpoints may go.
"""

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from ddt_jax.io import atomic
from ddt_jax.training.checksum import as_hex
from ddt_jax.training.stored import READ_BACK, Damaged, Stored

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class _Job:
    stored: Stored
    checksums: dict[str, str]
    parts: dict[str, list[tuple[slice, ...]]]


def own_parts(state) -> dict[str, list[tuple[slice, ...]]]:
    """The blocks of each array that this process writes: of every part that several devices hold, the first copy."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, jax.Array):
            wheres = [shard.index for shard in leaf.addressable_shards if shard.replica_id == 0]
        else:
            wheres = [(slice(None),) * np.ndim(leaf)] if jax.process_index() == 0 else []
        bounds = [[slice(*s.indices(n)[:2]) for s, n in zip(where, np.shape(leaf), strict=True)] for where in wheres]
        found[name] = [tuple(b) for b in bounds]
    return found


class ReadBack:
    """Reads checkpoints back in the background.

    Args:
      committed: (folder) → whether a checkpoint is there as a whole.
      done: called in the thread of process 0 with the folder of a checkpoint that is as it was saved.
      index, count: which process this is, and how many there are.
    """

    def __init__(self, committed: Callable[..., bool], done: Callable[..., None], index: int, count: int):
        self._committed, self._done = committed, done
        self._index, self._count = index, count
        self._jobs: queue.Queue = queue.Queue()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = None

    def expect(self, folder, checksums: dict[str, str], parts: dict) -> None:
        """A checkpoint will be, or is, in `folder`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="checkpoint-read-back", daemon=True)
            self._thread.start()
        self._jobs.put(_Job(Stored(folder), checksums, parts))

    @property
    def pending(self) -> int:
        return self._jobs.unfinished_tasks

    def check(self) -> None:
        """Raises Damaged, or OSError, if a checkpoint was not as it was saved or could not be read; once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Blocks until all that is expected is read, or something was wrong. Raises as `check`."""
        while self.pending and self._error is None:
            self._stop.wait(_POLL_SECONDS)
        self.check()

    def close(self) -> None:
        """Ends the thread; what it has not read stays unread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _serve(self):
        while not self._stop.is_set():
            try:
                job = self._jobs.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            try:
                if self._await(lambda job=job: self._committed(job.stored.folder)):
                    self._read(job)
            except Exception as error:  # surfaces in the run's own thread, whatever it was
                self._error = error
            finally:
                self._jobs.task_done()

    def _await(self, reached) -> bool:
        while not reached():
            if self._stop.wait(_POLL_SECONDS):
                return False
        return True

    def _read(self, job):
        index, count = self._index, self._count
        stored, step = job.stored, job.stored.folder.name
        mine = {
            "sums": {name: sums.tolist() for name, sums in job.stored.sums_of(job.parts).items()},
            "files": stored.hashes(index, count),
        }
        names = [stored.folder / f"{READ_BACK}{i}.json" for i in range(count)]
        if count > 1:
            atomic.write_text(names[index], json.dumps(mine))
        if index:
            return
        if count > 1:
            if not self._await(lambda: all(path.exists() for path in names)):
                return
            found = [json.loads(path.read_text()) for path in names]
        else:
            found = [mine]
        wrong = [
            name
            for name, saved in job.checksums.items()
            if as_hex(np.sum([np.array(f["sums"][name], np.uint32) for f in found], 0, np.uint32)) != saved
        ]
        if wrong:
            raise Damaged(f"step {step}: {len(wrong)} arrays do not read back as they were saved (first: {wrong[0]})")
        stored.write_list({name: entry for f in found for name, entry in f["files"].items()})
        if count > 1:
            for path in names:
                path.unlink()
        self._done(stored.folder)
