# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Importance weights of several particles, and the gradients that pass through them.
"""

import math
from typing import AbstractSet, Any, NamedTuple, Sequence

import torch


def sum_to(tensor: torch.Tensor, dims: AbstractSet[int]) -> torch.Tensor:
    """
    Sums out all dimensions but ``dims``, and leaves them with size 1.

    :param tensor: of any shape.
    :param dims: negative dimensions, of which the tensor may lack some.

    >>> sum_to(torch.ones(2, 3, 4), {-1, -3}).shape
    torch.Size([2, 1, 4])
    """
    others = [dim for dim in range(-tensor.dim(), 0) if dim not in dims]
    return tensor.sum(others, keepdim=True) if others else tensor


class Weights(NamedTuple):
    """The log of the mean weight of each item, and the weights divided by their sum."""

    log_mean: torch.Tensor
    normalized: torch.Tensor


def normalize(log_weights: torch.Tensor, dim: int) -> Weights:
    r"""
    Computes :math:`\log \frac1K \sum_k w_k` and :math:`w_k / \sum_j w_j`.

    :param log_weights: of any shape, with the particles along ``dim``.
    :return: ``log_mean`` lacks ``dim``, ``normalized`` has the shape of ``log_weights``, and
        is zero where all weights are.

    >>> weights = normalize(torch.tensor([1.0, 3.0]).log(), dim=0)
    >>> weights.log_mean.exp(), weights.normalized
    (tensor(2.), tensor([0.2500, 0.7500]))
    """
    log_sum = log_weights.logsumexp(dim, keepdim=True)
    normalized = log_weights.softmax(dim).masked_fill(log_sum.isneginf(), 0.0)
    return Weights(log_sum.squeeze(dim) - math.log(log_weights.shape[dim]), normalized)


def stack(terms: Sequence[Any]) -> torch.Tensor:
    """
    Stacks tensors of shapes that can be broadcast, along a new first dimension.

    :param terms: tensors, and maybe numbers; one tensor at least.

    >>> stack([0.0, torch.ones(2)])
    tensor([[0., 0.],
            [1., 1.]])
    """
    like = next(term for term in terms if isinstance(term, torch.Tensor))
    tensors = [
        term if isinstance(term, torch.Tensor) else like.new_tensor(term)
        for term in terms
    ]
    return torch.stack(torch.broadcast_tensors(*tensors))


def weighted_sum(weights: torch.Tensor, terms: Any) -> torch.Tensor:
    """
    Sums products. Those with a weight of zero are zero, even if their terms are infinite.

    :param weights: of any shape.
    :param terms: a tensor of a shape that can be broadcast to that of ``weights``, or a number.

    >>> weighted_sum(torch.tensor([2.0, 0.0]), torch.tensor([3.0, -math.inf]))
    tensor(6.)
    """
    return torch.where(weights != 0.0, weights * terms, 0.0).sum()


def unsqueeze_right(tensor: torch.Tensor, num_dims: int) -> torch.Tensor:
    """
    Appends dimensions of size 1, to meet the event dimensions of a draw.

    >>> unsqueeze_right(torch.ones(3), 2).shape
    torch.Size([3, 1, 1])
    """
    return tensor.reshape(tensor.shape + (1,) * num_dims)
