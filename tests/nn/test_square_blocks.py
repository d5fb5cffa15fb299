"""Each block is a square of the image, in one piece, and nothing is lost on the way."""

import numpy as np
import pytest

from ddt_jax.nn import square_blocks

CASES = [(side, size) for side in (1, 2, 3, 4, 6, 8) for size in square_blocks.sizes(side)]


def test_sizes_go_from_one_token_to_all():
    assert square_blocks.sizes(1) == [1]
    assert square_blocks.sizes(8) == [1, 4, 16, 64]
    assert square_blocks.sizes(6) == [1, 4, 9, 36]


@pytest.mark.parametrize(("side", "size"), CASES)
def test_blocks_are_squares_in_raster_order(side, size):
    order = square_blocks.order(side, size)
    assert sorted(order) == list(range(side * side))
    n, place = int(size**0.5), 0
    for top in range(0, side, n):
        for left in range(0, side, n):
            for row in range(top, top + n):
                for column in range(left, left + n):
                    assert order[place] == row * side + column
                    assert tuple(square_blocks.positions(side, size)[place]) == (row, column)
                    place += 1


@pytest.mark.parametrize(("side", "size"), CASES)
def test_inverse_brings_the_raster_back(side, size):
    order = square_blocks.order(side, size)
    raster = np.arange(100, 100 + side * side)
    np.testing.assert_array_equal(raster[order][square_blocks.inverse(order)], raster)


def test_published_order():
    """ImageNet at 256 px: 32 x 32 tokens, four blocks of 16 x 16."""
    order = square_blocks.order(32, 256).reshape(4, 16, 16)
    np.testing.assert_array_equal(order[:, 0, 0], [0, 16, 512, 528])
    np.testing.assert_array_equal(order[3], np.arange(1024).reshape(32, 32)[16:, 16:])


@pytest.mark.parametrize("size", [2, 8, 9, 0, 256])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"choose from \[1, 4, 16, 64\]"):
        square_blocks.order(8, size)
