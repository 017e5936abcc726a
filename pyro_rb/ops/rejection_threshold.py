# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
The threshold of smoothed rejection sampling, see :mod:`pyro_rb.ops.rejection`, for a wanted mean acceptance.
"""

import math
from typing import Optional

import torch

from pyro_rb.ops.rejection import acceptance

#: Below this mean slope of the acceptance, a step along it says little.
_SATURATED = 0.002
#: How short the last step of the threshold solver is to be, in float32 and in float64.
#: Newton's steps are then right to more digits than that.
_TOLERANCE = (2e-3, 1e-8)


def solve_threshold(
    log_weight: torch.Tensor, target: float, epsilon: float, num_steps: int = 100
) -> torch.Tensor:
    """
    The threshold at which the mean acceptance is ``target``, by Newton's method for the
    logit of the acceptance, which is almost linear, within a bracket.

    Proposals of log weight -inf are never accepted. Where there are so many of them that
    the target is out of reach, it is taken to be 9/10 of what can be reached.

    :param log_weight: of proposals, ``[M, *batch]``.
    :param target: between ``epsilon`` and 1.
    :param epsilon: least acceptance.
    :param num_steps: at most. Halving any bracket takes fewer than the default.
    :return: T, ``[*batch]``, to about four digits in float32; NaN where no log weight is
        finite.

    >>> solve_threshold(torch.tensor([2.0, 2.0]), 0.5, 0.01)
    tensor(-2.0202)
    """
    lw = log_weight.reshape(len(log_weight), -1)
    low, high = -lw.amax(0), -lw.amin(0)
    share, finite, average = torch.ones_like(low), lw, torch.mean
    if not high.isfinite().all():
        is_finite = lw.isfinite()
        share = is_finite.to(lw.dtype).mean(0)
        high = -lw.masked_fill(~is_finite, torch.inf).amin(0)
        finite, average = lw.masked_fill(~is_finite, torch.nan), torch.nanmean
    goal = torch.full_like(share, target).where(share > target, 0.9 * share)
    # What the logit of the mean sigmoid is to be, over the proposals that are finite.
    odds = torch.logit((goal / share - epsilon) / (1 - epsilon))
    low, high = odds + low, odds + high
    # Nearly right for normal log weights.
    mean = average(finite, 0)
    spread = average((finite - mean).square_(), 0)
    T = (odds * (1 + spread * math.pi / 8).sqrt() - mean).clamp(low, high)
    solved = T.clone()
    items = torch.arange(len(T), device=T.device)
    for _ in range(num_steps):
        s = torch.sigmoid(lw + T)
        mean = s.mean(0) / share
        slope = mean - s.square_().mean(0) / share
        excess = torch.logit(mean) - odds
        low, high = T.where(excess < 0, low), high.where(excess < 0, T)
        new = T - excess * mean * (1 - mean) / slope
        new = new.where((new >= low) & (new <= high), (low + high) / 2)
        solved[items] = new
        is_open = (new - T).abs() > _TOLERANCE[lw.dtype == torch.float64]
        T, num_open = new, int(is_open.sum())
        if num_open == 0:
            break
        if 2 * num_open < len(T):
            rest = is_open.nonzero().squeeze(-1)
            lw, items = lw[:, rest], items[rest]
            share, odds, low, high, T = (x[rest] for x in (share, odds, low, high, T))
    return solved.reshape(log_weight.shape[1:])


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
    slope to follow, the step goes half of the way to the threshold at which the wanted share of the
    log weights is above minus the threshold.

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
    slope = ((1 + epsilon) * mean_a - a.square().mean(0) - epsilon) / (1 - epsilon)
    step = ((target - mean_a) / slope.clamp(min=0.02)).clamp(-2, 2)
    new = T + lr * step
    is_off = (slope < _SATURATED) | (mean_a > (1 + target) / 2) | (mean_a < target / 4)
    if T.dim() == 0:
        middle = (T + _find_quantile(log_weight, target, epsilon)) / 2
        new = torch.where(is_off, middle.to(new), new)
    elif is_off.any():
        middle = (T[is_off] + _find_quantile(log_weight[:, is_off], target, epsilon)) / 2
        new = new.masked_scatter(is_off, middle.to(new))
    return new.where(new.isfinite(), T)


def _find_quantile(log_weight: torch.Tensor, target: float, epsilon: float) -> torch.Tensor:
    """
    About the threshold at which the mean acceptance is ``target``, or 9/10 of what can be
    reached: exactly so for equal log weights, and for those that are far apart.

    :param log_weight: of proposals, ``[M, *batch]``.
    """
    p = (target - epsilon) / (1 - epsilon)
    num_allowed = log_weight.isfinite().sum(0, keepdim=True)
    rank = (0.9 * num_allowed).ceil().clamp(1, math.ceil(target * len(log_weight)))
    middle = log_weight.sort(0, descending=True).values.gather(0, rank.long() - 1).squeeze(0)
    return math.log(p / (1 - p)) - middle
