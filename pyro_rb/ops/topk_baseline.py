# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Baselines of the slots of :mod:`pyro_rb.ops.topk`, and of particles, and the score part of the gradient.
"""

import math
from typing import Optional

import torch
from torch import Tensor

from pyro_rb.ops.topk import PROBE


def leave_one_out_baseline(
    grad: Tensor, weight: Tensor, is_top: Tensor, is_sampled: Tensor, dim: int, share: Optional[Tensor] = None
) -> Tensor:
    r"""
    For each sampled slot, the mean over the other sampled slots and over the mean of the
    top ones, times the weight of the slot. It does not depend on the slot's own draw.

    Of two draws without replacement, the other one tells of all values but the slot's own. In
    the place of its cost :math:`F_b` stands :math:`p_a F_a + (1 - p_a) F_b`: the built-in baseline
    of Kool et al. (2020), see :func:`~pyro_rb.ops.topk.select_slots`.

    :param grad: ``[..., m, ...]``, weight times downstream cost.
    :param weight: broadcastable to ``grad``, as are ``is_top``, ``is_sampled`` and ``share``.
    :param dim: the dimension of slots.
    :param share: of :class:`~pyro_rb.ops.topk.Slots`. None is 0.
    :return: ``[..., m, ...]``, 0 where there is nothing to take the mean of.

    >>> weight = torch.tensor([0.6, 0.2, 0.2])  # one summed value, two draws
    >>> cost = torch.tensor([5.0, 1.0, 3.0])
    >>> is_top = torch.tensor([True, False, False])
    >>> leave_one_out_baseline(weight * cost, weight, is_top, ~is_top, -1) / weight
    tensor([0., 4., 3.])
    """
    tiny = torch.finfo(grad.dtype).tiny
    top_weight = (weight * is_top).sum(dim, keepdim=True)
    top_mean = (grad * is_top).sum(dim, keepdim=True) / top_weight.clamp(min=tiny)
    samples = (grad * is_sampled).sum(dim, keepdim=True) - grad
    draws = is_sampled.sum(dim, keepdim=True) - 1
    if share is not None:
        # The mean of the others, times the weight of the slot and their number.
        other_weight = (weight * is_sampled).sum(dim, keepdim=True) - weight
        pair = share * grad + (1.0 - share) * samples * weight / other_weight.clamp(min=tiny)
        samples = torch.where((share > 0) & (draws == 1), pair, samples)
    others = draws + (top_weight > 0).long()
    baseline = (samples + weight * top_mean) / others.clamp(min=1)
    return torch.where(is_sampled & (others > 0), baseline, torch.zeros_like(baseline))


def probe_baseline(grad: Tensor, weight: Tensor, is_sampled: Tensor, dim: int) -> Tensor:
    """
    The downstream cost at a probe, times the weight of each sampled slot.

    :param grad: ``[..., m + 1, ...]``, weight times downstream cost; the probe is last.
    :param weight: broadcastable to ``grad``, as is ``is_sampled``.
    :param dim: the dimension of slots.
    :return: ``[..., m + 1, ...]``.

    >>> probe = 7.0 * math.exp(PROBE)
    >>> is_sampled = torch.tensor([False, True, False])  # the last slot is the probe
    >>> weight = torch.tensor([0.6, 0.4, math.exp(PROBE)])
    >>> cost = torch.tensor([5.0, 1.0, 7.0])
    >>> probe_baseline(weight * cost, weight, is_sampled, -1) / weight
    tensor([0., 7., 0.])
    """
    probe = grad.narrow(dim, -1, 1) * math.exp(-PROBE)
    return probe * weight * is_sampled


def particle_baseline(grad: Tensor, weight: Tensor, dim: int) -> Tensor:
    """
    For each particle, the mean cost of the others, which does not depend on its own draw.

    :param grad: ``[..., P, ...]``, weight times downstream cost.
    :param weight: ``[..., P, ...]``, of the same shape.
    :param dim: the dimension of particles.
    :return: ``[..., P, ...]``, 0 where the others have next to no weight.

    >>> particle_baseline(torch.tensor([1.0, 2.0, 6.0]), torch.ones(3), 0)
    tensor([4.0000, 3.5000, 1.5000])
    """
    others = grad.sum(dim, keepdim=True) - grad
    other_weights = weight.sum(dim, keepdim=True) - weight
    # Below, the differences are rounding errors.
    is_known = other_weights > weight * torch.finfo(grad.dtype).eps ** 0.5
    baseline = others / other_weights.masked_fill(~is_known, 1.0)
    return baseline.masked_fill(~is_known, 0.0)


def score_coefficients(
    grad: Tensor, weight: Tensor, is_top: Tensor, is_sampled: Tensor, dim: int, baseline: Optional[Tensor] = None
) -> Tensor:
    r"""
    What ``log q`` of each slot has to be multiplied by, so that the gradient of the sum
    is that of the expected cost.

    With ``grad`` :math:`G_i` and ``baseline`` :math:`B_j`, the score part of the gradient
    is :math:`\sum_i G_i \nabla \log q(z_i) - \sum_j B_j \nabla \log q(v_j | C')`, over the
    slots and over those sampled from the complement :math:`C'`. As
    :math:`\nabla q(C') = -\sum_{i \in C} \nabla q_i`, it is a sum over slots of multiples of
    :math:`\nabla \log q(z_i)`: nothing has the size of the table.

    :param grad: ``[..., m, ...]``, weight times downstream cost.
    :param weight: broadcastable to ``grad``, as are ``is_top`` and ``is_sampled``.
    :param dim: the dimension of slots.
    :param baseline: ``[..., m, ...]``, 0 except at sampled slots.
    :return: ``[..., m, ...]``.

    >>> is_top = torch.tensor([True, False])
    >>> grad, weight = torch.tensor([0.8, 0.6]), torch.tensor([0.8, 0.2])
    >>> score_coefficients(grad, weight, is_top, ~is_top, -1)
    tensor([0.8000, 0.6000])
    """
    zero = torch.zeros_like(grad)
    grad = torch.where(is_top | is_sampled, grad, zero)
    if baseline is None:
        return grad
    tiny = torch.finfo(grad.dtype).tiny
    complement = (weight * is_sampled).sum(dim, keepdim=True)
    ratio = baseline.sum(dim, keepdim=True) / complement.clamp(min=tiny)
    return grad - baseline - torch.where(is_top, weight * ratio, zero)
