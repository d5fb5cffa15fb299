import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ddt_jax.evaluation import metrics


def _images(rng, n=5, h=24, w=32, c=3):
    return rng.integers(0, 256, (n, h, w, c), dtype=np.uint8)


def _noisy(rng, images, sigma):
    return np.clip(images + rng.normal(0, sigma, images.shape), 0, 255).astype(np.uint8)


def test_psnr_equals_scikit_image_per_image():
    skimage = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(0)
    a = _images(rng)
    b = np.stack([_noisy(rng, a[i], 1 + 12 * i) for i in range(5)])
    expected = [skimage.peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.psnr(a, b), expected, rtol=1e-12)


def test_psnr_does_not_wrap_in_8_bits():
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert metrics.psnr(black, white)[0] == 0 and metrics.psnr(white, black)[0] == 0


def test_psnr_of_identical_images_is_the_cap_and_the_smallest_error_lies_below():
    a = _images(np.random.default_rng(1), n=2, h=32)
    b = a.copy()
    b[1, 0, 0, 0] ^= 1
    value = metrics.psnr(a, b)
    assert value[0] == metrics.MAX_PSNR
    assert value[1] == pytest.approx(10 * np.log10(255**2 * 32 * 32 * 3))
    assert value[1] < metrics.MAX_PSNR


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_only_equal_8_bit_batches_are_judged(metric):
    a = _images(np.random.default_rng(0))
    with pytest.raises(ValueError, match="uint8"):
        metric(a, a.astype(np.float32))
    with pytest.raises(ValueError, match="equal"):
        metric(a, a[:1])  # would broadcast silently
    with pytest.raises(ValueError, match="equal"):
        metric(a[0], a[0])


@pytest.mark.parametrize("shape", [(11, 11, 3), (24, 37, 3), (32, 32, 1)])
def test_ssim_equals_scikit_image(shape):
    skimage = pytest.importorskip("skimage.metrics")
    rng = np.random.default_rng(2)
    smooth = np.cumsum(rng.normal(0, 8, (4, *shape)), axis=1)
    a = np.clip(128 + smooth, 0, 255).astype(np.uint8)
    b = np.stack([_noisy(rng, a[0], 3), a[1], 255 - a[2], np.full(shape, 90, np.uint8)])
    expected = [
        skimage.structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(a, b), expected, rtol=1e-9, atol=1e-12)
    assert metrics.ssim(a, b)[1] == 1


def test_ssim_is_the_same_in_chunks(monkeypatch):
    rng = np.random.default_rng(3)
    a, b = _images(rng, n=7), _images(rng, n=7)
    whole = metrics.ssim(a, b)
    monkeypatch.setattr(metrics, "_CHUNK", 3)
    np.testing.assert_array_equal(metrics.ssim(a, b), whole)


def test_ssim_refuses_images_smaller_than_its_window():
    a = _images(np.random.default_rng(0), h=8, w=8)
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(a, a)


def test_interval_equals_published_values_and_scipy():
    # Newcombe 1998, table I, method 3 (score, without continuity correction).
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert metrics.binomial_interval(successes, n) == pytest.approx((low, high), abs=5e-5)

    for successes, n in [(0, 1), (1, 1), (3, 7), (500, 1024), (1023, 1024)]:
        for confidence in (0.9, 0.95):
            expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
            assert metrics.binomial_interval(successes, n, confidence) == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_interval_holds_the_share_and_mirrors(a, b):
    n, k = max(a, b), min(a, b)
    low, high = metrics.binomial_interval(k, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= k / n <= high
        assert metrics.binomial_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_interval_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match="5 successes of 4"):
        metrics.binomial_interval(5, 4)


def test_codebook_usage_total_and_by_position():
    # Position 0: code 7 only. Position 1: codes 0..3 equally often. Position 2: p = (3/4, 1/4).
    codes = np.array([[7, 0, 1], [7, 1, 1], [7, 2, 1], [7, 3, 2]])
    usage = metrics.codebook_usage(codes, 8)
    assert usage["used_by_position"] == [1, 4, 2]
    h = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(usage["perplexity_by_position"], [1, 4, np.exp(h)])
    assert usage["used"] == 5
    p = np.array([1, 4, 2, 1, 4]) / 12  # codes 0, 1, 2, 3, 7
    assert usage["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("codes", [[[8]], [[-1]], [], np.zeros((0, 4), int)])
def test_codes_outside_the_codebook_are_refused(codes):
    with pytest.raises(ValueError, match="codes"):
        metrics.codebook_usage(np.array(codes, int), 8)
