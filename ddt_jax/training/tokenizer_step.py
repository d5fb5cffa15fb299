"""The compiled train step of an image tokenizer.

A model gives `loss_fn(params, extra, batch, rng) → (sums, counts, stats)`: sums and counts of each term over the rows
it was given, and additive statistics for its non-gradient state. The step adds them over micro-batches and devices,
so the loss of a step does not depend on how its rows were split; `update_extra(extra, stats, rng)` is called once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ddt_jax import mesh as meshes
from ddt_jax.tokenizers.image_loss import DISCRIMINATOR
from ddt_jax.training import guards, offload
from ddt_jax.training.state import TrainState

STOP = "stop"  # a flag of each device: a host that was asked to stop says so to all of them through the step


def make_step(
    model,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulate: int,
    ema: float,
    spike_skip: float = 0.0,
    clip_update: float = 0.0,
) -> Callable:
    """The pure function (state, batch) → (state, metrics); to be compiled by `compile_step`.

    Args:
      model: an ImageTokenizer: `loss_fn`, `update_extra`, `loss_weights`, `extra_metrics`.
      accumulate: micro-batches per step; the batch is cut along its rows.
      ema: decay of the weight average; 0 when the state holds none.
      spike_skip, clip_update: as in settings.Optimizer; the state must have been made with them.

    Returns:
      A function of (TrainState, dict of [B, ...] arrays). Metrics are float32 scalars: "loss", every term as sum over
      count, "grad_norm", "update_norm", both again with "_discriminator" where there is one (and without it
      otherwise), "learning_rate", "bad_step", "bad_steps" in all, "bad_in_a_row", "stop", and the model's own; with
      guards "spike" (the step is finite and was skipped) and "update_kept", the least factor of the update.
    """

    def loss(params, extra, batch, rng, totals, weights):
        sums, counts, stats = model.loss_fn(params, extra, batch, rng)
        value = sum(w * sums[name] / totals[name] for name, w in weights.items())
        return value, (sums, counts, stats)

    grad_fn = jax.value_and_grad(loss, has_aux=True)

    def totals_of(params, extra, batch, rng):
        # Counts do not depend on the parameters: all else in this call is dead code to the compiler.
        return jax.tree.map(lambda c: jnp.maximum(c, 1), model.loss_fn(params, extra, batch, rng)[1])

    def gradients(params, extra, batch, rng, weights):
        if accumulate == 1:
            (value, aux), grads = grad_fn(params, extra, batch, rng, totals_of(params, extra, batch, rng), weights)
            return value, grads, aux
        micro = jax.tree.map(lambda x: _split_rows(x, accumulate), batch)
        count = jax.lax.map(lambda b: model.loss_fn(params, extra, b, rng)[1], micro)
        totals = jax.tree.map(lambda c: jnp.maximum(c.sum(0), 1), count)

        def one(carry, b):
            return jax.tree.map(jnp.add, carry, grad_fn(params, extra, b, rng, totals, weights)), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(grad_fn, params, extra, first, rng, totals, weights)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        ((value, aux), grads), _ = jax.lax.scan(one, zeros, micro)
        return value, grads, aux

    def step(state: TrainState, batch: dict):
        batch = dict(batch)
        stop = jnp.max(batch.pop(STOP)) if STOP in batch else jnp.int32(0)
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        weights = {name: w(state.step) if callable(w) else w for name, w in model.loss_weights.items()}
        value, grads, aux = gradients(state.params, state.extra, batch, rng, weights)
        norms = _norms("grad_norm", grads)
        state, metrics = offload.late(update, norms["grad_norm"], state, (value, grads, aux, norms, rng))
        return state, metrics | {STOP: jnp.asarray(stop, jnp.float32)}

    def update(state: TrainState, found):
        value, grads, (sums, counts, stats), norms, rng = found
        before = guards.split(state.opt_state)
        updates, opt_state = optimizer.update(grads, before.inner, state.params)
        lengths = _norms("update_norm", updates)
        rate, guarded = schedule(_updates_done(state)), {}
        if before.updates is not None:
            sizes = jnp.stack([*lengths.values()]) / jnp.maximum(rate, jnp.finfo(jnp.float32).tiny)
            size_limits = before.updates.limits(clip_update)
            kept = jnp.where(sizes > size_limits, size_limits / sizes, 1.0)
            updates, guarded["update_kept"] = guards.scaled(updates, kept), kept.min()
        params = optax.apply_updates(state.params, updates)
        average = None if state.ema is None else jax.tree.map(lambda a, p: a + (1 - ema) * (p - a), state.ema, params)
        extra = model.update_extra(state.extra, stats, rng)

        watched = [value, *norms.values()]
        good = finite = jnp.isfinite(jnp.stack([*watched, *lengths.values(), *_extremes(stats)])).all()
        if before.steps is not None:
            seen, limits = jnp.stack(watched), before.steps.limits(spike_skip)
            guarded["spike"] = finite & (seen > limits).any()
            good = finite & ~guarded["spike"]
        new = (params, opt_state, average, extra)
        old = (state.params, before.inner, state.ema, state.extra)
        # Selected, never multiplied: 0 x NaN is NaN. The first bad step leaves no trace but in the counters.
        params, opt_state, average, extra = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        opt_state = guards.Guarded(
            opt_state,
            None if before.steps is None else before.steps.entered(seen, limits, finite),
            None if before.updates is None else before.updates.entered(sizes, size_limits, good),
        )
        bad = jnp.logical_not(good).astype(jnp.int32)
        bad_steps = jnp.stack([state.bad_steps[0] + bad, (state.bad_steps[1] + 1) * bad])
        metrics = {name: sums[name] / jnp.maximum(counts[name], 1) for name in sums}
        metrics |= model.extra_metrics(extra)
        metrics |= norms | lengths | guarded
        metrics |= {
            "loss": value,
            "learning_rate": rate,
            "bad_step": bad,
            "bad_steps": bad_steps[0],
            "bad_in_a_row": bad_steps[1],
        }
        opt_state = guards.join(opt_state)
        state = TrainState(state.step + 1, params, opt_state, average, extra, state.rng, bad_steps)
        return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

    return step


def _norms(name, tree):
    """Global norms of the two sides, each by itself; of one where there is no discriminator."""
    names = (name, f"{name}_{DISCRIMINATOR}")
    return {n: optax.tree.norm(part) for n, part in zip(names, guards.sides(tree), strict=False)}


def _extremes(stats):
    """A scalar of each floating-point array that is finite if and only if the array is."""
    floating = (x for x in jax.tree.leaves(stats) if jnp.issubdtype(x.dtype, jnp.floating) and x.size)
    return [jnp.max(jnp.abs(x)).astype(jnp.float32) for x in floating]


def _updates_done(state):
    return state.step - state.bad_steps[0]


def _split_rows(x, parts):
    """[B, ...] → [parts, B / parts, ...]; each device's rows are spread over all parts, so no row has to move."""
    rows = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.moveaxis(rows, 1, 0)


def compile_step(step: Callable, state_shardings: TrainState, mesh) -> Callable:
    """`step` jitted over the mesh; the state it is given is consumed."""
    whole = meshes.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(state_shardings, None),  # those of the arrays: rows and flags lie differently
        out_shardings=(state_shardings, whole),
        donate_argnums=0,
    )
