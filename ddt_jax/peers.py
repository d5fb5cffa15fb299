"""What becomes of a process when another one of its run is lost: one line, and a code of its own.

A process that dies closes its connections, upon which a collective of the others fails: an exception like any other.
One whose host is gone, or that is process 0 itself, is missed by JAX's coordination service instead, in a thread of C++
that ends the process by abort(): a page of stack trace, and the code of a crash. So JAX is given a callback to call
in place of that.
"""

import ctypes
import os
import sys
import threading
from contextlib import contextmanager
from typing import NoReturn

from ddt_jax.errors import Away

EXIT_ALONE = 76  # of every `Away`, too


class Missing(Away):
    """Others have not come."""


# Of those who say that a connection is gone, these speak of the other processes and not of a store of files.
_BETWEEN_PROCESSES = ("Gloo", "NCCL", "heartbeat", "coordination service", "CoordinationService")
_said = threading.Lock()  # held by the thread that ends the process


def has_joined() -> bool:
    """Whether this is one of the processes of a run that `hosts.join` has brought together."""
    jax = sys.modules.get("jax")  # which a verb that has not needed it has not imported
    return jax is not None and jax.distributed.is_initialized()


def is_lost(error: BaseException) -> bool:
    """Whether it says that another process of the run is gone, without which this one cannot go on."""
    if not has_joined() or not any(word in str(error) for word in _BETWEEN_PROCESSES):
        return False
    return sys.modules["jax"].process_count() > 1


def end_alone(reason: object) -> NoReturn:
    """Ends this process, once: two threads may notice a loss at the same moment."""
    if not _said.acquire(blocking=False):
        threading.Event().wait()
    sys.stdout.flush()
    print(
        "ddt-jax: another process of the run has ended, so this one cannot go on; start all of them again with the "
        f"same command ({(str(reason).splitlines() or ['lost'])[0]})",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_ALONE)  # the usual way out waits for the others


@contextmanager
def losses_end_us():
    """Inside, `jax.distributed.initialize` makes a client that ends the process by `end_alone`.

    JAX hands no callback on, so its client gets one here. jaxlib 0.10 cannot turn the reason into a Python object and
    throws std::bad_cast where it would call it, in a thread in which nobody catches that: what std::terminate does then
    is the callback, too.
    """
    from jax._src.lib import _jax

    make = getattr(_jax, "get_distributed_runtime_client", None)
    if make is None or "missed_heartbeat_callback" not in (make.__doc__ or ""):  # another JAX, which aborts
        yield
        return

    def lost(reason="JAX's coordination service has lost it"):
        end_alone(reason)

    def with_callback(*arguments, **named):
        return make(*arguments, **named, missed_heartbeat_callback=lost)

    _terminates(b"St8bad_cast", lost)
    _jax.get_distributed_runtime_client = with_callback
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make


_kept = []  # a callback of ctypes must live as long as C++ may call it


def _terminates(kind: bytes, call) -> None:
    """Has std::terminate call something for an exception of this (mangled) type; others end as before."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
    except OSError:  # another C++ library than that of jaxlib for Linux
        return
    library.__cxa_current_exception_type.restype = ctypes.c_void_p
    set_terminate = library._ZSt13set_terminatePFvvE
    set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    @ctypes.CFUNCTYPE(None)
    def terminate():
        thrown = library.__cxa_current_exception_type()  # a std::type_info: a table of functions, then the name
        if thrown and ctypes.c_char_p.from_address(thrown + ctypes.sizeof(ctypes.c_void_p)).value == kind:
            call()
        ctypes.CFUNCTYPE(None)(before)()

    _kept.append(terminate)
    before = set_terminate(ctypes.cast(terminate, ctypes.c_void_p))
