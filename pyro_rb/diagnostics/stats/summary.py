# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Statistics of gradient samples: tensors in, tensors and numbers out. Nothing here runs a
model or imports Pyro.

Throughout, ``samples`` is a tensor of shape ``[N, *shape]`` with one draw per row, and a
*coordinate* is one element of ``shape``.
"""

import math
from typing import Tuple

from torch import Tensor

from pyro_rb.diagnostics.stats.moments import RunningMoments

#: A share of the largest 1% above which rare draws are said to dominate; of normal draws it is 0.08.
HEAVY_TAIL = 0.2


def total_variance(samples: Tensor) -> float:
    """
    The variance of ``samples`` ``[N, *shape]``, summed over coordinates: the expected
    squared distance of one draw from the mean.

    **Example**

    >>> import torch
    >>> total_variance(torch.tensor([[0., 1.], [2., 1.], [4., 1.]]))
    4.0
    """
    return RunningMoments.of(samples).variance.sum().item()


def ratio_of_means(a: Tensor, b: Tensor) -> Tuple[float, float]:
    """
    ``a.mean() / b.mean()`` and its standard error by the delta method, for paired values
    of shape ``[N]``. Zero over zero is 1.

    **Example**

    >>> import torch
    >>> ratio_of_means(torch.tensor([2., 4., 6.]), torch.tensor([1., 2., 3.]))
    (2.0, 0.0)
    """
    a, b = a.double(), b.double()
    top, bottom = a.mean().item(), b.mean().item()
    if bottom == 0:
        return (1.0, 0.0) if top == 0 else (math.inf, math.nan)
    ratio, count = top / bottom, len(a)
    if count < 2:
        return ratio, math.nan
    residual = a - ratio * b
    error = (residual.square().sum() / (count * (count - 1))).sqrt().item()
    return ratio, error / abs(bottom)


def median_and_error(values: Tensor) -> Tuple[float, float]:
    """
    The median of ``values`` ``[N]`` and its standard error, from the order statistics one
    binomial standard deviation to either side, without assumptions about the distribution.

    **Example**

    >>> import torch
    >>> median_and_error(torch.arange(101.))
    (50.0, 5.0)
    """
    ordered = values.double().sort().values
    count = len(ordered)
    middle, spread = (count - 1) / 2, math.sqrt(count) / 2
    low = ordered[max(0, math.floor(middle - spread + 0.5))]
    high = ordered[min(count - 1, math.ceil(middle + spread - 0.5))]
    return ordered.quantile(0.5).item(), ((high - low) / 2).item()


def tail_share(deviations: Tensor, quantile: float = 0.01) -> float:
    """
    The share of the largest values in the sum of ``deviations`` ``[N]``, non-negative.

    Of the squared deviations of a normal variable, the largest 1% make up 8%. Where they
    make up much more, rare events dominate the variance, and a standard error that is
    estimated from the same draws is too small.

    :param float quantile: What part of the values to take.
    :returns: The share; NaN if there are too few values to take one.
    :rtype: float

    **Example**

    >>> import torch
    >>> tail_share(torch.cat([torch.ones(99), torch.tensor([101.])]))
    0.505
    """
    count = int(quantile * len(deviations))
    total = deviations.sum().item()
    if count == 0:
        return math.nan
    return deviations.topk(count).values.sum().item() / total if total > 0 else 0.0
