"""A source that returns errors for a while is asked again. What errors pass, how long is waited, and who is told: here.

Network file systems and object stores fail for seconds to minutes and come back. Each source hands every read of its
files to its `Patience`; nothing else waits or decides. The order of the data does not depend on it: a read that has
come back gives what it would have given at once, and waiting draws no number that a row is made of.
"""

import errno
import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from ddt_jax.data.base import BadRecord
from ddt_jax.errors import Away

FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds; doubled from one to the other
PATIENT_TRIES = 5  # from here on, after 2 to 3 seconds, an outage is told by itself

# Systems know different ones of these. That a file is missing, or may not be read, does not pass.
_NAMES = ("EIO", "EREMOTEIO", "EAGAIN", "EBUSY", "EINTR", "ENFILE", "ETIMEDOUT", "ESTALE", "ENOTCONN", "EPIPE")
_NAMES += ("ESHUTDOWN", "ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "ENETDOWN", "ENETUNREACH", "ENETRESET")
_NAMES += ("EHOSTDOWN", "EHOSTUNREACH")
_PASSING = {getattr(errno, name) for name in _NAMES if hasattr(errno, name)}
_STORES = ("aiohttp.", "azure.", "botocore.", "gcsfs.", "google.api_core.", "google.auth.", "requests.", "urllib3.")

log = logging.getLogger("ddt_jax.data")
T = TypeVar("T")


def is_passing(error: Exception) -> bool:
    """Whether the same read may succeed a little later: the way to the data failed, not the data.

    Libraries in C++ (ArrayRecord's) raise RuntimeError with the system's words; clients of object stores raise errors
    of their own, which are no OSError.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if type(error) is RuntimeError:
        return says_passing(str(error))
    return f"{type(error).__module__}.".startswith(_STORES) and "Credential" not in type(error).__name__


def says_passing(text: str) -> bool:
    """Whether a text quotes the system's words for an error that passes."""
    return any(os.strerror(number) in text for number in _PASSING)


class Patience:
    """Of one source. Picklable; each process counts for itself.

    Args:
      name: of the source, for messages.
      seconds: for how long a read is tried again (`data.retry_seconds`); 0: never.

    Attributes:
      retries: how many times something was read again.
    """

    def __init__(self, name: str, seconds: float):
        self.name, self.seconds = name, seconds
        self.retries = 0
        self._gave_up = False  # and nothing has been read since

    def __reduce__(self):
        return (Patience, (self.name, self.seconds))

    def opening(self, read: Callable[[], T]) -> T:
        """The result of `read`, which must be there before a run begins.

        Raises:
          Away: it has failed in a way that passes until there was no time left. What else it raises, at once.
        """
        try:
            return self._again(read, self.name)
        except _NoTimeLeft as error:
            raise self._dead(self.name, error) from None

    def record(self, read: Callable[[], T], where: str) -> T:
        """The result of `read`, which belongs to one record.

        Args:
          where: the record, for messages.

        Raises:
          BadRecord: it has failed in a way that passes until there was no time left.
          Away: the same for the second time, and nothing of this source was read in between: it is not the record.
            What else `read` raises, at once.
        """
        try:
            value = self._again(read, where)
        except _NoTimeLeft as error:
            if self._gave_up and self.seconds:
                raise self._dead(where, error) from None
            self._gave_up = True
            raise BadRecord(f"{error}, again and again for {self.seconds:g} s") from None
        self._gave_up = False
        return value

    def _again(self, read, where):
        begun, tries = None, 0
        while True:
            try:
                value = read()
                break
            except Exception as error:
                if not is_passing(error):
                    raise
                now = time.monotonic()
                begun = now if begun is None else begun
                left, why = begun + self.seconds - now, _reason(error)
                if left <= 0:
                    raise _NoTimeLeft(why) from None
            tries += 1
            self._tell(where, why, tries, left)
            time.sleep(min(left, wait(tries)))
        if tries >= PATIENT_TRIES:
            log.warning("data: %s is read again after %.0f s", where, time.monotonic() - begun)
        return value

    def _tell(self, where, why, tries, left):
        """The first, tenth, hundredth, ... retry of this process, and those that take long."""
        self.retries += 1
        if str(self.retries).rstrip("0") == "1":
            log.warning("data: %s: %s; read again (so far %s times)", where, why, f"{self.retries:,}")
        if tries == PATIENT_TRIES:
            log.warning("data: %s: %s; tried again for %.0f s more", where, why, left)

    def _dead(self, where, error):
        return Away(
            f"data: {self.name} gives errors only, for {self.seconds:g} s now (data.retry_seconds), the last at "
            f"{where}: {error}; start the run again when it is back"
        )


class _NoTimeLeft(Exception):  # noqa: N818  becomes a BadRecord or an Away
    """The text is the last reason."""


def wait(tries: int) -> float:
    """Seconds before another try: doubled each time up to a limit, of which a random half is left out, so that hosts
    which lost a store together do not come back to it together. Not drawn from the run's seed.
    """
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(tries - 1, 30)) * random.uniform(0.5, 1.0)


def _reason(error) -> str:
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0][:200]
