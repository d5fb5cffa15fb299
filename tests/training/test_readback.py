"""Several hosts read back what each of them wrote, and only together say that it is what was saved."""

import numpy as np
import pytest

from ddt_jax.training.checkpoint import Checkpoints, checkpoints_folder, is_committed
from ddt_jax.training.checksum import checksums
from ddt_jax.training.readback import ReadBack
from ddt_jax.training.state import TrainState
from ddt_jax.training.stored import LIST, READ_BACK, Damaged, Stored

WEIGHTS = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
STATE = TrainState(np.int32(3), {"w": WEIGHTS}, {}, None, {}, np.zeros(2, np.uint32), np.zeros(2, np.int32))
WHOLE = {"step": [()], "rng": [(slice(0, 2),)], "bad_steps": [(slice(0, 2),)]}


def rows(first, last):
    return {"params/w": [(slice(first, last), slice(0, 5))]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    points = Checkpoints(workdir)
    points.save(STATE, {})
    points.close()
    return checkpoints_folder(workdir) / "3"


def read_back(folder, *parts):
    """Two hosts that wrote these parts. Returns what process 0 called when it was satisfied."""
    (folder / LIST).unlink(missing_ok=True)
    done = []
    hosts = [ReadBack(is_committed, done.append, index, len(parts)) for index in range(len(parts))]
    try:
        for host, part in reversed(list(zip(hosts, parts, strict=True))):
            host.expect(folder, checksums(STATE), {name: part.get(name, []) for name in checksums(STATE)})
        for host in reversed(hosts):
            host.wait()
    finally:
        for host in hosts:
            host.close()
    return done


def test_two_hosts_list_every_file_once(saved):
    files = Stored(saved).listed()
    assert read_back(saved, WHOLE | rows(0, 4), rows(4, 6)) == [saved]
    assert Stored(saved).listed() == files and Stored(saved).file_problem() is None
    assert not [p for p in saved.iterdir() if p.name.startswith(READ_BACK)]


@pytest.mark.parametrize("other", [rows(5, 6), rows(3, 6)])
def test_a_part_that_is_missing_or_there_twice_is_noticed(saved, other):
    with pytest.raises(Damaged, match=r"step 3: 1 arrays do not read back as they were saved \(first: params/w\)"):
        read_back(saved, WHOLE | rows(0, 4), other)
    assert not (saved / LIST).exists()
