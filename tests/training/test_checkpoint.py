"""Checkpoints are trusted only when what comes back is what was saved."""

import errno
import gc
import itertools
import json
import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ddt_jax import config, experiment, settings
from ddt_jax.errors import Away, UserError
from ddt_jax.training import stored
from ddt_jax.training.checkpoint import Checkpoints, digest, saved_config, saved_steps
from ddt_jax.training.stored import LIST

# Orbax drops the coroutines of the other arrays when one file is damaged, and Python remarks on each.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def collect():
    """Collects those coroutines here, where their remarks are ignored, and not in whatever test comes later."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def built():
    s = settings.Experiment(
        model=settings.LinearTokenizer(quantizer=settings.Quantizer(normalize_input="none", codebook_size=32)),
        mesh=settings.Mesh(fsdp=4, tensor=2),
        data=settings.Data(image_size=8),
        train=settings.Train(batch_size=8),
    )
    return experiment.build(s)


@pytest.fixture(scope="module")
def state(built):
    return built.init()


def at(state, step):
    return state.replace(step=state.step + step)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory, state):
    workdir = tmp_path_factory.mktemp("saved")
    points = Checkpoints(workdir, settings.Train(keep_checkpoints=3))
    for step in (1, 2, 3):
        points.save(at(state, step), {"config": "tree"})
    points.close()
    return workdir


@pytest.fixture
def saved(tmp_path, saved_once):
    """A run of its own for each test, to be damaged."""
    shutil.copytree(saved_once, tmp_path, dirs_exist_ok=True)
    return tmp_path


def data_files(workdir, step):
    files = [p for p in (workdir / "checkpoints" / str(step) / "state").rglob("*") if p.is_file()]
    return sorted(files, key=lambda p: -p.stat().st_size)


def restore(workdir, built, read_only=False, partial=False):
    notes = []
    points = Checkpoints(workdir, settings.Train(), notes.append, read_only=read_only or partial)
    try:
        with jax.set_mesh(built.mesh):
            abstract = experiment.evaluated(built.abstract) if partial else built.abstract
            return points.restore(abstract, partial=partial), notes
    finally:
        points.close()


def test_what_comes_back_is_what_was_saved(saved, built, state):
    back, notes = restore(saved, built)
    assert digest(back) == digest(at(state, 3))
    assert notes == []
    shardings = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), back, state)
    assert all(jax.tree.leaves(shardings))


def test_it_comes_back_on_another_mesh(saved, state):
    s = settings.Experiment(
        model=settings.LinearTokenizer(quantizer=settings.Quantizer(normalize_input="none", codebook_size=32)),
        data=settings.Data(image_size=8),
        train=settings.Train(batch_size=8),
    )
    back, _ = restore(saved, experiment.build(s, jax.devices()[:1]))
    assert digest(back) == digest(at(state, 3))


def test_what_is_evaluated_comes_back_without_what_only_training_needs(saved, built, state):
    back, notes = restore(saved, built, partial=True)
    averaged = experiment.evaluated(at(state, 3))
    assert averaged.params is None and averaged.opt_state is None  # this run has an average
    assert digest(back) == digest(averaged) and notes == []
    assert len(jax.tree.leaves(back)) < len(jax.tree.leaves(state)) / 2

    plain = experiment.evaluated(state.replace(ema=None))
    assert plain.params is state.params and plain.opt_state is None


def test_where_a_field_is_not_wanted_the_others_are_verified(saved, built):
    (saved / "checkpoints" / "3" / LIST).unlink()  # no hashes: the checksums of what was read decide
    (meta,) = (saved / "checkpoints" / "3" / "meta").glob("metadata")
    tree = json.loads(meta.read_text())
    name = next(name for name in tree["checksums"] if name.startswith("ema/"))
    tree["checksums"][name] = "0" * 16
    meta.write_text(json.dumps(tree))
    back, notes = restore(saved, built, partial=True)
    assert int(back.step) == 2 and f"1 arrays are not what was saved (first: {name})" in notes[0]


@pytest.mark.parametrize("how", ["flip", "flip before it was read back", "truncate", "empty folder", "no checksums"])
def test_a_damaged_checkpoint_is_passed_over_by_name(saved, built, state, how):
    file = data_files(saved, 3)[0]
    if how in ("flip before it was read back", "no checksums"):
        (saved / "checkpoints" / "3" / LIST).unlink()
    if how.startswith("flip"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "truncate":
        file.write_bytes(file.read_bytes()[:100])
    elif how == "no checksums":
        (meta,) = (saved / "checkpoints" / "3" / "meta").glob("metadata")
        meta.write_text(json.dumps({"format": 1, "checksums": {}}))
    elif how == "empty folder":
        (saved / "checkpoints" / "4").mkdir()
    back, notes = restore(saved, built)
    assert int(back.step) == (3 if how == "empty folder" else 2)
    assert len(notes) == 1 and notes[0].startswith(
        f"checkpoint: step {4 if how == 'empty folder' else 3} passed over: "
    )
    assert "\n" not in notes[0]
    if how in ("flip", "truncate"):
        assert file.name in notes[0]


STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
# As TensorStore says it.
STALE_ARRAY = ValueError(f'UNKNOWN: Error reading local file "/a/manifest.ocdbt": {STALE.strerror} [os_error_code=116]')
PARTS = {  # what is read of a checkpoint, the function that does it, and its error
    "files": (stored, "_hash", STALE),
    "texts": (type(stored.epath.Path("/")), "read_text", STALE),
    "arrays": (Checkpoints, "_read", STALE_ARRAY),
}


@pytest.fixture
def outage(monkeypatch):
    """(part of a checkpoint, times) → so many reads of it fail; each look at the clock takes a second."""
    seconds = itertools.count()
    monkeypatch.setattr(stored, "time", SimpleNamespace(monotonic=lambda: next(seconds), sleep=lambda s: None))

    def begin(part, times):
        owner, name, error = PARTS[part]
        real, left = getattr(owner, name), [error] * times

        def read(*arguments, **options):
            if left:
                raise left.pop()
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, read)
        return left

    return begin


@pytest.mark.parametrize("part", PARTS)
def test_a_read_that_fails_for_a_moment_passes_nothing_over(saved, built, outage, part):
    left = outage(part, 2)
    back, notes = restore(saved, built)
    assert int(back.step) == 3 and notes == [] and not left


@pytest.mark.parametrize("part", PARTS)
def test_storage_that_stays_away_is_no_damage(saved, built, outage, part):
    outage(part, 10**4)
    with pytest.raises(Away, match=f"^checkpoint: .*/checkpoints/3.* cannot be read, for 30 s now: .*{STALE.strerror}"):
        restore(saved, built)
    assert saved_steps(saved) == [1, 2, 3]


def test_a_folder_that_does_not_answer_is_not_taken_for_an_empty_one(saved, outage, monkeypatch):
    real = os.stat

    def stat(path, *arguments, **options):
        if os.fspath(path).endswith("checkpoints"):
            raise STALE
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(Away, match="/checkpoints cannot be read"):
        saved_steps(saved)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "x"), UserError),
        (OSError(errno.EROFS, "x"), UserError),
        (ValueError(f"RESOURCE_EXHAUSTED: /a: {os.strerror(errno.ENOSPC)} [os_error_code=28]"), UserError),
        (ValueError("PERMISSION_DENIED: gs://a"), UserError),
        (stored.Damaged("params/w is not what was saved"), UserError),
        (STALE, Away),
        (STALE_ARRAY, Away),
        (ValueError("UNAVAILABLE: gs://a"), Away),
    ],
)
def test_a_save_that_fails_in_an_outage_is_no_mistake_of_the_user(tmp_path, monkeypatch, error, kind):
    points = Checkpoints(tmp_path)
    with monkeypatch.context() as failing:
        failing.setattr(points._manager, "check_for_errors", lambda: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match="earlier checkpoints are unharmed") as caught:
            points.check()
    assert type(caught.value) is kind
    points.close()


def test_a_passed_over_step_can_be_saved_again(saved, built, state):
    data_files(saved, 3)[0].unlink()
    restore(saved, built)
    assert (saved / "checkpoints" / "3.bad").exists()
    points = Checkpoints(saved, settings.Train())
    points.save(at(state, 3), {})
    points.close()
    back, notes = restore(saved, built)
    assert int(back.step) == 3 and notes == []


def test_reading_changes_nothing(saved, built):
    data_files(saved, 3)[0].unlink()
    before = sorted(p.name for p in (saved / "checkpoints").iterdir())
    back, _ = restore(saved, built, read_only=True)
    assert int(back.step) == 2
    assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == before


def test_none_that_verifies_is_an_error_and_none_at_all_is_not(saved, built, tmp_path_factory):
    for step in (1, 2, 3):
        data_files(saved, step)[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 3 checkpoints .* verifies"):
        restore(saved, built)
    assert restore(tmp_path_factory.mktemp("empty"), built) == (None, [])


@pytest.mark.parametrize("partial", [False, True])
def test_another_model_is_refused_by_the_names_of_its_arrays(saved, partial):
    s = settings.Experiment(
        model=settings.LinearTokenizer(
            width=16, quantizer=settings.Quantizer(normalize_input="none", codebook_size=32)
        ),
        data=settings.Data(image_size=8),
        train=settings.Train(batch_size=8),
    )
    with pytest.raises(UserError):
        restore(saved, experiment.build(s, jax.devices()[:1]), partial=partial)


def test_what_a_killed_process_left_is_removed(saved, built):
    left = saved / "checkpoints" / "4.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("x")
    restore(saved, built)
    assert not left.exists()


def test_digest_sees_every_part(state):
    original = digest(state)
    for part in ("params", "opt_state", "ema", "extra", "rng", "step"):
        leaves, tree = jax.tree.flatten(getattr(state, part))
        first = np.array(leaves[0])
        first.reshape(-1).view(np.uint8)[0] ^= 1
        assert digest(state.replace(**{part: jax.tree.unflatten(tree, [first, *leaves[1:]])})) != original


def test_the_config_of_a_run_from_before_the_axis_context_is_read(tmp_path):
    tree = config.dump(settings.Experiment(mesh=settings.Mesh(tensor=2)))
    tree["mesh"] = {name: size for name, size in tree["mesh"].items() if name != "context"} | {"sequence": 1}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert config.from_dict(saved_config(tmp_path)) == settings.Experiment(mesh=settings.Mesh(tensor=2))
