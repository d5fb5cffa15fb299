"""RoPE-ND is a rotation that knows distances only; the released variant is shown not to be one."""

import math

import numpy as np
import pytest

from ddt_jax.nn import rope_nd

E = 64
GRIDS = {2: (7, 9), 3: (4, 7, 9)}


def positions(lengths):
    return np.stack(np.meshgrid(*map(np.arange, lengths), indexing="ij"), axis=-1).reshape(-1, len(lengths))


def turned(x_E, positions_LA, lengths, kind):
    """One vector at each of the positions, [L, E], in float64 by the tables alone."""
    cos, sin = rope_nd.tables(positions_LA, lengths, E, kind)
    across = np.concatenate([-x_E[E // 2 :], x_E[: E // 2]])
    return x_E * cos + across * sin


def vectors():
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, E))


def worst_shift(kind, axes):
    """How far the product of a query and a key moves, at most, when both are shifted alike."""
    lengths = GRIDS[axes]
    q, k = vectors()
    ids = positions([n - 1 for n in lengths])
    products = turned(q, ids, lengths, kind) @ turned(k, ids, lengths, kind).T
    shifted = turned(q, ids + 1, lengths, kind) @ turned(k, ids + 1, lengths, kind).T
    return np.abs(products - shifted).max()


def worst_norm(kind, axes):
    lengths = GRIDS[axes]
    q = vectors()[0]
    return np.abs(np.linalg.norm(turned(q, positions(lengths), lengths, kind), axis=1) - np.linalg.norm(q)).max()


@pytest.mark.parametrize("axes", [2, 3])
def test_norms_and_relative_positions_are_kept(axes):
    assert worst_norm("nd", axes) < 1e-12
    assert worst_shift("nd", axes) < 1e-12


@pytest.mark.parametrize("axes", [2, 3])
def test_the_released_variant_keeps_neither(axes):
    assert worst_norm("released", axes) > 0.1
    assert worst_shift("released", axes) > 0.1


@pytest.mark.parametrize("axes", [2, 3])
def test_every_axis_turns_its_own_share_of_the_pairs(axes):
    shares = {2: (32, 32), 3: (16, 24, 24)}[axes]
    assert rope_nd.split(E, axes) == shares
    lengths = GRIDS[axes]
    start = 0
    for axis, share in enumerate(shares):
        ids = np.zeros((2, axes), int)
        ids[1, axis] = 3
        cos, sin = rope_nd.tables(ids, lengths, E)
        np.testing.assert_array_equal((cos[0], sin[0]), (np.ones(E), np.zeros(E)))
        moved = np.flatnonzero(sin[1])
        pairs = np.arange(start // 2, (start + share) // 2)
        np.testing.assert_array_equal(moved, np.concatenate([pairs, pairs + E // 2]))
        angle = 3.0 * 100.0 ** (-2 * np.arange(share // 2) / share)  # b^(-2 (i - 1) / d)
        np.testing.assert_allclose(sin[1, pairs], np.sin(angle), atol=1e-15)
        start += share


def test_released_closed_form():
    """lo = a cos θ_h - b sin θ_h, hi = b cos θ_w + a sin θ_w: rows turn the lower half, columns the upper."""
    lengths, row, column = (32, 32), 5, 11
    x = vectors()[0]
    found = np.asarray(
        rope_nd.rotate(
            x[None, None, None].astype(np.float32), *rope_nd.tables(np.array([[row, column]]), lengths, E, "released")
        )
    )[0, 0, 0]
    exponents = np.tile(np.linspace(0, 1, 16), 2)  # with its end
    of_row, of_column = (place * 100.0**-exponents for place in (row, column))
    a, b = x[:32], x[32:]
    np.testing.assert_allclose(found[:32], a * np.cos(of_row) - b * np.sin(of_row), atol=1e-5)
    np.testing.assert_allclose(found[32:], b * np.cos(of_column) + a * np.sin(of_column), atol=1e-5)


def test_bases_grow_with_the_axis():
    assert [rope_nd.base(n) for n in (1, 16, 32, 39, 40, 78, 79, 4096)] == [100, 100, 100, 100, 200, 200, 300, 10500]
    for n in range(1, 5000):
        assert (
            rope_nd.base(n) == (int(8 * n / math.pi) // 100 + 1) * 100
        )  # the released formula: never an exact multiple


def test_one_axis_is_rope():
    cos, sin = rope_nd.tables(np.arange(5)[:, None], (5,), E)
    angle = np.arange(5)[:, None] * 100.0 ** (-np.arange(0, E, 2) / E)
    np.testing.assert_allclose(cos, np.tile(np.cos(angle), 2), atol=1e-15)
    np.testing.assert_allclose(sin, np.tile(np.sin(angle), 2), atol=1e-15)


def test_heads_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="a head of 24 does not divide among 3 axes; take a multiple of 16"):
        rope_nd.split(24, 3)
