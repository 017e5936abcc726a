# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
How far must a table of a distribution over 0, 1, 2, ... reach?

The mass beyond the windows given here is below 1e-9.
"""

import torch
from torch import Tensor

_LOG_TAIL = 20.8  # -log(1e-9), rounded up


def poisson_window(rate: Tensor) -> Tensor:
    """
    Of ``Poisson(rate)``: twelve standard deviations and 30 above the mean.

    :param rate: ``[*batch]``, ``>= 0``.
    :return: ``[*batch]``, real.

    >>> poisson_window(torch.tensor([0.0, 100.0]))
    tensor([ 30., 250.])
    """
    return rate + 12.0 * rate.sqrt() + 30.0


def negative_binomial_window(total_count: Tensor, log_ratio: Tensor) -> Tensor:
    r"""
    Of a negative binomial, by Chernoff's bound: for each :math:`0 < s < \lambda` the mass
    from :math:`M` on is at most :math:`E[e^{sX}] e^{-sM}`.

    :param total_count: ``[*batch]``, number of failures to wait for; 1 for a geometric.
    :param log_ratio: ``[*batch]``, :math:`-\lambda < 0`, log probability of a success.
    :return: ``[*batch]``, real: the least that any of several values of ``s`` gives.

    >>> negative_binomial_window(torch.tensor(1.0), torch.tensor(0.5).log()).round()
    tensor(37.)
    """
    total_count, log_ratio = total_count.double(), log_ratio.double().clamp(max=-1e-300)
    fractions = log_ratio.new_tensor([0.1, 0.25, 0.5, 0.75, 0.9]).reshape((-1,) + (1,) * log_ratio.dim())
    s = -fractions * log_ratio
    log_mgf = total_count * (
        torch.expm1(log_ratio).neg().log() - torch.expm1(log_ratio + s).neg().log()
    )
    return ((log_mgf + _LOG_TAIL) / s).amin(0).float()
