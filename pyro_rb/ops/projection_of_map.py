# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Conditional means of standard normal noise, given any linear map of it. Where the map has the structure of a linear
layer, :mod:`pyro_rb.ops.projection` finds them in less time.
"""

from typing import Callable, Optional

import torch

from pyro_rb.ops.projection import Means, find_means, tolerance

#: The largest matrix of a map that is ever written out, in numbers.
_MAX_DENSE = 2**26


def find_means_of_map(
    linear_map: Callable[[torch.Tensor], torch.Tensor],
    eps: torch.Tensor,
    solver: str = "auto",
    with_squares: bool = False,
) -> Optional[Means]:
    """
    The mean of noise, given the value of any linear map of it.

    :param linear_map: from a vector of length ``n`` to a tensor of any shape, linear, and
        differentiable once.
    :param torch.Tensor eps: of shape ``[n]``.
    :param str solver: one of :data:`~pyro_rb.ops.projection.SOLVERS`. ``"auto"`` writes small maps out
        as a matrix, and takes conjugate gradients on the normal equations for the others.
    :param bool with_squares: as in :func:`~pyro_rb.ops.projection.find_means`, which tells what is
        returned, too.
    :return: means and mean squares, of shape ``[n]``; or None, if conjugate gradients did not
        converge and the matrix would be too large to be written out.

    >>> rows = torch.tensor([[1.0, 1.0]])
    >>> mean, square = find_means_of_map(lambda e: rows @ e, torch.tensor([3.0, 1.0]), with_squares=True)
    >>> mean  # the sum is known
    tensor([2., 2.])
    """
    with torch.enable_grad():
        leaf = torch.zeros_like(eps).requires_grad_()
        image = linear_map(leaf)
    size = image.numel() * eps.numel()
    if solver == "cg" or (solver == "auto" and size > 2**18):
        found = _solve_normal_equations(linear_map, leaf, image, eps)
        if found is not None:
            return found, None
    if size > _MAX_DENSE:
        return None
    matrix = _write_out(leaf, image)  # [m, n]
    dense = "qr" if solver == "qr" else "cholesky"
    ones = torch.ones_like(eps)
    mean, square = find_means(matrix, ones[None], eps[None], dense, with_squares)
    return mean[0], None if square is None else square[0]


def _solve_normal_equations(
    linear_map: Callable[[torch.Tensor], torch.Tensor],
    leaf: torch.Tensor,
    image: torch.Tensor,
    eps: torch.Tensor,
    max_steps: int = 200,
) -> Optional[torch.Tensor]:
    """Conjugate gradients for the shortest ``x`` with ``A x = A eps``."""

    def transpose(y: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(image, leaf, y, retain_graph=True)[0]

    with torch.no_grad():
        residual = linear_map(eps)
    found = torch.zeros_like(eps)
    direction = gradient = transpose(residual)
    square = gradient.square().sum()
    enough = square * tolerance(eps.dtype) ** 2
    for _ in range(max_steps):
        if square <= enough:
            return found
        with torch.no_grad():
            step_image = linear_map(direction)
        curvature = step_image.square().sum()
        if not curvature > 0:
            return None
        step = square / curvature
        found = found + step * direction
        residual = residual - step * step_image
        gradient = transpose(residual)
        previous, square = square, gradient.square().sum()
        direction = gradient + square / previous * direction
    return None


def _write_out(leaf: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """The matrix of a linear map, a row for each element of ``image``."""
    basis = torch.eye(image.numel(), dtype=image.dtype, device=image.device)
    basis = basis.reshape(-1, *image.shape)
    return torch.autograd.grad(image, leaf, basis, is_grads_batched=True)[0]
