"""Frechet distance between two sets of features: the FID when the features are Inception's (Heusel et al. 2017).

Both sets are taken for Gaussians; the distance is |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)). All of it is float64 on the
host: two covariances that nearly cancel leave no digits in float32. Which features, the caller decides.

Legend: N examples, D features.
"""

import hashlib
import io
import json
from dataclasses import dataclass

import numpy as np
from etils import epath

from ddt_jax.io import atomic


@dataclass(frozen=True)
class Moments:
    """What the distance needs to know of a set of features. Sets are joined with `+`, in any order.

    Attributes:
      count: N.
      mean: float64 [D].
      scatter: sum of the outer products of the centred features, float64 [D, D].
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features_ND) -> "Moments":
        """Moments of features.

        Args:
          features_ND: any float type; it is widened first.
        Raises:
          ValueError: for another number of dimensions, no rows, or values that are not finite.
        """
        x_ND = np.asarray(features_ND).astype(np.float64)
        if x_ND.ndim != 2 or not len(x_ND):
            raise ValueError(f"features must be [N, D] with at least one row; got {x_ND.shape}")
        if not np.isfinite(x_ND).all():
            raise ValueError("features must be finite")
        mean_D = x_ND.mean(axis=0)
        centred_ND = x_ND - mean_D
        return cls(len(x_ND), mean_D, centred_ND.T @ centred_ND)

    def __add__(self, other: "Moments") -> "Moments":
        # Chan et al. 1979: sums of squares minus squared sums, the short way, cancel where the mean is large.
        count = self.count + other.count
        step_D = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(step_D, step_D) * (self.count * other.count / count)
        return Moments(count, self.mean + step_D * (other.count / count), scatter)

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, [D, D]; zero for a single example."""
        return self.scatter / max(1, self.count - 1)


def moments(batches) -> Moments:
    """Moments over batches of features [n, D], of which one at a time is held.

    Raises:
      ValueError: for no batches, and as `Moments.of`.
    """
    total = None
    for features_ND in batches:
        part = Moments.of(features_ND)
        total = part if total is None else total + part
    if total is None:
        raise ValueError("features: there are none")
    return total


def distance(a: Moments, b: Moments) -> float:
    """Frechet distance of two sets, at least 0.

    Biased upwards for few examples, the more the fewer: compare only figures from equal counts. Covariances of fewer
    examples than features are singular, which is no difficulty here.

    Raises:
      ValueError: if the sets have different numbers of features.
    """
    return gaussian_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_distance(mean_a, covariance_a, mean_b, covariance_b) -> float:
    """As `distance`, from means [D] and covariances [D, D] (symmetric, no eigenvalue below 0 but for rounding).

    Raises:
      ValueError: if shapes differ.
    """
    mean_a, mean_b = (np.asarray(m, np.float64) for m in (mean_a, mean_b))
    covariance_a, covariance_b = (np.asarray(c, np.float64) for c in (covariance_a, covariance_b))
    d = len(mean_a)
    if mean_b.shape != (d,) or covariance_a.shape != (d, d) or covariance_b.shape != (d, d):
        raise ValueError(
            f"sets of {d} and {len(mean_b)} features, covariances {covariance_a.shape}, {covariance_b.shape}"
        )
    # tr (S S')^(1/2) is the sum of the roots of the eigenvalues of the symmetric R S' R, R = S^(1/2). With the root R'
    # of S' these are the singular values of R R': not squared and rooted, eigenvalues near 0 keep their digits, and
    # none comes out negative or complex, as with a square root of the product itself.
    overlap = np.linalg.svd(_root(covariance_a) @ _root(covariance_b), compute_uv=False).sum()
    found = np.square(mean_a - mean_b).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap
    return max(0.0, float(found))


def _root(covariance):
    values_D, vectors_DD = np.linalg.eigh((covariance + covariance.T) / 2)
    # Rounding turns the zeros of a singular matrix into 1e-16 of its largest eigenvalue; their roots would be 1e-8.
    least = len(values_D) * np.finfo(np.float64).eps * values_D[-1]
    return (vectors_DD * np.sqrt(np.where(values_D > least, values_D, 0.0))) @ vectors_DD.T


def digest(key: dict) -> str:
    """A name for JSON values, whatever the order of their keys: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]


def read(folder, key: dict) -> Moments | None:
    """What `keep` has put there; None if there is nothing, or a damaged file.

    Args:
      folder: local or remote.
      key: JSON values on which the moments depend: source, size and number of images, digest of the weights.
    """
    path = _path(folder, key)
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return Moments(int(file["count"]), file["mean"], file["scatter"])
    except Exception:  # zipfile, zlib and NumPy each have their own; all say that the file is of no use
        return None


def keep(folder, key: dict, moments: Moments):
    """Puts moments where `read` finds them, whole or not at all; returns the path. The folder is made when needed."""
    buffer = io.BytesIO()
    # The key itself is kept for a person who wonders what a file is.
    text = json.dumps(key, sort_keys=True)
    np.savez(buffer, count=moments.count, mean=moments.mean, scatter=moments.scatter, key=text)
    return atomic.write_bytes(_path(folder, key), buffer.getvalue())


def _path(folder, key):
    return epath.Path(folder) / f"features-{digest(key)}.npz"
