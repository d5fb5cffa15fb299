"""The Frechet distance against closed forms and the formula with a matrix square root; streaming against NumPy."""

import os

import numpy as np
import pytest
from scipy import linalg

from ddt_jax.evaluation import frechet


def gaussian(d, seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    return rng.normal(size=d), root @ root.T / d


def by_sqrtm(mean_a, covariance_a, mean_b, covariance_b):
    product = linalg.sqrtm(covariance_a @ covariance_b).real
    return np.square(mean_a - mean_b).sum() + np.trace(covariance_a + covariance_b - 2 * product)


@pytest.mark.parametrize("d", [1, 3, 64])
def test_equals_the_formula_with_sqrtm(d):
    a, b = gaussian(d, 1), gaussian(d, 2)
    np.testing.assert_allclose(frechet.gaussian_distance(*a, *b), by_sqrtm(*a, *b), rtol=1e-10)


def test_closed_form_of_gaussians_with_common_axes():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    (mean_a, mean_b), (s_a, s_b) = rng.normal(size=(2, 16)), rng.uniform(0.1, 5, (2, 16))
    covariance_a, covariance_b = ((axes * s**2) @ axes.T for s in (s_a, s_b))
    expected = np.square(mean_a - mean_b).sum() + np.square(s_a - s_b).sum()
    got = frechet.gaussian_distance(mean_a, covariance_a, mean_b, covariance_b)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_singular_covariances_have_their_exact_distance():
    """Two of rank one, u u' and v v': the trace of the root is |u.v|. Fewer examples than features are no worse."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 40))
    got = frechet.gaussian_distance(np.zeros(40), np.outer(u, u), np.zeros(40), np.outer(v, v))
    np.testing.assert_allclose(got, u @ u + v @ v - 2 * abs(u @ v), rtol=1e-12)
    few = frechet.Moments.of(rng.normal(size=(10, 40)))
    assert frechet.distance(few, few) < 1e-10
    assert np.isfinite(frechet.distance(few, frechet.Moments.of(rng.normal(size=(1, 40)))))


def test_sets_in_subspaces_at_right_angles_share_nothing():
    """The trace of the root is 0, to which the roots of rounded zeros would add 1e-8 each."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    a, b = ((x * rng.uniform(1, 5, 25)) @ x.T for x in (axes[:, :25], axes[:, 25:50]))
    got = frechet.gaussian_distance(np.zeros(60), a, np.zeros(60), b)
    np.testing.assert_allclose(got, np.trace(a) + np.trace(b), rtol=1e-12)


def test_a_shift_is_its_square_and_order_does_not_matter():
    x = np.random.default_rng(0).normal(size=(300, 8))
    a, b = frechet.Moments.of(x), frechet.Moments.of(x + 3)
    np.testing.assert_allclose(frechet.distance(a, b), 8 * 9, rtol=1e-9)
    other = frechet.Moments.of(x[:100] ** 2)
    np.testing.assert_allclose(frechet.distance(a, other), frechet.distance(other, a), rtol=1e-9)


def test_streaming_equals_all_at_once_even_far_from_zero():
    x = (np.random.default_rng(0).normal(size=(1000, 5)) + 1e6).astype(np.float64)
    got = frechet.moments(x[i : i + 37] for i in range(0, 1000, 37))
    assert got.count == 1000
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(got.covariance, np.cov(x.T), rtol=1e-7, atol=1e-7)


def test_half_precision_features_are_summed_in_float64():
    x = np.full((5000, 1), 100, np.float16)  # their sum is beyond float16
    assert frechet.moments([x, x]).mean == 100.0


def test_bad_features_are_refused():
    for bad in (np.zeros((0, 3)), np.zeros(3), np.array([[np.nan]])):
        with pytest.raises(ValueError, match="features"):
            frechet.moments([bad])
    with pytest.raises(ValueError, match="none"):
        frechet.moments([])
    with pytest.raises(ValueError, match="3 and 2 features"):
        frechet.distance(frechet.Moments.of(np.eye(3)), frechet.Moments.of(np.eye(2)))


@pytest.mark.slow
def test_equals_a_pytorch_tool_on_the_same_features(oracle):
    """torchmetrics sums the roots of the eigenvalues of the product, on features that an extractor hands through."""
    torch, fid = oracle("torch"), oracle("torchmetrics.image.fid")

    class Same(torch.nn.Module):
        num_features = 24

        def forward(self, x):
            return x

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 24)) @ rng.normal(size=(24, 24)), rng.gamma(2.0, size=(300, 24))
    tool = fid.FrechetInceptionDistance(feature=Same(), input_img_size=(24,)).set_dtype(torch.float64)
    tool.update(torch.tensor(x), real=True)
    tool.update(torch.tensor(y), real=False)
    got = frechet.distance(frechet.Moments.of(x), frechet.Moments.of(y))
    np.testing.assert_allclose(got, float(tool.compute()), rtol=1e-10)


def test_kept_moments_are_found_by_the_whole_key_and_damaged_ones_are_not(tmp_path):
    first = frechet.Moments.of(np.random.default_rng(1).normal(size=(9, 3)))
    folder, key = tmp_path / "a", {"source": "x", "size": 32}
    assert frechet.read(folder, key) is None
    path = frechet.keep(folder, key, first)
    again = frechet.read(folder, {"size": 32, "source": "x"})
    assert again.count == 9 and frechet.distance(first, again) < 1e-12
    np.testing.assert_array_equal(again.scatter, first.scatter)
    assert frechet.read(folder, key | {"size": 64}) is None
    path.write_bytes(path.read_bytes()[:-50])
    assert frechet.read(folder, key) is None
    frechet.keep(folder, key, first)
    assert frechet.read(folder, key).count == 9 and os.listdir(folder) == [path.name]
