import pytest

from ddt_jax.training.speed import Speed


def test_figures_are_per_chip():
    # 8 rows of 4,096 tokens a second on 16 chips; 3e12 operations for a row on chips of 1e13.
    found = Speed("token", 4096, 16, 3e12, 1e13).figures(8.0)
    assert found == {"tokens_per_second_per_chip": 2048.0, "mfu": pytest.approx(8 * 3e12 / (16 * 1e13))}


def test_without_figures_of_the_chip_there_is_no_mfu():
    assert Speed("image", 1, 4).figures(100.0) == {"images_per_second_per_chip": 25.0}
