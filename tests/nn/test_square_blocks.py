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


@pytest.mark.parametrize(("side", "size", "frames"), [(2, 1, 3), (2, 4, 4), (2, 8, 4), (4, 4, 2), (3, 27, 3)])
def test_blocks_of_a_clip_are_squares_of_a_frame_or_whole_frames(side, size, frames):
    order, at = square_blocks.order(side, size, frames), square_blocks.positions(side, size, frames)
    np.testing.assert_array_equal(order, at @ [side * side, side, 1])
    assert sorted(order) == list(range(frames * side * side))
    n = int(min(size, side * side) ** 0.5)
    for block in at.reshape(-1, size, 3):
        span = block.max(0) - block.min(0) + 1
        assert tuple(span) == (max(1, size // side**2), n, n)
    assert (np.diff(at[:, 0]) >= 0).all()


def test_sizes_of_a_clip_go_on_in_whole_frames():
    assert square_blocks.sizes(4, 6) == [1, 4, 16, 32, 48, 96]
    with pytest.raises(ValueError, match="no square blocks of 64"):
        square_blocks.order(4, 64, 6)


def test_published_order():
    """ImageNet at 256 px: 32 x 32 tokens, four blocks of 16 x 16."""
    order = square_blocks.order(32, 256).reshape(4, 16, 16)
    np.testing.assert_array_equal(order[:, 0, 0], [0, 16, 512, 528])
    np.testing.assert_array_equal(order[3], np.arange(1024).reshape(32, 32)[16:, 16:])


@pytest.mark.parametrize("size", [2, 8, 9, 0, 256])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"choose from \[1, 4, 16, 64\]"):
        square_blocks.order(8, size)
