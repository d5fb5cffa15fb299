"""What codes know and in what order they say it: classifiers on the first tokens, and entropy under other orders.

NumPy and SciPy on the host, in float64 and without randomness: the same codes give the same figures.

Legend: N images, M images of the training half, K tokens in reading order (coarse ones first), d dimensions of a code's
vector, D of a feature, C classes, V codes of the codebook.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import optimize, special

from ddt_jax.evaluation import metrics, reconstruction

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
    destroys that. There a large model guesses; here, at each place, shares of pairs, of single codes and of all codes
    alike are mixed with the weights that suit the counted images best, each judged without its own count (deleted
    interpolation, Jelinek and Mercer 1980). The cost is measured on images that were not counted, so it is an upper
    bound of the entropy given one code, and hardly ever above that of uniform codes. What longer contexts would tell is
    left out, and with few images per code all orders come near the entropy of single codes.

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
        weight_X = _mixture(_shares(train_MK, train_MK, i, codebook_size, own=1))
        cost_K[i] = -np.log(_shares(train_MK, test_NK, i, codebook_size, own=0) @ weight_X).mean()
    return cost_K


def _shares(train_MK, of_NK, i, codebook_size, own):
    """Probability of the code at place i if all codes are alike, by its count, and by that of pairs. [N, 2 or 3].

    Args:
      own: how often each of `of_NK` is among those counted; it is taken out.
    """
    here_N, m = of_NK[:, i], len(train_MK) - own
    uniform_N = np.full(len(of_NK), 1 / codebook_size)
    if m <= 0:
        return np.stack([uniform_N] * (2 if i == 0 else 3), axis=1)
    single_N = (np.bincount(train_MK[:, i], minlength=codebook_size)[here_N] - own) / m
    if i == 0:
        return np.stack([uniform_N, single_N], axis=1)
    # Pairs as sorted numbers: a table of V x V would not fit for large codebooks.
    pairs, counts = np.unique(train_MK[:, i - 1] * codebook_size + train_MK[:, i], return_counts=True)
    wanted_N = of_NK[:, i - 1] * codebook_size + here_N
    at_N = np.minimum(np.searchsorted(pairs, wanted_N), len(pairs) - 1)
    count_N = np.where(pairs[at_N] == wanted_N, counts[at_N], 0) - own
    context_N = np.bincount(train_MK[:, i - 1], minlength=codebook_size)[of_NK[:, i - 1]] - own
    pair_N = np.where(context_N > 0, count_N / np.maximum(1, context_N), single_N)  # a context never met tells nothing
    return np.stack([uniform_N, single_N, pair_N], axis=1)


def _mixture(shares_NX, iterations: int = 100):
    """Weights of the columns that make the rows likeliest, by expectation maximisation; one more row for each column
    keeps them above 0."""
    n, x = shares_NX.shape
    weight_X = np.full(x, 1 / x)
    for _ in range(iterations):
        part_NX = shares_NX * weight_X
        weight_X = ((part_NX / part_NX.sum(axis=1, keepdims=True)).sum(axis=0) + 1) / (n + x)
    return weight_X


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


def _checked(train_MD, labels_M, test_ND):
    train_MD, test_ND = (np.asarray(x, np.float64) for x in (train_MD, test_ND))
    labels_M = np.asarray(labels_M)
    shapes = f"features {train_MD.shape} and {test_ND.shape}, labels {labels_M.dtype} {labels_M.shape}"
    if train_MD.ndim != 2 or test_ND.ndim != 2 or train_MD.shape[1] != test_ND.shape[1] or not len(train_MD):
        raise ValueError(f"probes: {shapes} do not fit")
    if labels_M.shape != (len(train_MD),) or labels_M.dtype.kind not in "iu" or labels_M.min() < 0:
        raise ValueError(f"probes: {shapes}; labels are integers from 0, one for each row")
    return train_MD, labels_M, test_ND
