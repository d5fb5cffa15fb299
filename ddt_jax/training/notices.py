"""Notices of a cloud that this machine will be taken away, for clouds that say so before, or instead of, a signal.

Google's machines, those of GKE and TPU slices included, keep them in a metadata server: `instance/preempted` becomes
TRUE, `instance/maintenance-event` TERMINATE_ON_HOST_MAINTENANCE (or, where the machine moves without being stopped,
MIGRATE_ON_HOST_MAINTENANCE, which is no reason to end): https://cloud.google.com/compute/docs/metadata/. What comes of
a notice is what comes of SIGTERM: the run saves, and all its hosts leave after the same step.
"""

import http.client
import threading
from collections.abc import Callable
from contextlib import contextmanager

from ddt_jax.io import metadata

_LEAVE = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_EVERY = 5.0  # seconds between two looks; a preempted machine has 30 left
_UNHEARD = 60  # looks in a row without an answer after which that is told, once


class Notices:
    """Asks in a thread of its own, so that a server that does not answer costs nothing.

    Args:
      get: name → value, raises OSError or HTTPException.
      every: seconds between two looks.
    """

    def __init__(self, get: Callable[[str], str] = metadata.fetch, every: float = _EVERY):
        self._get, self._every = get, every

    @contextmanager
    def listening(self, asked: threading.Event, note: Callable[[str], None]):
        """Sets `asked` at the first notice, and tells why."""
        over = threading.Event()
        thread = threading.Thread(target=self._serve, args=(asked, note, over), name="maintenance-notices", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(2 * len(_LEAVE) * metadata.TIMEOUT)

    def _serve(self, asked, note, over):
        unheard = 0
        while not over.is_set():
            try:
                found = next((f"{name}={value}" for name, value in _LEAVE.items() if self._get(name) == value), None)
                unheard = 0
            except (OSError, http.client.HTTPException) as error:
                found, unheard = None, unheard + 1
                if unheard == _UNHEARD:
                    note(f"train.maintenance: nobody answers at {metadata.SERVER} ({error}); still asking")
            if found:
                note(f"{found}: this machine will be taken away; saving after this step")
                asked.set()
                return
            over.wait(self._every)
