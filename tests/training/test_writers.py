import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from PIL import Image

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.training import writers


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_is_on_disk_before_the_next_and_holds_plain_values(tmp_path):
    writer = writers.JsonlWriter(tmp_path)
    writer.write(1, {"loss": np.float32(0.5), "codes": np.int64(3)})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5, "codes": 3}\n'
    writer.write(np.int32(2), {"loss": np.array(0.25)})
    assert _lines(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": 0.25}
    writer.close()


def test_non_finite_values_stay_valid_json_and_read_back(tmp_path):
    writer = writers.JsonlWriter(tmp_path)
    writer.write(1, {"a": math.nan, "b": np.float32("inf"), "c": -math.inf, "d": 1})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "d": 1}
    (record,) = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf and record["d"] == 1


def test_figures_of_the_machine_are_in_tensorboard_and_not_in_the_log_that_a_run_repeats(tmp_path):
    from ddt_jax.evaluation import event_times

    writer = writers.for_run(tmp_path, settings.Train(), {})
    writer.measure(5, {"speed/mfu": 0.4})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert [step for step, _ in event_times.read(tmp_path)] == [5]


def _run(workdir, start, stop):
    writer = writers.JsonlWriter(workdir)
    writer.truncate_after(start)
    for step in range(start + 1, stop + 1):
        writer.write(step, {"loss": 1 / step})
        if step % 4 == 0:
            writer.write(step, {"psnr": float(step)})
    writer.close()


@pytest.mark.parametrize("torn", [b"", b'{"step": 11, "lo', b'{"step": 11}', b'{"step": 3, "loss": 0.1', b"\xc3"])
def test_resumed_file_equals_that_of_an_undisturbed_run(tmp_path, torn):
    _run(tmp_path / "whole", 0, 12)
    _run(tmp_path / "killed", 0, 10)
    with open(tmp_path / "killed" / "metrics.jsonl", "ab") as f:
        f.write(torn)
    _run(tmp_path / "killed", 8, 12)
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert os.listdir(tmp_path / "killed") == ["metrics.jsonl"]


def test_opening_after_a_kill_never_glues_a_line_to_a_torn_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    writer = writers.JsonlWriter(tmp_path)
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert _lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_sigkill_loses_no_line(tmp_path):
    code = (
        "import os, signal, sys\nfrom ddt_jax.training import writers\n"
        "w = writers.JsonlWriter(sys.argv[1])\nfor i in range(50): w.write(i, {'loss': i})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in _lines(tmp_path / "metrics.jsonl")] == list(range(50))


def test_remote_file_is_complete_after_close_and_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.atomic, "is_local", lambda path: False)  # the folder plays an object store
    _run(tmp_path / "a", 0, 30)
    _run(tmp_path / "a", 25, 32)
    monkeypatch.undo()
    _run(tmp_path / "b", 0, 32)
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_what_was_flushed_outlives_a_process_that_never_closes(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.atomic, "is_local", lambda path: False)  # the folder plays an object store
    writer = writers.for_run(tmp_path, settings.Train(tensorboard=False), {})
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1 / step})
    writer.flush()
    assert [line["step"] for line in _lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    writer.write(4, {"loss": 0.25})  # lost with the process, and written again by the next one
    resumed = writers.JsonlWriter(tmp_path)
    resumed.truncate_after(3)
    resumed.write(4, {"loss": 0.5})
    resumed.flush()
    assert [line["loss"] for line in _lines(tmp_path / "metrics.jsonl")] == [1, 1 / 2, 1 / 3, 1 / 2]


def test_jsonl_saves_pictures(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    writer = writers.JsonlWriter(tmp_path)
    writer.image(40, "reconstructions", image)
    writer.close()
    with Image.open(tmp_path / "pictures" / "reconstructions_00000040.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), image)


@pytest.mark.filterwarnings("error")
def test_tensorboard_gets_scalars_and_pictures_without_a_warning(tmp_path, caplog):
    writer = writers.TensorBoardWriter(tmp_path)
    writer.write(3, {"loss": np.float32(1.5), "bad": math.nan})
    writer.image(3, "grid", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    resumed = writers.TensorBoardWriter(tmp_path)
    resumed.truncate_after(2)
    resumed.write(3, {"loss": 1.25})
    resumed.close()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    data = b"".join(p.read_bytes() for p in files)
    assert len(files) == 2
    assert b"loss" in data and b"grid" in data and b"PNG" in data
    assert b"bad" not in data and not caplog.records


@pytest.fixture
def fake_wandb(monkeypatch):
    """A wandb whose log waits for `gate` and records what it got."""
    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.gate, module.logged, module.kwargs = threading.Event(), [], {}
    module.Image = lambda image: ("image", image.shape)

    class Run:
        def log(self, values, step):
            module.gate.wait(20)
            if "explode" in values:
                raise ConnectionError("no network")
            module.logged.append((step, values))

        def finish(self):
            module.logged.append("finished")

    def init(**kwargs):
        module.kwargs = kwargs
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    yield module
    module.gate.set()


def test_wandb_passes_everything_on_in_order(fake_wandb):
    fake_wandb.gate.set()
    writer = writers.WandbWriter(run_id="abc", config={"a": 1})
    for step in range(5):
        writer.write(step, {"loss": np.float32(step)})
    writer.image(5, "grid", np.zeros((2, 3, 3), np.uint8))
    writer.close()
    writer.close()
    expected = [(s, {"loss": float(s)}) for s in range(5)] + [(5, {"grid": ("image", (2, 3, 3))}), "finished"]
    assert fake_wandb.logged == expected
    assert fake_wandb.kwargs["id"] == "abc" and fake_wandb.kwargs["resume"] == "allow"
    assert writer.dropped == 0 and writer.error is None


def test_wandb_that_hangs_drops_and_counts_and_never_blocks(fake_wandb):
    writer = writers.WandbWriter(capacity=4, close_seconds=0.2)
    start = time.monotonic()
    for step in range(100):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert time.monotonic() - start < 5
    # One record may be in the thread's hands; four are queued, and count as lost when closing gives up.
    assert 99 <= writer.dropped <= 100


def test_wandb_that_fails_is_given_up_quietly(fake_wandb):
    fake_wandb.gate.set()
    writer = writers.WandbWriter()
    writer.write(0, {"explode": 1})
    writer._thread.join(10)
    writer.write(1, {"loss": 1})
    writer.close()
    assert isinstance(writer.error, ConnectionError) and writer.dropped == 2


def test_missing_wandb_names_the_extra(monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ddt_jax\[wandb\]") as caught:
        writers.WandbWriter()
    assert "\n" not in str(caught.value)


def test_multi_writer_reaches_all_and_closes_all_even_if_one_fails():
    calls = []

    class Recorder:
        def __init__(self, name, broken=False):
            self.name, self.broken = name, broken

        def write(self, step, scalars):
            calls.append((self.name, step))

        def image(self, step, name, image):
            calls.append((self.name, name))

        def truncate_after(self, step):
            calls.append((self.name, "truncate", step))

        def flush(self):
            calls.append((self.name, "flush"))

        def close(self):
            calls.append((self.name, "close"))
            if self.broken:
                raise OSError("disk full")

    writer = writers.MultiWriter([Recorder("a"), Recorder("b", broken=True), Recorder("c")])
    writer.write(1, {})
    writer.image(1, "grid", None)
    assert calls == [("a", 1), ("b", 1), ("c", 1), ("a", "grid"), ("b", "grid"), ("c", "grid")]
    writer.truncate_after(7)
    assert calls[-3:] == [(name, "truncate", 7) for name in "abc"]
    writer.flush()
    assert calls[-3:] == [(name, "flush") for name in "abc"]
    with pytest.raises(OSError, match="disk full"):
        writer.close()
    assert {c for c in calls if c[1] == "close"} == {("a", "close"), ("b", "close"), ("c", "close")}


def test_settings_choose_the_writers(tmp_path, fake_wandb):
    def kinds(**train):
        writer = writers.for_run(tmp_path, settings.Train(**train), {"name": "smoke"})
        writer.close()
        return [type(w) for w in writer.writers]

    assert kinds() == [writers.JsonlWriter, writers.TensorBoardWriter]
    assert kinds(tensorboard=False) == [writers.JsonlWriter]
    fake_wandb.gate.set()
    assert kinds(tensorboard=False, wandb=True) == [writers.JsonlWriter, writers.WandbWriter]
    first = dict(fake_wandb.kwargs)
    kinds(tensorboard=False, wandb=True)
    assert fake_wandb.kwargs["id"] == first["id"] and fake_wandb.kwargs["name"] == "smoke"


def test_writers_and_progress_do_not_import_jax_or_heavy_packages():
    code = (
        "import sys\nfrom ddt_jax.training import writers, progress\n"
        "print([m for m in ('jax', 'tensorboardX', 'wandb', 'matplotlib', 'PIL', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
