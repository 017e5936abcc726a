# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Do rows have an effect on one another?

The pre-activations of a layer may be drawn with noise of their own for each row, in the
place of weights for all rows, if the objective is a sum of terms that each depend on one
row only: then its mean depends only on the distribution of each single row, and that is the same either way.

Terms are tensors of any shapes. One dim of theirs, counted from the right as plates are,
stands for the rows; a term without it belongs to no row.
"""

import functools
from typing import Iterable, List, Optional, Sequence

import torch


def tolerance(dtype: torch.dtype) -> float:
    """
    The relative difference that is put down to rounding: what is compared is made by the
    same operations, so that there is none on most machines.

    >>> tolerance(torch.float32) < 1e-6
    True
    """
    return 8 * torch.finfo(dtype).eps


def find_dims(terms: Sequence[torch.Tensor], rows: int) -> List[int]:
    """
    Dims that may stand for the rows, as negative numbers.

    >>> find_dims([torch.zeros(3, 5), torch.zeros(3, 1)], 3)
    [-2]
    """
    deepest = max((term.dim() for term in terms), default=0)
    dims = range(-1, -deepest - 1, -1)
    return [dim for dim in dims if any(_has_rows(term, dim, rows) for term in terms)]


def _has_rows(term: torch.Tensor, dim: int, rows: int) -> bool:
    return term.dim() >= -dim and term.shape[dim] == rows


def _along(x: torch.Tensor, dim: int) -> torch.Tensor:
    """A vector along a dim that is counted from the right."""
    return x.reshape(x.shape + (1,) * (-dim - 1))


def find_separable(
    terms: Sequence[torch.Tensor], noise: Sequence[torch.Tensor], num_vectors: int = 2
) -> List[bool]:
    """
    In which layers does each term depend on one row only, to first order?

    For random weights ``w`` of the rows, the gradient of the weighted sum by the noise of
    row ``j`` must be ``w[j]`` times that of the plain sum. Weights are powers of two, by
    which products are exact, and none is one, the weight of terms of no row.

    :param terms: differentiable.
    :param noise: the noise of each layer, of shape ``[rows, units]``, leaves that require grad.
    :param int num_vectors: how many ``w`` are tried.
    :return: whether it is so, for each layer.

    >>> noise = torch.randn(4, 3, requires_grad=True)
    >>> find_separable([noise.tanh().sum(-1)], [noise])
    [True]
    >>> find_separable([(noise - noise.mean(0)).tanh().sum(-1)], [noise])
    [False]
    """
    terms = [term for term in terms if term.requires_grad]
    if not terms or not noise:
        return [True] * len(noise)
    total = _add(term.sum() for term in terms)
    plain = torch.autograd.grad(total, noise, retain_graph=True, allow_unused=True)
    found = [len(eps) == 1 for eps in noise]
    for rows in {len(eps) for eps in noise}:
        for dim in find_dims(terms, rows):
            layers = [i for i, eps in enumerate(noise) if len(eps) == rows and not found[i]]
            for _ in range(num_vectors):
                if layers:
                    layers = _try_weights(terms, noise, plain, layers, rows, dim)
            for i in layers:
                found[i] = True
    return found


def _try_weights(
    terms: Sequence[torch.Tensor],
    noise: Sequence[torch.Tensor],
    plain: Sequence[Optional[torch.Tensor]],
    layers: List[int],
    rows: int,
    dim: int,
) -> List[int]:
    """Those of some layers that have rows, along a dim, for all that random weights show."""
    w = torch.randint(1, 13, (rows,), device=noise[layers[0]].device).to(noise[layers[0]]).exp2()
    total = _add(
        (term * _along(w, dim) if _has_rows(term, dim, rows) else term).sum() for term in terms
    )
    inputs = [noise[i] for i in layers]
    weighted = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
    return [i for i, grad in zip(layers, weighted) if _is_close(grad, plain[i], w)]


def _add(numbers: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, numbers)


def _is_close(
    grad: Optional[torch.Tensor], plain: Optional[torch.Tensor], w: torch.Tensor
) -> bool:
    if grad is None or plain is None:
        return grad is plain
    expected = w.unsqueeze(-1) * plain
    difference = (grad - expected).abs().amax(-1)
    return bool((difference <= tolerance(grad.dtype) * expected.abs().amax(-1)).all())


def keeps_rows(
    before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], is_changed: torch.Tensor
) -> bool:
    """
    Whether terms are what they were, except those of rows in which the noise was changed.

    :param before: terms.
    :param after: the same terms, with other noise in some rows.
    :param torch.Tensor is_changed: in which rows, boolean, of shape ``[rows]``.

    >>> noise, is_changed = torch.randn(4), torch.tensor([True, False, True, False])
    >>> other = torch.where(is_changed, 0.5 - noise, noise)
    >>> keeps_rows([noise.exp()], [other.exp()], is_changed)
    True
    >>> keeps_rows([noise - noise.mean()], [other - other.mean()], is_changed)
    False
    """
    if [term.shape for term in before] != [term.shape for term in after]:
        return False
    rows = len(is_changed)
    return any(
        all(_is_kept(x, y, is_changed, dim) for x, y in zip(before, after))
        for dim in find_dims(before, rows) or [-1]
    )


def _is_kept(x: torch.Tensor, y: torch.Tensor, is_changed: torch.Tensor, dim: int) -> bool:
    if _has_rows(x, dim, len(is_changed)):
        y = torch.where(_along(is_changed, dim), x, y)
    limit = tolerance(x.dtype)
    return torch.allclose(x, y, rtol=limit, atol=limit, equal_nan=True)
