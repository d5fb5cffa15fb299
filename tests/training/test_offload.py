"""Moments in the memory of the hosts: they lie there between steps, and a run learns and is saved as without."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import config, experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.training import checkpoint, offload
from ddt_jax.training.checksum import checksums
from ddt_jax.training.recheck import Recheck

RUN = settings.Experiment(
    model=settings.LinearTokenizer(quantizer=settings.Quantizer(normalize_input="none", codebook_size=64)),
    mesh=settings.Mesh(fsdp=2),
    data=settings.Data(image_size=16),
    train=settings.Train(batch_size=8, steps=6),
    optimizer=settings.Optimizer(warmup=2, spike_skip=8.0, clip_update=8.0),
)


def built(name="muon", offloaded=True, devices=2):
    optimizer = replace(RUN.optimizer, name=name, offload=offloaded)
    mesh = RUN.mesh if devices > 1 else settings.Mesh()
    return experiment.build(replace(RUN, optimizer=optimizer, mesh=mesh), jax.devices()[:devices])


def batch(b, step):
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    return meshes.put_batch({"image": images, "slot": np.arange(8, dtype=np.int32)}, b.mesh)


def trained(b, state, start, stop):
    losses = []
    with jax.set_mesh(b.mesh):
        for i in range(start, stop):
            state, metrics = b.step(state, batch(b, i))
            losses.append(float(metrics["loss"]))
    return losses, state


def kinds(state):
    """Memory kinds of (moments, all else). A moment has the shape of its parameter, as nothing else of them has."""
    shapes = {x.shape for x in jax.tree.leaves(state.params)}
    of = lambda leaves: {x.sharding.memory_kind for x in leaves}  # noqa: E731
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape in shapes]
    return of(moments), of(x for x in jax.tree.leaves(state) if not any(x is m for m in moments))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_lie_with_the_hosts_between_steps_and_a_run_learns_the_same(name):
    on_chips, on_hosts = built(name, offloaded=False), built(name)
    state = on_hosts.init()
    assert kinds(state) == ({offload.HOST}, {"device"})
    losses, state = trained(on_hosts, state, 0, 4)
    assert kinds(state) == ({offload.HOST}, {"device"})
    expected, usual = trained(on_chips, on_chips.init(), 0, 4)
    assert kinds(usual) == ({"device"}, {"device"})
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(usual), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_run_of_bad_gradients_leaves_moments_alone():
    """The branch that updates is taken, whatever the norm is."""
    b = built()
    state = b.init()
    state = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
    before, count = checksums(state.opt_state), int(state.step)
    _, state = trained(b, state, 0, 1)
    assert int(state.step) == count + 1 and state.bad_steps.tolist() == [1, 1]
    after = checksums(state.opt_state)
    assert {name for name in after if after[name] != before[name]} <= {"steps/values_RW", "updates/values_RW"}


def test_checkpoints_hold_them_and_do_not_ask_where_they_lay(tmp_path):
    b = built()
    _, expected = trained(b, b.init(), 0, 6)
    for stop in (2, 6):
        points = checkpoint.Checkpoints(tmp_path)
        with jax.set_mesh(b.mesh):
            state = points.restore(b.abstract) or b.init()
        assert kinds(state)[0] == {offload.HOST}
        _, state = trained(b, state, int(state.step), stop)
        points.save(state, config.dump(b.settings))
        points.close()
    assert checksums(state) == checksums(expected)
    usual = built(offloaded=False, devices=1)
    points = checkpoint.Checkpoints(tmp_path, read_only=True)
    with jax.set_mesh(usual.mesh):
        there = points.restore(usual.abstract)
    points.close()
    assert kinds(there) == ({"device"}, {"device"}) and checksums(there) == checksums(expected)


def test_what_is_written_in_the_background_is_not_what_the_next_step_reuses(monkeypatch, tmp_path):
    """Of a host's memory a write takes no copy by itself, and a GPU gives no buffer away that somebody looks at."""
    b, given = built(), []
    points = checkpoint.Checkpoints(tmp_path)
    monkeypatch.setattr(points._manager, "save", lambda step, args: given.append(args["state"].item))
    monkeypatch.setattr(points._read_back, "expect", lambda *_: None)
    state = b.init()
    points.save(state, {})
    points.close()
    held = lambda tree: {s.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) for s in x.addressable_shards}  # noqa: E731
    assert not held(given[0].opt_state) & held([x for x in jax.tree.leaves(state) if offload.on_host(x.sharding)])
    assert jax.tree.leaves(given[0].params)[0] is jax.tree.leaves(state.params)[0] and kinds(given[0]) == kinds(state)
    assert checksums(given[0]) == checksums(state)


def test_a_run_may_change_it_when_it_goes_on():
    there, here = (config.dump(built(offloaded=where).settings) for where in (True, False))
    assert there != here and config.difference(there, here) == []


def test_a_step_that_is_done_twice():
    b = built()
    recheck, state, rows = Recheck(b.pure_step, b.shardings, b.mesh), b.init(), batch(b, 0)
    again = recheck.begin(state, rows)
    with jax.set_mesh(b.mesh):
        result = b.step(state, rows)
    recheck.end(0, again, result)
