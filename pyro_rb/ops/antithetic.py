# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Antithetic pairs of binary vectors, and the gradient estimator DisARM.

With :math:`u` uniform, :math:`b = 1[u < p]` and :math:`b' = 1[1 - u < p]`, for probabilities
:math:`p = \\sigma(\\alpha)`, the derivative of :math:`E[f(b)]` by :math:`\\alpha_i` has the unbiased
estimate (section 3 of [1])

.. math::

    \\tfrac12 \\bigl(f(b) - f(b')\\bigr) \\, (b_i - b'_i) \\, \\sigma(|\\alpha_i|),

which is the mean of :math:`(f(b') - f(b)) (u_i - \\tfrac12)`, the estimate ARM, over all :math:`u`
with the same :math:`b` and :math:`b'`.

[1] Zhe Dong, Andriy Mnih, George Tucker (2020), "DisARM: An Antithetic Gradient Estimator for
Binary Latent Variables". https://arxiv.org/abs/2006.10680
"""

import torch
from torch import Tensor


def draw_pairs(probs: Tensor, num_pairs: int) -> Tensor:
    """
    :param probs: ``[*shape]``.
    :return: zeros and ones ``[2 * num_pairs, *shape]``: the first of each pair, then the second.

    >>> draw_pairs(torch.tensor([0.0, 0.5, 1.0]), 1).sum(0)
    tensor([0., 1., 2.])
    """
    with torch.no_grad():
        shape = (num_pairs,) + tuple(probs.shape)
        uniform = torch.rand(shape, dtype=probs.dtype, device=probs.device)
        return torch.cat([uniform < probs, 1.0 - uniform <= probs]).to(probs.dtype)


def pair_score(value: Tensor, logits: Tensor, dim: int, event_dim: int) -> Tensor:
    r"""
    What takes the place of :math:`\log q(b)`, whose gradient is the score: for each draw, a scalar
    with the gradient :math:`\sum_i (b_i - b'_i) \, \sigma(|\alpha_i|) \nabla \alpha_i`. With costs
    that are divided by the number of draws, and without a baseline, it makes the estimate.

    :param value: ``[..., 2 * num_pairs, ..., *event]``, from :func:`draw_pairs`.
    :param logits: :math:`\alpha`, broadcastable to ``value``.
    :param dim: the dim of draws, negative, counted without the event.
    :param event_dim: the number of dims to sum over.
    :return: ``[..., 2 * num_pairs, ...]``.

    >>> b = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> pair_score(b, torch.tensor([2.0, -1.0]), -1, 1)
    tensor([ 1.7616, -1.7616])
    """
    dim -= event_dim
    difference = value - value.roll(value.shape[dim] // 2, dim)
    # Where both are equal, logits may be infinite.
    logits = torch.where(difference == 0, torch.zeros_like(logits), logits)
    score = difference * logits.detach().abs().sigmoid() * logits
    return score.flatten(score.dim() - event_dim).sum(-1) if event_dim else score
