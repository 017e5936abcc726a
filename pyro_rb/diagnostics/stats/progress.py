# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""How much the noise of a gradient slows training down: tensors in, numbers out."""

import math
from typing import Iterable, List, Sequence, Tuple

import torch
from torch import Tensor


def steps_ratio(
    blocks: Tensor, base_blocks: Tensor, signal: Tensor, sizes: Sequence[int]
) -> Tuple[float, List[float]]:
    r"""
    The steps that a loss needs for the same progress, over those of a reference: the mean
    over coordinates of

    .. math::

        \frac{|G|^2 + V}{|G|^2 + V_0}

    where the mean gradient :math:`G` and the variances :math:`V` of the loss and
    :math:`V_0` of the reference are those of the coordinate's whole parameter. So each
    coordinate counts in units of its own gradient, as in the steps of Adam.

    :param ~torch.Tensor blocks: ``[B, J]``: variances of the loss for each of ``J``
        parameters, summed over coordinates, from ``B`` blocks of draws.
    :param ~torch.Tensor base_blocks: The same of the reference.
    :param ~torch.Tensor signal: ``[J]``: the squared length of the mean gradient.
    :param list sizes: The number of coordinates of each parameter.
    :returns: The ratio, and what each block adds to its error by the delta method, in which the signal is
        taken as known: :func:`root_sum_of_squares` of it is the standard error, and that of the difference of two
        losses' that of their difference, as both see the same random numbers. Parameters on which nothing
        depends are left out.

    **Example**

    >>> import torch
    >>> steps_ratio(torch.tensor([[1.], [3.]]), torch.tensor([[8.], [8.]]), torch.tensor([0.]), [5])[0]
    0.25
    """
    count = min(len(blocks), len(base_blocks))
    blocks, base_blocks = blocks[:count].double(), base_blocks[:count].double()
    second = signal.double() + blocks.mean(0)
    base = signal.double() + base_blocks.mean(0)
    used = (second > 0) | (base > 0)
    if not used.any():
        return 1.0, []
    weights = torch.tensor(sizes, dtype=torch.double, device=blocks.device)[used]
    weights = weights / weights.sum()
    ratios = second[used] / base[used]
    ratio = (weights * ratios).sum().item()
    if count < 2 or not math.isfinite(ratio):
        return ratio, [math.nan]
    residual = (blocks[:, used] - ratios * base_blocks[:, used] + signal[used] * (1 - ratios)) / base[used]
    return ratio, (residual @ weights / math.sqrt(count * (count - 1))).tolist()


def root_sum_of_squares(values: Iterable[float]) -> float:
    """
    The length of a vector; NaN if an entry is.

    **Example**

    >>> root_sum_of_squares([3.0, 4.0])
    5.0
    """
    return math.sqrt(sum(value * value for value in values))


def noise_share(base_blocks: Tensor, signal: Tensor, sizes: Sequence[int]) -> float:
    """
    The share of noise in the mean square of a gradient, the mean over coordinates as in
    :func:`steps_ratio`.

    **Example**

    >>> import torch
    >>> noise_share(torch.tensor([[1., 2.], [1., 2.]]), torch.tensor([3., 0.]), [1, 3])
    0.8125
    """
    noise = base_blocks.double().mean(0)
    total = noise + signal.double()
    weights = torch.tensor(sizes, dtype=torch.double, device=noise.device) * (total > 0)
    if not weights.any():
        return 0.0
    share = torch.where(total > 0, noise / total, torch.zeros_like(total))
    return ((weights * share).sum() / weights.sum()).item()
