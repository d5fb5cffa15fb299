"""A notice that the machine will be taken away has the run save and leave, as SIGTERM does."""

import os
import signal
import threading
import time

import pytest

from ddt_jax.training import loop
from ddt_jax.training.notices import Notices


def answers(*rounds):
    """(preempted, maintenance-event) of each look in turn, the last again and again; an exception is raised."""
    looks = []

    def get(name):
        if name == "preempted":
            looks.append(name)
        found = rounds[min(len(looks), len(rounds)) - 1]
        if isinstance(found, Exception):
            raise found
        return found[("preempted", "maintenance-event").index(name)]

    return get, looks


NO = ("FALSE", "NONE")


@pytest.mark.parametrize(
    ("notice", "why"),
    [
        (("TRUE", "NONE"), "preempted=TRUE"),
        (("FALSE", "TERMINATE_ON_HOST_MAINTENANCE"), "maintenance-event=TERMINATE_ON_HOST_MAINTENANCE"),
    ],
)
def test_a_notice_asks_the_run_to_stop_and_says_why(notice, why):
    said, asked = [], threading.Event()
    get, looks = answers(NO, OSError("unreachable"), NO, notice)
    with Notices(get, every=0.001).listening(asked, said.append):
        assert asked.wait(5)
    assert said == [f"{why}: this machine will be taken away; saving after this step"] and len(looks) == 4


def test_what_is_no_reason_to_leave_is_none():
    said, asked = [], threading.Event()
    get, looks = answers(NO, ("FALSE", "MIGRATE_ON_HOST_MAINTENANCE"))
    with Notices(get, every=0.001).listening(asked, said.append):
        while len(looks) < 20:
            time.sleep(0.001)
    assert not asked.is_set() and said == []
    assert not [t for t in threading.enumerate() if t.name == "maintenance-notices"]


def test_a_server_that_never_answers_is_told_once_and_stops_nothing():
    said, asked = [], threading.Event()
    get, looks = answers(OSError("no such host"))
    with Notices(get, every=0.0001).listening(asked, said.append):
        while len(looks) < 150:
            time.sleep(0.001)
    assert not asked.is_set() and len(said) == 1 and "nobody answers" in said[0] and "no such host" in said[0]


def test_a_signal_after_a_notice_does_not_end_the_process_at_once(monkeypatch):
    raised, stop = [], loop.StopRequest()
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    with stop.listening(lambda line: None):
        stop.event.set()  # as a notice does
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == [] and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == [signal.SIGTERM]
