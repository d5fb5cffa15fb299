"""How often loops turn: programs by hand, whose conditions XLA itself does not look through."""

import jax
import jax.numpy as jnp
import pytest

from ddt_jax.scaling import program


def turned(goes_on, first, step, beside=0):
    """(turns that are found, those that a run has if nothing ends it before).

    Args:
      goes_on: of the counter. beside: another number that starts there and moves along with the counter.
    """

    def run(x, is_open):
        def body(carry):
            n, m, x, is_open = carry
            return n + step, m + step, jnp.tanh(x @ x).at[m % 4].add(1.0), is_open

        unfinished = lambda carry: goes_on(carry[0]) & jnp.any(carry[3])  # noqa: E731
        return jax.lax.while_loop(unfinished, body, (jnp.int32(first), jnp.int32(beside), x, is_open))[:3]

    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    text = jax.jit(run).lower(x, jax.ShapeDtypeStruct((3,), bool)).compile().as_text()
    (loop,) = program.loops(text, 1)
    turns, n = 0, first
    while goes_on(n):
        turns, n = turns + 1, n + step
    assert loop.turn.flops == 2 * 4**3  # the product of a turn, and no other loop's
    assert program.read(text, 1).flops == 2 * 4**3 * loop.turns
    return loop.turns, turns


@pytest.mark.parametrize(
    ("goes_on", "first", "step", "beside"),
    [
        (lambda n: n < 12, 0, 1, 0),
        (lambda n: n < 12, 1, 1, 16),  # as tokens and slots of a cache, of which XLA keeps one
        (lambda n: n <= 12, 3, 1, 0),
        (lambda n: n < 12, 12, 1, 0),
        (lambda n: n < 12, 0, 5, 0),
        (lambda n: n > 2, 9, -1, 0),
    ],
)
def test_a_loop_that_may_end_early_counts_as_often_as_it_turns_at_most(goes_on, first, step, beside):
    found, turns = turned(goes_on, first, step, beside)
    assert found == turns


def test_a_loop_whose_end_is_not_in_the_program_is_said_to_be_unknown():
    def run(x, most):
        return jax.lax.while_loop(lambda c: c[0] < most, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[1])), (0, x))[1]

    shapes = jax.ShapeDtypeStruct((4, 4), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    work = program.read(jax.jit(run).lower(*shapes).compile().as_text(), 1)
    assert work.flops == 2 * 4**3 and len(work.unknown_loops) == 1
