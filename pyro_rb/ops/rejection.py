# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

r"""
Smoothed rejection sampling: acceptance, the draws that are kept, the weights of the
gradient, and the bound. The threshold is that of :mod:`pyro_rb.ops.rejection_threshold`.

A proposal :math:`z` of density :math:`q` has the log weight
:math:`\ell = \log p(x, z) - \log q(z)`, and is accepted with probability

.. math:: a(z) = \epsilon + (1 - \epsilon) \, \sigma(\ell + T).

Proposals are along dim 0 of all tensors; further dims hold independent problems, such as
the items of a plate.
"""

from typing import NamedTuple, Tuple

import torch
import torch.nn.functional as F

#: As many accepted draws are found by counting.
_FEW = 8


def clean_log_weights(log_weight: torch.Tensor) -> Tuple[torch.Tensor, int]:
    """
    Replaces log weights that are not finite by -inf.

    :param log_weight: of any shape.
    :return: log weights without NaN and +inf, and how many were not finite.

    >>> clean_log_weights(torch.tensor([0.5, float("nan"), float("inf")]))
    (tensor([0.5000,   -inf,   -inf]), 2)
    """
    if log_weight.sum().isfinite():  # much the most frequent, and one sum
        return log_weight, 0
    is_invalid = ~log_weight.isfinite()
    return log_weight.masked_fill(is_invalid, -torch.inf), int(is_invalid.sum())


def acceptance(
    log_weight: torch.Tensor, T: torch.Tensor, epsilon: float, all_finite: bool = False
) -> torch.Tensor:
    """
    :param log_weight: ``[M, *batch]``.
    :param T: threshold, ``[*batch]`` or a scalar.
    :param epsilon: least acceptance of a proposal that the model allows.
    :param all_finite: whether no log weight is known to be -inf.
    :return: the acceptance probability, ``[M, *batch]``; zero where the log weight is -inf.

    >>> acceptance(torch.tensor([0.0, -torch.inf]), torch.tensor(0.0), 0.5)
    tensor([0.7500, 0.0000])
    """
    s = (log_weight + T).sigmoid_()
    a = s.lerp(s.new_ones(()), epsilon)
    return a if all_finite else a.masked_fill_(log_weight == -torch.inf, 0.0)


def first_accepted(is_accepted: torch.Tensor, num_samples: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """
    The first accepted proposals, in the order in which they were proposed.

    :param is_accepted: ``[M]`` or ``[M, N]``, bool, with ``num_samples`` or more along
        dim 0. For an item with fewer, what is returned means nothing.
    :param num_samples: S.
    :return: their positions, ``[S]`` or ``[S, N]``, and how many proposals it took up to
        and including the last of them, 0-dim or ``[N]``.

    >>> first_accepted(torch.tensor([False, True, False, True, True]), 2)
    (tensor([1, 3]), tensor(4))
    """
    if is_accepted.dim() == 1:
        index = is_accepted.nonzero().squeeze(-1)[:num_samples]
    elif num_samples <= _FEW and len(is_accepted) < 256:
        # How many proposals have fewer acceptances up to them, in bytes for speed.
        count = is_accepted.cumsum(0, dtype=torch.uint8)
        fewer = [(count < i + 1).view(torch.uint8) for i in range(num_samples)]
        index = torch.stack([x.sum(0, dtype=torch.uint8) for x in fewer]).long()
    elif is_accepted.shape[1] == 1:
        index = is_accepted.sort(dim=0, descending=True, stable=True).indices[:num_samples]
    else:
        # By item, and for each item in the order of the proposals.
        _, order = is_accepted.t().nonzero(as_tuple=True)
        num_accepted = is_accepted.sum(0)
        start = num_accepted.cumsum(0) - num_accepted
        index = start + torch.arange(num_samples, device=start.device).unsqueeze(-1)
        index = F.pad(order, (0, num_samples))[index]
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
    num = num_proposed.double()
    return torch.digamma(num.new_full((), num_samples)) - torch.digamma(num)


class Weights(NamedTuple):
    """What :func:`gradient_weights` returns for S accepted proposals, each ``[S, *batch]``."""

    #: ``log_weight - log_acceptance``. Its mean estimates the ELBO less the log normalizer.
    f: torch.Tensor
    #: Weight of the pathwise gradient of the log weight, for guide parameters.
    path: torch.Tensor
    #: Weight of the gradient of the model's log density, for model parameters.
    model: torch.Tensor


def gradient_weights(log_weight: torch.Tensor, T: torch.Tensor, epsilon: float) -> Weights:
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
    """An ELBO, its standard error and the mean acceptance, each ``[*batch]``."""

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
    tensor(0., dtype=torch.float64)
    """
    return bound_of_moments(moments(log_weight, T, epsilon), len(log_weight), T)


def moments(log_weight: torch.Tensor, T: torch.Tensor, epsilon: float) -> torch.Tensor:
    """
    What :func:`bound_of_moments` needs to know about proposals. The sums of several batches of proposals add up.

    :param log_weight: of proposals, ``[M, *batch]``.
    :param T: threshold, ``[*batch]`` or a scalar.
    :param epsilon: least acceptance.
    :return: sums of products of acceptance and f + T, in float64, ``[5, *batch]``.

    >>> moments(torch.zeros(4), torch.tensor(0.0), 0.5)[0]
    tensor(3., dtype=torch.float64)
    """
    logit = log_weight.double() + T
    a = acceptance(logit, logit.new_zeros(()), epsilon)
    # Log weights may be large numbers, of which squares would have no digits left.
    af = a * (logit - a.log()).masked_fill_(a == 0, 0.0)
    return torch.stack([x.sum(0) for x in (a, af, a * a, a * af, af * af)])


def bound_of_moments(sums: torch.Tensor, num: int, T: torch.Tensor) -> Bound:
    """
    The result of :func:`estimate_bound`, from the sums over all proposals.

    :param sums: of :func:`moments`, ``[5, *batch]``.
    :param num: number of proposals, M.
    :param T: threshold, ``[*batch]`` or a scalar.

    >>> T = torch.tensor(0.0)
    >>> bound_of_moments(moments(torch.zeros(4), T, 0.5), 4, T).acceptance
    tensor(0.7500, dtype=torch.float64)
    """
    a, af, aa, aaf, aff = sums / num
    mean_f = af / a
    # The variance of (a / mean a) (f - mean f + 1), whose mean is one.
    shift = mean_f - 1
    variance = (aff - 2 * shift * aaf + shift * shift * aa) / (a * a) - 1
    error = variance.clamp(min=0.0).sqrt() / num**0.5
    return Bound(mean_f - T + a.log(), error, a)
