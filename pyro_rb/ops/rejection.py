# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

r"""
Smoothed rejection sampling: acceptance, the draws that are kept, the weights of the
gradient, and the threshold.

A proposal :math:`z` of density :math:`q` has the log weight
:math:`\ell = \log p(x, z) - \log q(z)`, and is accepted with probability

.. math:: a(z) = \epsilon + (1 - \epsilon) \, \sigma(\ell + T).

Proposals are along dim 0 of all tensors; further dims hold independent problems, such as
the items of a plate.
"""

import math
from typing import NamedTuple, Optional, Tuple

import torch

#: The threshold is solved to one part in 2**60 of the bracket.
_BISECTIONS = 60
#: Beyond this distance from the log weights the sigmoid is 0 or 1 in float64.
_MARGIN = 40.0
#: Below this mean slope of the acceptance, a step along it says little.
_SATURATED = 0.002


def clean_log_weights(log_weight: torch.Tensor) -> Tuple[torch.Tensor, int]:
    """
    Makes -inf of log weights that are not finite.

    :param log_weight: of any shape.
    :return: log weights without NaN and +inf, and how many were not finite.

    >>> clean_log_weights(torch.tensor([0.5, float("nan"), float("inf")]))
    (tensor([0.5000,   -inf,   -inf]), 2)
    """
    if math.isfinite(log_weight.sum().item()):  # much the most frequent, and one sum
        return log_weight, 0
    is_invalid = ~log_weight.isfinite()
    return log_weight.masked_fill(is_invalid, -torch.inf), int(is_invalid.sum())


def acceptance(
    log_weight: torch.Tensor, T: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """
    :param log_weight: ``[M, *batch]``.
    :param T: threshold, ``[*batch]`` or a scalar.
    :param epsilon: least acceptance of a proposal that the model allows.
    :return: the acceptance probability, ``[M, *batch]``; zero where the log weight is -inf.

    >>> acceptance(torch.tensor([0.0, -torch.inf]), torch.tensor(0.0), 0.5)
    tensor([0.7500, 0.0000])
    """
    s = torch.sigmoid(log_weight + T)
    return (s * (1 - epsilon) + epsilon).masked_fill_(log_weight == -torch.inf, 0.0)


def first_accepted(
    is_accepted: torch.Tensor, num_samples: int
) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    The first accepted proposals, in the order in which they were proposed.

    :param is_accepted: ``[M, *batch]``, bool, with ``num_samples`` or more along dim 0.
    :param num_samples: S.
    :return: their positions ``[S, *batch]``, and how many proposals it took up to and
        including the last of them, ``[*batch]``.

    >>> first_accepted(torch.tensor([False, True, False, True, True]), 2)
    (tensor([1, 3]), tensor(4))
    """
    if is_accepted.dim() == 1:
        index = is_accepted.nonzero().squeeze(-1)[:num_samples]
    else:
        order = (~is_accepted).to(torch.uint8).sort(dim=0, stable=True).indices
        index = order[:num_samples]
    return index, index[-1] + 1


def log_normalizer(num_samples: int, num_proposed: torch.Tensor) -> torch.Tensor:
    """
    An unbiased estimate of the log of the mean acceptance: ``psi(S) - psi(N)``, where N
    is the number of proposals up to the S-th acceptance.

    :param num_samples: S.
    :param num_proposed: N, ``[*batch]``.

    >>> log_normalizer(2, torch.tensor([2, 4]))
    tensor([ 0.0000, -0.8333], dtype=torch.float64)
    """
    if num_proposed.dim() == 0:
        # psi(n + 1) = psi(n) + 1 / n
        terms = range(num_samples, int(num_proposed))
        return torch.tensor(-math.fsum(1 / n for n in terms), dtype=torch.float64)
    num = num_proposed.double()
    return torch.digamma(torch.full_like(num, num_samples)) - torch.digamma(num)


class Weights(NamedTuple):
    """Of S accepted proposals, each ``[S, *batch]``."""

    #: ``log_weight - log_acceptance``. Its mean estimates the ELBO less the log normalizer.
    f: torch.Tensor
    #: Weight of the pathwise gradient of the log weight, for guide parameters.
    path: torch.Tensor
    #: Weight of the gradient of the model's log density, for model parameters.
    model: torch.Tensor


def gradient_weights(
    log_weight: torch.Tensor, T: torch.Tensor, epsilon: float
) -> Weights:
    r"""
    The weights of the gradient of the ELBO, unbiased for any :math:`S \ge 2`.

    With :math:`s = \sigma(\ell + T)`, :math:`\lambda = \epsilon / (1 - \epsilon)`,
    :math:`\rho = (\lambda + s^2) / (\lambda + s)` and
    :math:`d = \frac{S}{S - 1} (f - \bar f)`, the weights are
    :math:`\rho^2 + 2 d \, s^2 (1 - s) / (\lambda + s)` and :math:`1 + d \, (1 - \rho)`.

    :param log_weight: of accepted proposals, ``[S, *batch]``, finite.
    :param T: threshold, ``[*batch]`` or a scalar.
    :param epsilon: least acceptance.

    >>> f, path, model = gradient_weights(torch.zeros(2), torch.tensor(0.0), 0.5)
    >>> path, model
    (tensor([0.6944, 0.6944]), tensor([1., 1.]))
    """
    num_samples = len(log_weight)
    logit = log_weight + T
    s, rest = torch.sigmoid(logit), torch.sigmoid(-logit)
    odds = epsilon / (1 - epsilon)
    rho = (odds + s * s) / (odds + s)
    # The same as 1 - rho, without the loss of digits where s is near 1.
    one_less_rho = s * rest / (odds + s)
    f = log_weight - (epsilon + (1 - epsilon) * s).log()
    scale = num_samples / max(num_samples - 1, 1)
    deviation = scale * (f - f.mean(0))
    path = rho * rho + 2 * deviation * s * one_less_rho
    return Weights(f, path, 1 + deviation * one_less_rho)


class Bound(NamedTuple):
    """Each ``[*batch]``."""

    value: torch.Tensor
    standard_error: torch.Tensor
    acceptance: torch.Tensor


def estimate_bound(log_weight: torch.Tensor, T: torch.Tensor, epsilon: float) -> Bound:
    """
    The ELBO from all proposals, accepted or not, with a bias of the order of ``1 / M``.

    :param log_weight: of proposals, ``[M, *batch]``.
    :param T: threshold, ``[*batch]`` or a scalar.
    :param epsilon: least acceptance.
    :return: the ELBO, the standard error by the delta method, and the mean acceptance.

    >>> estimate_bound(torch.zeros(4), torch.tensor(0.0), 0.5).value
    tensor(0.)
    """
    a = acceptance(log_weight, T, epsilon)
    mean_a = a.mean(0)
    f = (log_weight - a.log()).masked_fill(a == 0, 0.0)
    ratio = a / mean_a
    mean_f = (ratio * f).mean(0)
    influence = ratio * (f - mean_f + 1)
    error = influence.std(0, unbiased=False) / len(a) ** 0.5
    return Bound(mean_f + mean_a.log(), error, mean_a)


def solve_threshold(
    log_weight: torch.Tensor, target: float, epsilon: float
) -> torch.Tensor:
    """
    The threshold at which the mean acceptance is ``target``, by bisection.

    Proposals of log weight -inf are never accepted. Where there are so many of them that
    the target is out of reach, it is taken to be 9/10 of what can be reached.

    :param log_weight: of proposals, ``[M, *batch]``.
    :param target: between ``epsilon`` and 1.
    :param epsilon: least acceptance.
    :return: T, ``[*batch]``; NaN where no log weight is finite.

    >>> solve_threshold(torch.tensor([2.0, 2.0]), 0.5, 0.01)
    tensor(-2.0202)
    """
    lw = log_weight.double()
    is_finite = lw.isfinite()
    share = is_finite.double().mean(0)
    goal = torch.where(share > target, torch.full_like(share, target), 0.9 * share)
    low = -lw.masked_fill(~is_finite, -torch.inf).amax(0) - _MARGIN
    high = -lw.masked_fill(~is_finite, torch.inf).amin(0) + _MARGIN
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        is_low = acceptance(lw, middle, epsilon).mean(0) < goal
        low, high = middle.where(is_low, low), high.where(is_low, middle)
    solved = (low + high) / 2
    nan = torch.full_like(solved, torch.nan)
    return solved.where(share > 0, nan).to(log_weight.dtype)


def adapt_threshold(
    log_weight: torch.Tensor,
    T: torch.Tensor,
    target: float,
    epsilon: float,
    lr: float,
    accept_probs: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """
    A step of the threshold towards the target: Newton's, with a limit on its length and
    on how flat the acceptance may be. Its fixed point is unbiased. Where the acceptance
    is far off, or each proposal is almost surely accepted or rejected so that there is no
    slope to follow, the step goes half of the way to what :func:`solve_threshold` says
    of these proposals.

    :param log_weight: of proposals that were decided upon with T, ``[M, *batch]``.
    :param T: threshold, ``[*batch]``.
    :param target: wanted mean acceptance.
    :param epsilon: least acceptance.
    :param lr: learning rate.
    :param accept_probs: acceptance probabilities, if they are known.
    :return: the new threshold, ``[*batch]``.

    >>> adapt_threshold(torch.zeros(8), torch.tensor(0.0), 0.3, 0.01, 0.1)
    tensor(-0.0828)
    """
    a = acceptance(log_weight, T, epsilon) if accept_probs is None else accept_probs
    mean_a = a.mean(0)
    # That of the sigmoid in terms of the acceptance: (a - epsilon) (1 - a) / (1 - epsilon).
    slope = ((a - epsilon).clamp(min=0) * (1 - a)).mean(0) / (1 - epsilon)
    if T.dim() == 0:
        mean, flat = torch.stack([mean_a, slope]).tolist()
        if flat >= _SATURATED and target / 4 <= mean <= (1 + target) / 2:
            # In floats, which takes a tenth of the time.
            return T + lr * max(-2.0, min(2.0, (target - mean) / max(flat, 0.02)))
    step = ((target - mean_a) / slope.clamp(min=0.02)).clamp(-2, 2)
    new = T + lr * step
    is_off = (slope < _SATURATED) | (mean_a > (1 + target) / 2) | (mean_a < target / 4)
    if is_off.any():
        solved = solve_threshold(log_weight, target, epsilon)
        new = torch.where(is_off, (T + solved) / 2, new)
    return new.where(new.isfinite(), T)
