"""What codes know and in what order they say it: classifiers on the first tokens, entropy under other orders, and
pictures from the tokens of two images.

NumPy and SciPy on the host, in float64 and without randomness: the same codes give the same figures.

Legend: N images, M images of the training half, K tokens, d dimensions of a code's vector, D of a feature, C classes,
V codes of the codebook.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from ddt_jax.evaluation import metrics, pictures, reconstruction

NEIGHBOURS = 20
TEMPERATURE = (
    0.07  # of the neighbours' votes; this and 20 as in Caron et al. 2021 (arXiv 2104.14294), from Wu et al. 2018
)
_CHUNK = 256  # images per table of similarities


def prefix_features(vectors_NKd, k: int) -> np.ndarray:
    """The vectors of the first k tokens, side by side. [N, K, d] → float64 [N, k d]."""
    vectors_NKd = np.asarray(vectors_NKd)
    if vectors_NKd.ndim != 3 or not 1 <= k <= vectors_NKd.shape[1]:
        raise ValueError(f"probes: {k} tokens of vectors {vectors_NKd.shape}, which must be [N, K, d]")
    return vectors_NKd[:, :k].reshape(len(vectors_NKd), -1).astype(np.float64)


def knn_predict(train_MD, labels_M, test_ND, *, neighbours: int = NEIGHBOURS, temperature: float = TEMPERATURE):
    """The label with most weight among the nearest neighbours: cosine similarity s votes with exp(s / temperature).

    Args:
      train_MD, test_ND: float features; rows of zeros are similar to none.
      labels_M: integers from 0.
      neighbours: at most M are used.
    Returns:
      int [N]; the smallest of labels with equal weight.

    Raises:
      ValueError: for shapes that do not fit.
    """
    train_MD, labels_M, test_ND = _checked(train_MD, labels_M, test_ND)
    train_MD, test_ND = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train_MD, test_ND))
    neighbours, found = min(neighbours, len(train_MD)), []
    for start in range(0, len(test_ND), _CHUNK):
        similar_NM = test_ND[start : start + _CHUNK] @ train_MD.T
        # Stable, so that ties at the edge go to the earlier image on every machine.
        nearest_Nk = np.argsort(-similar_NM, axis=1, kind="stable")[:, :neighbours]
        weight_Nk = np.exp((np.take_along_axis(similar_NM, nearest_Nk, axis=1) - 1) / temperature)
        votes_NC = np.zeros((len(similar_NM), labels_M.max() + 1))
        np.add.at(votes_NC, (np.arange(len(similar_NM))[:, None], labels_M[nearest_Nk]), weight_Nk)
        found.append(votes_NC.argmax(axis=1))
    return np.concatenate(found) if found else np.zeros(0, int)


def linear_predict(train_MD, labels_M, test_ND, *, l2: float = 1e-3, iterations: int = 500):
    """Labels by multinomial logistic regression, fitted by L-BFGS from zero.

    Minimises mean cross-entropy + l2 / 2 |W|^2 over features with the mean and deviation of the training half taken
    out; biases are free of the penalty. It is convex, so the start does not matter.

    Args:
      train_MD, test_ND: float features.
      labels_M: integers from 0.
    Returns:
      int [N].

    Raises:
      ValueError: for shapes that do not fit, or l2 that is not positive (separable classes would have no minimum).
    """
    if l2 <= 0:
        raise ValueError(f"probes: l2 must be above 0, got {l2}")
    train_MD, labels_M, test_ND = _checked(train_MD, labels_M, test_ND)
    mean_D, deviation_D = train_MD.mean(axis=0), train_MD.std(axis=0)
    deviation_D = np.where(deviation_D > 1e-12 * (1 + np.abs(mean_D)), deviation_D, 1.0)  # a constant says nothing
    train_MD, test_ND = ((x - mean_D) / deviation_D for x in (train_MD, test_ND))
    m, d, c = *train_MD.shape, int(labels_M.max()) + 1
    rows = np.arange(m)

    def objective(flat):
        kernel_DC, bias_C = flat[:-c].reshape(d, c), flat[-c:]
        logits_MC = train_MD @ kernel_DC + bias_C
        log_p_MC = logits_MC - special.logsumexp(logits_MC, axis=1, keepdims=True)
        error_MC = np.exp(log_p_MC)
        error_MC[rows, labels_M] -= 1
        gradient_DC = train_MD.T @ error_MC / m + l2 * kernel_DC
        value = -log_p_MC[rows, labels_M].mean() + l2 / 2 * np.square(kernel_DC).sum()
        return value, np.concatenate([gradient_DC.reshape(-1), error_MC.mean(axis=0)])

    options = {"maxiter": iterations, "maxfun": 2 * iterations, "gtol": 1e-6, "ftol": 1e-12}
    flat = optimize.minimize(objective, np.zeros(d * c + c), jac=True, method="L-BFGS-B", options=options).x
    return (test_ND @ flat[:-c].reshape(d, c) + flat[-c:]).argmax(axis=1)


def accuracy(predicted_N, labels_N) -> dict[str, Any]:
    """Share of right labels with Wilson's interval of 95 %: {"accuracy", "interval", "n"}."""
    right, n = int(np.sum(np.asarray(predicted_N) == np.asarray(labels_N))), len(labels_N)
    if not n:
        raise ValueError("probes: there are no images to judge")
    return {"accuracy": right / n, "interval": list(metrics.binomial_interval(right, n)), "n": n}


def probe_prefixes(
    train_MKd, train_labels_M, test_NKd, test_labels_N, shares: Iterable[float], *, l2: float = 1e-3
) -> dict[str, dict]:
    """Accuracy of both classifiers on the first tokens, for growing numbers of them.

    Args:
      train_MKd, test_NKd: vectors of the codes, as the tokenizer's quantizer looks them up.
      shares: of the tokens, see `reconstruction.visible_counts`.
    Returns:
      {"2": {"knn": {...}, "linear": {...}}, ...}, each as `accuracy` gives it.

    Raises:
      ValueError: for shapes that do not fit.
    """
    found = {}
    for k in reconstruction.visible_counts(shares, np.shape(train_MKd)[1]):
        train_MD, test_ND = prefix_features(train_MKd, k), prefix_features(test_NKd, k)
        found[str(k)] = {
            "knn": accuracy(knn_predict(train_MD, train_labels_M, test_ND), test_labels_N),
            "linear": accuracy(linear_predict(train_MD, train_labels_M, test_ND, l2=l2), test_labels_N),
        }
    return found


def stride_order(num_tokens: int, stride: int) -> np.ndarray:
    """Positions 0, s, 2s, ..., then 1, 1 + s, ...: neighbours of the natural order are torn apart; 1 is natural."""
    if not 1 <= stride <= num_tokens:
        raise ValueError(f"probes: a stride of {stride} over {num_tokens} tokens")
    return np.concatenate([np.arange(start, num_tokens, stride) for start in range(stride)])


def next_token_entropy(train_MK, test_NK, codebook_size: int, order_K=None) -> np.ndarray:
    """Nats that a code costs when the one before it is known, at each place of an order.

    Selftok (arXiv 2505.07538) asks whether codes become easier to guess along their order, and whether another order
    destroys that. There a large model guesses; here pairs are counted, each place by itself, and backed off to single
    codes by Witten and Bell's estimate. It is measured on images that were not counted, so it is an upper bound of the
    entropy given one code, not flattered by chance as a plug-in estimate would be. What longer contexts would tell is
    left out, and with few images per code both orders come near the entropy of single codes.

    Args:
      train_MK, test_NK: integers in [0, codebook_size).
      order_K: permutation of the positions, see `stride_order`; None: natural.
    Returns:
      float64 [K], in the order's sequence; the first is without a context.

    Raises:
      ValueError: for codes outside the codebook, shapes that do not fit, or an order that is no permutation.
    """
    train_MK, test_NK = np.asarray(train_MK), np.asarray(test_NK)
    if train_MK.ndim != 2 or test_NK.ndim != 2 or train_MK.shape[1] != test_NK.shape[1] or not test_NK.size:
        raise ValueError(f"probes: codes {train_MK.shape} and {test_NK.shape} must be [M, K] and [N, K]")
    if any(x.size and (x.min() < 0 or x.max() >= codebook_size) for x in (train_MK, test_NK)):
        raise ValueError(f"probes: codes outside of a codebook of {codebook_size}")
    k = train_MK.shape[1]
    order_K = np.arange(k) if order_K is None else np.asarray(order_K)
    if not np.array_equal(np.sort(order_K), np.arange(k)):
        raise ValueError(f"probes: the order must hold each of {k} positions once")
    train_MK, test_NK = train_MK[:, order_K].astype(np.int64), test_NK[:, order_K].astype(np.int64)
    cost_K = np.zeros(k)
    for i in range(k):
        seen_V = np.bincount(train_MK[:, i], minlength=codebook_size)
        p_N = _backed_off(seen_V[test_NK[:, i]], len(train_MK), np.count_nonzero(seen_V), 1 / codebook_size)
        if i > 0:
            # Pairs as sorted numbers: a table of V x V would not fit for large codebooks.
            pairs, counts = np.unique(train_MK[:, i - 1] * codebook_size + train_MK[:, i], return_counts=True)
            wanted_N = test_NK[:, i - 1] * codebook_size + test_NK[:, i]
            at_N = np.minimum(np.searchsorted(pairs, wanted_N), max(0, len(pairs) - 1))
            count_N = np.where(pairs[at_N] == wanted_N, counts[at_N], 0) if len(pairs) else 0 * wanted_N
            context_V = np.bincount(train_MK[:, i - 1], minlength=codebook_size)
            followers_V = np.bincount(pairs // codebook_size, minlength=codebook_size)
            before_N = test_NK[:, i - 1]
            p_N = _backed_off(count_N, context_V[before_N], followers_V[before_N], p_N)
        cost_K[i] = -np.log(p_N).mean()
    return cost_K


def _backed_off(count, total, kinds, fallback):
    """Witten and Bell 1991: something new is as likely as new kinds were frequent; the fallback shares that out."""
    weight = np.where(np.asarray(total) > 0, kinds, 1)
    return (count + weight * fallback) / (total + weight)


def order_entropies(train_MK, test_NK, codebook_size: int, strides: Iterable[int] = (1, 2, 4)) -> dict[str, dict]:
    """`next_token_entropy` under several strides, 1 being natural: {"1": {"mean": nats, "by_place": [K]}, ...}."""
    found = {}
    for stride in strides:
        order_K = stride_order(np.shape(train_MK)[1], stride)
        cost_K = next_token_entropy(train_MK, test_NK, codebook_size, order_K)
        found[str(stride)] = {"mean": float(cost_K.mean()), "by_place": cost_K.tolist()}
    return found


def swap_tokens(a_NK, b_NK, positions) -> np.ndarray:
    """Codes of A with B's at some positions. int32 [N, K].

    Raises:
      ValueError: for codes of different shapes, or positions that there are not.
    """
    a_NK, b_NK = np.asarray(a_NK, np.int32), np.asarray(b_NK, np.int32)
    positions = np.asarray(positions, np.int64)
    if a_NK.shape != b_NK.shape or a_NK.ndim != 2:
        raise ValueError(f"probes: codes {a_NK.shape} and {b_NK.shape} must be two equal [N, K]")
    if positions.size and not (positions.min() >= 0 and positions.max() < a_NK.shape[1]):
        raise ValueError(f"probes: positions {positions.min()} to {positions.max()} of {a_NK.shape[1]} tokens")
    mixed_NK = a_NK.copy()
    mixed_NK[:, positions] = b_NK[:, positions]
    return mixed_NK


def counterfactuals(
    tokenizer, params, extra, a_NHWC, b_NHWC, subsets: dict[str, Any], *, seed: int = 0, put: Callable = jnp.asarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Images from A's tokens with some of them taken from B: which attributes follow which tokens.

    Selftok's page shows that swapped tokens of a spatial tokenizer cut and paste, those of this kind change attributes.
    The noise of the decoder is the same for all rows of a column, so that they differ by their tokens alone.

    Args:
      params, extra: of the tokenizer, the weight average as a rule.
      a_NHWC, b_NHWC: uint8, equal shapes.
      subsets: label → positions that take B's tokens.
      put: host array → device.
    Returns:
      ({label: uint8 [N, H, W, C]}, uint8 [H, W, 3]): the images, and a picture with A on top, A's reconstruction, a row
      per subset, B's reconstruction and B.

    Raises:
      ValueError: for images of different shapes, or positions that there are not.
    """
    a_NHWC, b_NHWC = np.asarray(a_NHWC), np.asarray(b_NHWC)
    if a_NHWC.shape != b_NHWC.shape:
        raise ValueError(f"probes: images {a_NHWC.shape} and {b_NHWC.shape} must have one shape")
    run = reconstruction.programs(tokenizer)
    a_NK, b_NK = (np.asarray(run.encode(params, extra, put(x))) for x in (a_NHWC, b_NHWC))
    index_N = np.arange(len(a_NHWC), dtype=np.int32)

    def decode(codes_NK):
        k = np.int32(tokenizer.num_tokens)
        return np.asarray(run.decode(params, extra, put(codes_NK), index_N, np.uint32(seed), k))

    mixed = {str(label): decode(swap_tokens(a_NK, b_NK, positions)) for label, positions in subsets.items()}
    rows = {"A from tokens": decode(a_NK)} | mixed | {"B from tokens": decode(b_NK), "B": b_NHWC}
    return mixed, pictures.reconstruction_grid(a_NHWC, rows)


def _checked(train_MD, labels_M, test_ND):
    train_MD, test_ND = (np.asarray(x, np.float64) for x in (train_MD, test_ND))
    labels_M = np.asarray(labels_M)
    shapes = f"features {train_MD.shape} and {test_ND.shape}, labels {labels_M.dtype} {labels_M.shape}"
    if train_MD.ndim != 2 or test_ND.ndim != 2 or train_MD.shape[1] != test_ND.shape[1] or not len(train_MD):
        raise ValueError(f"probes: {shapes} do not fit")
    if labels_M.shape != (len(train_MD),) or labels_M.dtype.kind not in "iu" or labels_M.min() < 0:
        raise ValueError(f"probes: {shapes}; labels are integers from 0, one for each row")
    return train_MD, labels_M, test_ND
