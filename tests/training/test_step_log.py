"""Every step's loss and gradient norm, bit by bit."""

import numpy as np

from ddt_jax.training import step_log
from ddt_jax.training.step_log import StepLog


def figures(step):
    return {"loss": float(np.float32(1 / step)), "grad_norm": float(np.float32(step / 3)), "other": 5.0}


def logged(workdir, first, last):
    return step_log.read(workdir, first, last).tolist()


def expected(*steps):
    return [[np.float32(1 / s), np.float32(s / 3)] for s in steps]


def test_a_run_that_goes_on_writes_over_what_came_after_its_checkpoint(tmp_path):
    log = StepLog(tmp_path)
    for step in range(1, 8):
        log.put(step, {**figures(step), "loss": 9.0} if step > 4 else figures(step))
    log.close()
    log = StepLog(tmp_path)
    for step in (5, 6, 7):
        log.put(step, figures(step))
    log.close()
    assert logged(tmp_path, 1, 7) == expected(*range(1, 8)) and logged(tmp_path, 6, 6) == expected(6)


def test_a_step_is_in_the_file_before_the_next_one_begins(tmp_path):
    """A run that is killed goes on from a checkpoint; what the log lacks before it would be lacking for good."""
    log = StepLog(tmp_path)
    for step in (1, 2, 3):
        log.put(step, figures(step))
        assert logged(tmp_path, 1, step) == expected(*range(1, step + 1))
    log.close()


def test_steps_that_were_never_logged_are_zeros(tmp_path):
    assert logged(tmp_path, 2, 3) == [[0, 0]] * 2
    log = StepLog(tmp_path)
    log.put(3, {"loss": np.nan, "grad_norm": np.inf})
    log.close()
    with (tmp_path / step_log.FILE).open("ab") as file:
        file.write(b"\1\2\3")  # a torn record
    found = step_log.read(tmp_path, 2, 4)
    assert found[0].tolist() == found[2].tolist() == [0, 0] and np.isnan(found[1, 0]) and np.isposinf(found[1, 1])


def test_where_nothing_can_be_appended_the_file_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(step_log.atomic, "is_local", lambda path: False)
    monkeypatch.setattr(step_log.atomic, "write_bytes", lambda path, data: path.write_bytes(data))
    log = StepLog(tmp_path, remote_every=2)
    log.put(2, figures(2))
    assert not (tmp_path / step_log.FILE).exists()
    log.put(1, figures(1))
    assert logged(tmp_path, 1, 2) == expected(1, 2)
    log.put(3, figures(3))
    log.close()
    log = StepLog(tmp_path)
    log.put(4, figures(4))
    log.close()
    assert logged(tmp_path, 1, 4) == expected(1, 2, 3, 4)


def test_what_was_flushed_outlives_a_process_that_never_closes(tmp_path, monkeypatch):
    monkeypatch.setattr(step_log.atomic, "is_local", lambda path: False)  # the folder plays an object store
    log = StepLog(tmp_path)
    for step in (1, 2, 3):
        log.put(step, figures(step))
    log.flush()
    assert logged(tmp_path, 1, 3) == expected(1, 2, 3)
    log.put(4, {**figures(4), "loss": 9.0})  # lost with the process, and written again by the next one
    log = StepLog(tmp_path)
    log.put(4, figures(4))
    log.flush()
    assert logged(tmp_path, 1, 4) == expected(1, 2, 3, 4)
