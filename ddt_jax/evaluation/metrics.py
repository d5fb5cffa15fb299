"""Figures about images, codes and accuracies. NumPy only: they judge what was saved, not what is on the device.

Legend: N images, H height, W width, C channels, K tokens.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import ndimage, special

MAX_PSNR = 100.0  # dB, given to identical images, whose PSNR would be infinite and spoil a mean
SSIM_WINDOW = 11
_SSIM_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03
_CHUNK = 128  # images per SSIM pass: bounds the memory of its float64 planes


def _check_pair(a, b):
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"images must be uint8, as saved; got {a.dtype} and {b.dtype}")
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"images must be two equal [N, H, W, C]; got {a.shape} and {b.shape}")


def psnr(a_NHWC, b_NHWC):
    """Peak signal-to-noise ratio of each pair of images, in dB; at most `MAX_PSNR`. Average these, never their errors.

    Args:
      a_NHWC, b_NHWC: uint8.
    Returns:
      float64 [N].

    Raises:
      ValueError: for other dtypes or shapes.
    """
    a_NHWC, b_NHWC = np.asarray(a_NHWC), np.asarray(b_NHWC)
    _check_pair(a_NHWC, b_NHWC)
    difference = a_NHWC.astype(np.float64) - b_NHWC
    mse_N = np.mean(np.square(difference), axis=(1, 2, 3))
    floor = 255.0**2 / 10 ** (MAX_PSNR / 10)
    return 10 * np.log10(255.0**2 / np.maximum(mse_N, floor))


def _gaussian_window():
    x = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    w = np.exp(-0.5 * np.square(x / _SSIM_SIGMA))
    return w / w.sum()


def ssim(a_NHWC, b_NHWC):
    """Structural similarity of each pair of images: Wang et al. 2004, 11x11 Gaussian window of sigma 1.5.

    Each channel by itself, then their mean, over the positions where the window fits into the image. Equals
    scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.

    Args:
      a_NHWC, b_NHWC: uint8, at least 11 pixels high and wide.
    Returns:
      float64 [N].

    Raises:
      ValueError: for other dtypes or shapes, or smaller images.
    """
    a_NHWC, b_NHWC = np.asarray(a_NHWC), np.asarray(b_NHWC)
    _check_pair(a_NHWC, b_NHWC)
    if min(a_NHWC.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels; got {a_NHWC.shape[1:3]}")
    parts = [
        _ssim(a_NHWC[i : i + _CHUNK].astype(np.float64), b_NHWC[i : i + _CHUNK].astype(np.float64))
        for i in range(0, len(a_NHWC), _CHUNK)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def _ssim(a, b):
    window = _gaussian_window()
    margin = SSIM_WINDOW // 2

    def local_mean(x):
        x = ndimage.correlate1d(x, window, axis=1)[:, margin:-margin]
        return ndimage.correlate1d(x, window, axis=2)[:, :, margin:-margin]

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a = local_mean(a * a) - mean_a**2
    var_b = local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return np.mean(luminance * structure, axis=(1, 2, 3))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of independent values. Infinite for fewer than two."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return -math.inf, math.inf
    half = special.stdtrit(n - 1, 0.5 + confidence / 2) * statistics.stdev(values) / math.sqrt(n)
    return mean - float(half), mean + float(half)


def binomial_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of an accuracy: keeps its coverage near 0 and 1, where the normal one does not.

    Returns:
      (low, high) in [0, 1]; (0, 1) for n = 0.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the bounds are 0 and 1 by algebra; rounding must not move them.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def _perplexity(counts):
    p = counts[counts > 0] / counts.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


def codebook_usage(codes_NK, codebook_size: int) -> dict:
    """How much of a codebook is in use.

    Perplexity is exp(entropy) of the codes seen: the number of equally used codes that would be as diverse. With few
    images it is bounded by the number of codes seen, N per position.

    Args:
      codes_NK: integers in [0, codebook_size).
    Returns:
      used (codes seen at least once), perplexity, and of length K used_by_position, perplexity_by_position.

    Raises:
      ValueError: for no codes, or codes outside the codebook.
    """
    codes_NK = np.asarray(codes_NK)
    if codes_NK.ndim != 2 or not codes_NK.size:
        raise ValueError(f"codes must be [N, K] and not empty; got {codes_NK.shape}")
    if codes_NK.min() < 0 or codes_NK.max() >= codebook_size:
        raise ValueError(f"codes lie in [{codes_NK.min()}, {codes_NK.max()}], the codebook has {codebook_size}")
    counts_K = [np.bincount(codes_N, minlength=codebook_size) for codes_N in codes_NK.T]
    total = np.sum(counts_K, axis=0)
    return {
        "used": int(np.count_nonzero(total)),
        "perplexity": _perplexity(total),
        "used_by_position": [int(np.count_nonzero(c)) for c in counts_K],
        "perplexity_by_position": [_perplexity(c) for c in counts_K],
    }
