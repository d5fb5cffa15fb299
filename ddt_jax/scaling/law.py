"""The parametric scaling law L(N, D) = E + A / N^alpha + B / D^beta, fitted to runs, with intervals.

Hoffmann et al. 2022 (arXiv 2203.15556) §3.3: Huber loss on the logarithm of L, from many starts. Their minimiser is
L-BFGS; ours is Levenberg-Marquardt with Huber's weights, on many problems at once, for then a bootstrap costs little.
Losses are summed, not averaged: with an average their own fit stopped early (Besiroglu et al. 2024, arXiv 2404.10102).
Their threshold of 1e-3 stays where runs are as quiet as theirs. Under larger noise it would turn the fit into one of
absolute values, whose bootstrap holds the truth too rarely (measured: 80 to 85 of 100 where 95 were promised), so it
follows the noise that the residuals show.

Legend: R problems solved together, S runs, P the five parameters. Inside, these are (e, a, b, alpha, beta) with
E = exp(e), A / N^alpha = exp(a - alpha n) and B / D^beta = exp(b - beta d), where n and d are log N and log D less
their means over the runs, or a and alpha could hardly be told apart.
"""

from dataclasses import dataclass

import numpy as np
from scipy import optimize

from ddt_jax.errors import UserError
from ddt_jax.scaling import isoflop

HUBER = 1e-3  # of a residual of log L, at least; Hoffmann et al., D.2
_TUNING = 1.345  # times the deviation of residuals: 95 % of the efficiency of least squares, were they normal (Huber)
NAMES = ("E", "A", "B", "alpha", "beta")
DRAWS = 1000
_EXPONENTS = np.linspace(0.1, 1.3, 7)  # starts of alpha and of beta
_ITERATIONS = 100
_REST = 1e-7  # share of the loss by which a step must better it to go on
_LEAST = -12.0  # of e, a and b beside log L: a term below that share is none, and its direction is flat


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta; N parameters, D tokens or images, whichever the runs were counted in."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params, tokens):
        """Of arrays or numbers."""
        params, tokens = np.asarray(params, float), np.asarray(tokens, float)
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    @property
    def exponent(self) -> float:
        """a in N_opt ~ C^a (Hoffmann et al., eq. 4)."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops, per_token: float):
        """(N, D) of least loss for a cost C = per_token * N * D; 6 is what is usually taken."""
        gain = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        params = gain * (np.asarray(flops, float) / per_token) ** self.exponent
        return params, np.asarray(flops, float) / per_token / params


@dataclass(frozen=True)
class Fit:
    """A law, the Huber loss that it leaves, and the laws of resampled runs.

    Attributes:
      huber: residuals of log L beyond it counted linearly.
      residuals: of log L, one for each run.
      draws: parameters of the bootstrap, float [draws, 5] in the order of NAMES.
    """

    law: Law
    huber: float
    objective: float
    residuals: np.ndarray
    draws: np.ndarray

    def interval(self, name: str, confidence: float = 0.95) -> tuple[float, float]:
        """Percentiles of a parameter, or of "exponent"."""
        E, A, B, alpha, beta = self.draws.T
        values = beta / (alpha + beta) if name == "exponent" else self.draws[:, NAMES.index(name)]
        tail = 50 * (1 - confidence)
        low, high = np.percentile(values, [tail, 100 - tail])
        return float(low), float(high)


def check(params, tokens, flops=None) -> None:
    """Refuses runs that cannot tell the terms of the law apart. flops: of each run; None: as N * D.

    Raises:
      UserError: there are fewer than six runs, three sizes, three token counts or six pairs of these (seeds and
        learning rates of one pair tell nothing of the law), or all have one cost, along which both terms are of N.
    """
    costs = np.asarray(params, float) * np.asarray(tokens, float) if flops is None else flops
    counts = {
        "runs": (len(params), 6),
        "sizes": (len(set(params)), 3),
        "token counts": (len(isoflop.budgets(tokens, isoflop.SAME_TOKENS)), 3),
        "pairs of size and token count": (len(isoflop.amounts(params, tokens)), 6),
        "costs": (len(isoflop.budgets(costs)), 2),
    }
    for name, (count, least) in counts.items():
        if count < least:
            raise UserError(f"fit: E + A/N^alpha + B/D^beta takes {least} {name} or more, there are {count}")


def fit(params, tokens, losses, *, flops=None, draws: int = DRAWS, seed: int = 0) -> Fit:
    """The law that fits best, and its bootstrap.

    Args:
      params, tokens, losses, flops: of each run [S], above 0; flops for `check` alone.
      draws: of the bootstrap, `wild`; each is fitted from the law itself.

    Raises:
      UserError: as `check`.
    """
    check(params, tokens, flops)
    return fit_many(params, tokens, np.asarray(losses, float)[None], draws=draws, seed=seed)[0]


def fit_many(params, tokens, losses_RS, *, draws: int = DRAWS, seed: int = 0) -> list[Fit]:
    """As `fit` for several outcomes [R, S] of the same sizes and token counts, all solved together."""
    logs_RS = np.log(np.asarray(losses_RS, float))
    n_S, d_S = (np.log(np.asarray(x, float)) for x in (params, tokens))
    means = n_S.mean(), d_S.mean()
    n_S, d_S = n_S - means[0], d_S - means[1]
    starts_RKP = np.stack([_starts(n_S, d_S, logs_S) for logs_S in logs_RS])
    count, kept = starts_RKP.shape[:2]
    found, value = _solve(n_S, d_S, logs_RS.repeat(kept, 0), starts_RKP.reshape(-1, 5), np.full(count * kept, np.inf))
    which = value.reshape(count, kept).argmin(1)
    best_RP = found.reshape(count, kept, 5)[np.arange(count), which]
    for _ in range(2):  # once from least squares, which outliers may have pulled away, once more from what that found
        huber_R = _threshold(logs_RS - _model(best_RP, n_S, d_S)[0])
        best_RP, value_R = _solve(n_S, d_S, logs_RS, best_RP, huber_R)
    predicted_RS, jacobian_RSP = _model(best_RP, n_S, d_S)
    residuals_RS = logs_RS - predicted_RS
    rng = np.random.default_rng(seed)
    noise = np.stack([wild(r, j, rng, draws) for r, j in zip(residuals_RS, jacobian_RSP, strict=True)])
    resampled = (predicted_RS[:, None] + noise).reshape(-1, len(n_S))
    again, _ = _solve(n_S, d_S, resampled, best_RP.repeat(draws, 0), huber_R.repeat(draws))
    laws_RP, draws_RMP = _natural(best_RP, means), _natural(again, means).reshape(count, draws, 5)
    parts = zip(laws_RP.tolist(), huber_R.tolist(), value_R.tolist(), residuals_RS, draws_RMP, strict=True)
    return [Fit(Law(*law), huber, value, residuals, of) for law, huber, value, residuals, of in parts]


def _threshold(residuals_RS) -> np.ndarray:
    """Huber's threshold for each row, from the median size of what five parameters leave."""
    freedom = np.sqrt(residuals_RS.shape[1] / max(residuals_RS.shape[1] - 5, 1))
    return np.maximum(HUBER, _TUNING * 1.4826 * freedom * np.median(np.abs(residuals_RS), axis=1))


def wild(residuals_S, jacobian_SP, rng, draws: int) -> np.ndarray:
    """Residuals [draws, S] for a bootstrap that keeps the sizes and token counts as they were planned: each run's own,
    as large as it would be had the fit not followed it (1 / (1 - leverage), HC3), with a random sign. Noise may differ
    between runs. Wu 1986; the signs are Rademacher's, Davidson and Flachaire 2008.
    """
    leverage_S = np.einsum("sp,pq,sq->s", jacobian_SP, np.linalg.pinv(jacobian_SP.T @ jacobian_SP), jacobian_SP)
    return residuals_S / np.maximum(1 - leverage_S, 0.1) * rng.choice([-1.0, 1.0], (draws, len(residuals_S)))


def _model(theta_RP, n_S, d_S):
    """log of the law [R, S], and its derivatives [R, S, P]."""
    e, a, b, alpha, beta = theta_RP.T[:, :, None]
    terms = np.exp(np.stack([np.broadcast_to(e, (len(theta_RP), len(n_S))), a - alpha * n_S, b - beta * d_S]))
    total_RS = terms.sum(0)
    shares = terms / total_RS
    return np.log(total_RS), np.stack([*shares, -shares[1] * n_S, -shares[2] * d_S], -1)


def _huber(residuals_RS, huber_R) -> np.ndarray:
    size = np.abs(residuals_RS)
    inner = np.minimum(size, huber_R[:, None])
    return (inner * (size - 0.5 * inner)).sum(-1)


def _starts(n_S, d_S, logs_S) -> np.ndarray:
    """[K, P]: for each pair of exponents the E, A, B >= 0 of least relative error, which is a linear problem."""
    scale_S, found = np.exp(-logs_S), []
    for alpha in _EXPONENTS:
        for beta in _EXPONENTS:
            columns = np.stack([np.ones_like(n_S), np.exp(-alpha * n_S), np.exp(-beta * d_S)], 1)
            parts, _ = optimize.nnls(columns * scale_S[:, None], np.ones_like(n_S))
            floor = np.exp(logs_S.mean()) * 1e-3  # a term that is not there could not come back
            found.append([*np.log(np.maximum(parts, floor)), alpha, beta])
    return np.array(found)


def _solve(n_S, d_S, logs_RS, theta_RP, huber_R):
    """Levenberg-Marquardt on every row, weights as Huber's loss asks: (parameters [R, P], Huber loss [R]).

    Rows that have come to rest are left out of what is computed, so the slowest few cost little.
    """
    theta, floor = theta_RP.copy(), logs_RS.mean(1, keepdims=True) + _LEAST
    damping = np.full(len(theta), 1e-3)
    predicted, jacobian = _model(theta, n_S, d_S)
    value = _huber(logs_RS - predicted, huber_R)
    active = np.arange(len(theta))
    for _ in range(_ITERATIONS):
        residuals = logs_RS[active] - predicted
        size = np.abs(residuals)
        weights = np.minimum(size, huber_R[active, None]) / np.maximum(size, 1e-300)
        weighted = jacobian * weights[..., None]
        normal = weighted.swapaxes(1, 2) @ jacobian
        gradient = (weighted * residuals[..., None]).sum(1)
        scale = np.einsum("rpp->rp", normal) + 1e-9
        normal[:, range(5), range(5)] += damping[active, None] * scale
        step = np.linalg.solve(normal, gradient[..., None])[..., 0]
        tried = theta[active] + np.clip(step, -2, 2)
        tried[:, :3] = np.maximum(tried[:, :3], floor[active])
        tried_predicted, tried_jacobian = _model(tried, n_S, d_S)
        tried_value = _huber(logs_RS[active] - tried_predicted, huber_R[active])
        better = tried_value < value[active]
        gained = value[active] - tried_value
        damping[active] = np.where(better, damping[active] * 0.2, damping[active] * 5)
        done = (better & (gained <= _REST * value[active])) | (damping[active] > 1e8)
        theta[active[better]], value[active[better]] = tried[better], tried_value[better]
        predicted = np.where(better[:, None], tried_predicted, predicted)[~done]
        jacobian = np.where(better[:, None, None], tried_jacobian, jacobian)[~done]
        active = active[~done]
        if not len(active):
            break
    return theta, value


def _natural(theta_RP, means) -> np.ndarray:
    """(E, A, B, alpha, beta) of centred parameters."""
    e, a, b, alpha, beta = theta_RP.T
    return np.stack([np.exp(e), np.exp(a + alpha * means[0]), np.exp(b + beta * means[1]), alpha, beta], 1)
