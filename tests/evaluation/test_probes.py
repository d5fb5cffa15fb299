"""Classifiers on code vectors against scikit-learn and brute force; entropies against known sources."""

import numpy as np
import pytest
from scipy import optimize, special
from sklearn.linear_model import LogisticRegression

from ddt_jax.evaluation import probes


def clusters(n, seed, d=6, classes=3, spread=1.5):
    centres = np.random.default_rng(0).normal(size=(classes, d)) * 2
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return centres[labels] + rng.normal(0, spread, (n, d)), labels


def test_neighbours_vote_as_by_brute_force():
    (train, labels), (test, _) = clusters(80, 1), clusters(300, 2)
    expected = []
    for x in test:
        similar = [float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for y in train]
        votes = np.zeros(3)
        for i in sorted(range(80), key=lambda i: -similar[i])[:20]:
            votes[labels[i]] += np.exp(similar[i] / 0.07)
        expected.append(votes.argmax())
    np.testing.assert_array_equal(probes.knn_predict(train, labels, test), expected)
    assert len(set(expected)) == 3


def test_a_near_neighbour_outweighs_many_far_ones():
    train = np.array([[1.0, 0.0]] + [[0.6, 0.8]] * 10)
    assert probes.knn_predict(train, np.array([0] + [1] * 10), [[1.0, 0.05]]) == [0]


@pytest.mark.parametrize("l2", [0.01, 10.0])
def test_logistic_regression_equals_scikit_learn(l2):
    (train, labels), (test, truth) = clusters(200, 1), clusters(400, 2)
    train, test = ((x * [1, 10, 0.1, 1, 1, 0] + 5) for x in (train, test))  # scales, and a constant feature
    got = probes.linear_predict(train, labels, test, l2=l2)
    mean, deviation = train.mean(0), train.std(0) + (np.arange(6) == 5)
    oracle = LogisticRegression(C=1 / (l2 * 200), tol=1e-8, max_iter=2000).fit((train - mean) / deviation, labels)
    # An image on the border may fall either way.
    assert np.mean(got == oracle.predict((test - mean) / deviation)) > 0.995
    assert np.mean(got == truth) > (0.6 if l2 < 1 else 1 / 3)  # a strong penalty leaves little but the biases
    np.testing.assert_array_equal(got, probes.linear_predict(train, labels, test, l2=l2))


def test_prefixes_know_more_with_the_token_that_carries_the_label():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    vectors = rng.normal(size=(300, 4, 3))
    vectors[:, 2, 0] += 6 * labels  # the third token tells
    found = probes.probe_prefixes(vectors[:200], labels[:200], vectors[200:], labels[200:], (0.5, 0.75, 1.0))
    assert list(found) == ["2", "3", "4"]
    for kind in ("knn", "linear"):
        assert found["2"][kind]["accuracy"] < 0.7 < 0.85 < found["3"][kind]["accuracy"]
        low, high = found["3"][kind]["interval"]
        assert low < found["3"][kind]["accuracy"] < high and found["3"][kind]["n"] == 100


def test_entropy_of_independent_codes_is_that_of_the_source():
    p = np.array([0.5, 0.25, 0.125, 0.125])
    codes = np.random.default_rng(0).choice(4, size=(20000, 3), p=p)
    got = probes.next_token_entropy(codes[:10000], codes[10000:], 4)
    np.testing.assert_allclose(got, -(p * np.log(p)).sum(), atol=0.02)  # four standard errors of 10,000 draws


def test_a_chain_is_cheap_in_its_own_order_alone():
    """Each code is the one before it plus 0 or 1: log 2. Two steps apart it is 1.5 log 2, by the binomial."""
    rng = np.random.default_rng(0)
    steps = np.concatenate([rng.integers(0, 8, (6000, 1)), rng.integers(0, 2, (6000, 7))], axis=1)
    codes = steps.cumsum(1) % 8
    found = probes.order_entropies(codes[:5000], codes[5000:], 8, (1, 2))
    np.testing.assert_allclose(found["1"]["by_place"], [np.log(8)] + [np.log(2)] * 7, atol=0.03)
    by_place = np.array(found["2"]["by_place"])
    np.testing.assert_allclose(by_place[[1, 2, 3, 5, 6, 7]], 1.5 * np.log(2), atol=0.06)
    assert found["2"]["mean"] > found["1"]["mean"] + 0.2


def test_codes_never_seen_cost_a_finite_price_and_large_codebooks_fit():
    got = probes.next_token_entropy(np.zeros((5, 3), int), np.full((2, 3), 32767), 32768)
    assert np.all(np.isfinite(got)) and np.all(got > np.log(32768))
    nothing_seen = probes.next_token_entropy(np.zeros((0, 3), int), np.full((2, 3), 7), 8)
    np.testing.assert_allclose(nothing_seen, np.log(8))


def test_entropy_shares_of_all_codes_add_up_to_one():
    """The estimate is a distribution at each place: over all 25 pairs of codes its products add up to 1."""
    train = np.random.default_rng(0).integers(0, 4, (30, 2))
    total = 0.0
    for a in range(5):
        for b in range(5):
            total += np.exp(-probes.next_token_entropy(train, np.array([[a, b]]), 5).sum())
    np.testing.assert_allclose(total, 1, rtol=1e-9)


def test_mixture_is_the_likeliest_by_another_optimizer():
    shares = np.random.default_rng(0).gamma(0.3, size=(50, 3))

    def cost(logits):
        weight = np.exp(logits - special.logsumexp(logits))
        return -np.log(shares @ weight).sum() - np.log(weight).sum()

    best = optimize.minimize(cost, np.zeros(3), tol=1e-10).x
    np.testing.assert_allclose(probes._mixture(shares, 2000), np.exp(best - special.logsumexp(best)), rtol=1e-4)


def test_shares_by_hand_and_without_an_image_s_own_count():
    train = np.array([[0, 0], [0, 1], [0, 1], [1, 1]])
    np.testing.assert_allclose(probes._shares(train, train[:1], 1, 2, own=0), [[1 / 2, 1 / 4, 1 / 3]])
    np.testing.assert_allclose(
        probes._shares(train, train, 1, 2, own=1),
        [[1 / 2, 0, 0], [1 / 2, 2 / 3, 1 / 2], [1 / 2, 2 / 3, 1 / 2], [1 / 2, 2 / 3, 2 / 3]],  # the last has no context
    )
    np.testing.assert_allclose(probes._shares(train, train, 0, 2, own=1), [[1 / 2, 2 / 3]] * 3 + [[1 / 2, 0]])


def test_codes_without_any_pattern_cost_what_uniform_ones_do():
    """Few images per code: a count must not be taken for a pattern."""
    codes = np.random.default_rng(0).integers(0, 4096, (1500, 8))
    got = probes.next_token_entropy(codes[:1000], codes[1000:], 4096)
    np.testing.assert_allclose(got, np.log(4096), atol=0.02)


def test_strides_are_permutations():
    assert probes.stride_order(5, 1).tolist() == [0, 1, 2, 3, 4]
    assert probes.stride_order(5, 2).tolist() == [0, 2, 4, 1, 3]
    with pytest.raises(ValueError, match="stride"):
        probes.stride_order(5, 6)


def test_swapped_tokens_are_those_of_b():
    a, b = np.arange(6).reshape(2, 3), 10 + np.arange(6).reshape(2, 3)
    assert probes.swap_tokens(a, b, [2, 0]).tolist() == [[10, 1, 12], [13, 4, 15]]
    assert probes.swap_tokens(a, b, []).tolist() == a.tolist()
    for positions in ([3], [-1]):
        with pytest.raises(ValueError, match="positions"):
            probes.swap_tokens(a, b, positions)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: probes.knn_predict(x, y[:-1], x),
        lambda x, y: probes.knn_predict(x, y - 5, x),
        lambda x, y: probes.linear_predict(x, y, x[:, :2]),
        lambda x, y: probes.linear_predict(x, y, x, l2=0.0),
        lambda x, y: probes.accuracy([], []),
        lambda x, y: probes.prefix_features(x, 1),
        lambda x, y: probes.next_token_entropy(y[:, None], y[:, None] + 9, 3),
        lambda x, y: probes.next_token_entropy(y[:, None], y[:, None], 3, [1]),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match="probes"):
        call(*clusters(20, 0))
