"""A sign of life of each process, written beside the run and never in its way."""

import datetime
import os
import threading
import time
from types import SimpleNamespace

import jax

from ddt_jax.io import atomic
from ddt_jax.training import heartbeat
from ddt_jax.training.heartbeat import Heartbeat
from ddt_jax.training.progress import Progress


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_beats_say_who_does_what_and_the_last_one_that_it_ended(tmp_path):
    progress, other = Progress(100, 7, stream=None), tmp_path / heartbeat.FOLDER / "2.json"
    atomic.write_text(other, "{}")  # of a try with three processes
    with Heartbeat(tmp_path, progress, process=0, processes=2, seconds=0.02):
        until(lambda: heartbeat.read(tmp_path))
        assert not other.exists()
        (beat,) = heartbeat.read(tmp_path)
        assert (beat["process"], beat["pid"], beat["step"], beat["phase"]) == (0, os.getpid(), 7, "training")
        when = datetime.datetime.fromisoformat(beat["time"])
        assert abs((datetime.datetime.now(datetime.UTC) - when).total_seconds()) < 10
        assert 10 << 20 < beat["peak_host_bytes"] < 1 << 40
        with progress.phase("evaluating"):
            progress.update(9)
            until(lambda: heartbeat.read(tmp_path)[0]["phase"] == "evaluating")
            assert heartbeat.read(tmp_path)[0]["step"] == 9
    assert heartbeat.read(tmp_path)[0]["phase"] == "ended"


def test_a_storage_that_fails_or_hangs_costs_beats_only(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    beats, hung = [], threading.Event()
    monkeypatch.setattr(atomic, "write_text", full)
    with Heartbeat(tmp_path, Progress(1, stream=None), also=lambda: beats.append(1), seconds=0.01):
        until(lambda: len(beats) > 3)

    monkeypatch.setattr(atomic, "write_text", lambda *_: hung.wait(30))
    begun = time.monotonic()
    with Heartbeat(tmp_path, Progress(1, stream=None), seconds=0.05):
        pass
    assert time.monotonic() - begun < 5
    hung.set()


def test_an_object_store_is_asked_less_often():
    local, remote = (
        Heartbeat(f"{where}/run", Progress(1, stream=None), process=1) for where in ("/tmp", "gs://bucket")
    )
    assert remote._seconds > local._seconds


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    stats = [{"peak_bytes_in_use": 5, "bytes_in_use": 9}, {"peak_bytes_in_use": 7}, {}, None]
    devices = [SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert heartbeat.peak_memory()["peak_device_bytes"] == 7
    monkeypatch.setattr(jax, "local_devices", lambda: devices[3:])  # CPUs do not say it
    assert set(heartbeat.peak_memory()) == {"peak_host_bytes"}
