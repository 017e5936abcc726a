# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Conditional means of standard normal noise, given linear functions of it.

For noise ``eps`` and a matrix ``A`` the mean of ``eps`` given ``A eps`` is ``P eps``, with
the orthogonal projection ``P = A^+ A`` to the row space of ``A``. A projection to more
than the row space conditions on more, which is valid too; one to less is biased. So no
solver here decides about a rank: what is too small to be told from rounding is either
kept or has no effect on a gradient.
"""

from typing import Optional, Tuple

import torch

#: Conditional means, and the means over all noise of their squares, if these are known.
Means = Tuple[torch.Tensor, Optional[torch.Tensor]]

SOLVERS = ("auto", "cholesky", "cg", "qr")

#: Up to so many operations, the number of calls takes the time.
_SMALL = 2**20
#: The largest array that is made at once, in numbers.
_CHUNK = 2**22


def jitter(dtype: torch.dtype) -> float:
    """
    What is added to the diagonal of a Gram matrix, as a share of its mean.

    >>> jitter(torch.float32)
    1e-05
    """
    return 1e-10 if dtype == torch.float64 else 1e-5


def tolerance(dtype: torch.dtype) -> float:
    """
    The relative error in the noise at which conjugate gradients stop.

    >>> tolerance(torch.float64)
    1e-10
    """
    return 1e-10 if dtype == torch.float64 else 1e-5


def pays(rows: int, fan_in: int, units: int) -> bool:
    """
    Whether the variance that a projection saves is likely to be worth its time.

    The variance falls by a factor of about ``fan_in / (2 rows)`` or more. The time of a
    small model's step grows by a half, that of a large one's by about two to four times.

    >>> pays(rows=6, fan_in=61, units=40), pays(rows=256, fan_in=785, units=400)
    (True, False)
    """
    is_small = rows * fan_in * units <= _SMALL
    return fan_in >= (2 if is_small else 6) * rows


def choose_solver(
    solver: str, rows: int, fan_in: int, units: int, with_squares: bool = False
) -> str:
    """
    The solver for ``units`` systems of ``rows`` equations each.

    :param str solver: one of ``SOLVERS``. Only ``"auto"`` leaves a choice.
    :param bool with_squares: whether mean squares are of use, see :func:`find_means`.

    >>> choose_solver("auto", rows=32, fan_in=512, units=512)
    'cg'
    >>> choose_solver("auto", rows=4, fan_in=512, units=1)
    'cholesky'
    """
    if solver != "auto":
        return solver
    # Where the two took the same time, on one thread of a CPU, at widths of 40 to 512.
    limit = _SMALL * (16 if with_squares else 1)
    is_small = units * rows * rows * (fan_in + rows) <= limit
    return "cholesky" if rows <= 2 or is_small else "cg"


def find_means(
    rows: torch.Tensor,
    scale: torch.Tensor,
    eps: torch.Tensor,
    solver: str = "cholesky",
    with_squares: bool = False,
) -> Means:
    """
    The mean of the noise of a linear layer, given its pre-activations.

    Unit ``i`` has the noise ``eps[i]`` and the matrix ``rows * scale[i]``. The rows are
    common to all units, the scales need not be.

    :param torch.Tensor rows: the layer's inputs, of shape ``[*batch, m, k]``.
    :param torch.Tensor scale: of shape ``[*batch, units, k]``.
    :param torch.Tensor eps: of the same shape.
    :param str solver: ``"cholesky"``, ``"cg"`` or ``"qr"``. Where one fails, the next of
        cg, cholesky, qr takes over.
    :param bool with_squares: whether mean squares are wanted. ``"cg"`` does not find them.
    :return: the means, of the shape of ``eps``; and the mean square of each of them, or None: the
        diagonal of ``P P^T``, for the matrix ``P`` by which the solver has multiplied the noise.

    >>> rows = torch.tensor([[3.0, 4.0]])
    >>> mean, square = find_means(rows, torch.ones(1, 2), torch.tensor([[1.0, 1.0]]), with_squares=True)
    >>> mean, square
    (tensor([[0.8400, 1.1200]]), tensor([[0.3600, 0.6400]]))
    """
    if rows.shape[-2] == 0:
        return torch.zeros_like(eps), torch.zeros_like(eps)
    # In units in which a typical row has length one, and rows of zeros stay.
    typical = scale.square().mean(-2, keepdim=True)  # [*batch, 1, k]
    length = torch.linalg.vector_norm(rows * typical.sqrt(), dim=-1, keepdim=True)
    rows = torch.where(length > 0, rows / length, torch.zeros_like(rows))
    if solver == "cg":
        found = _solve_cg(rows, scale, eps, typical)
        if found is not None:
            return found, None
    solve = _solve_qr if solver == "qr" else _solve_cholesky
    chunk = max(1, _CHUNK // max(1, rows.numel()))
    parts = [
        solve(rows, s, e, with_squares)
        for s, e in zip(scale.split(chunk, -2), eps.split(chunk, -2))
    ]
    if len(parts) == 1:
        return parts[0]
    means, squares = zip(*parts)
    return torch.cat(means, -2), torch.cat(squares, -2) if with_squares else None


def _solve_cg(
    rows: torch.Tensor,  # [*batch, m, k]
    scale: torch.Tensor,  # [*batch, units, k]
    eps: torch.Tensor,  # [*batch, units, k]
    typical: torch.Tensor,  # [*batch, 1, k]
    max_steps: int = 60,
) -> Optional[torch.Tensor]:
    """
    Conjugate gradients on ``G_i y_i = A_i eps_i``, for all units at once. The Gram matrix
    of the typical scale preconditions them; where scales are shared it is the solution.
    """
    gram = (rows * typical) @ rows.mT  # [*batch, m, m]
    gram.diagonal(dim1=-2, dim2=-1).add_(jitter(rows.dtype))
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.any():
        return None
    inverse = torch.cholesky_inverse(factor)
    square = scale.square()
    residual = (scale * eps) @ rows.mT  # [*batch, units, m]
    solution = torch.zeros_like(residual)
    direction = residual @ inverse
    # The energy of the error, up to a factor near one: an error in the noise itself.
    energy = (residual * direction).sum(-1, keepdim=True)  # [*batch, units, 1]
    enough = energy * tolerance(rows.dtype) ** 2
    for _ in range(max_steps):
        image = (square * (direction @ rows)) @ rows.mT
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature, torch.zeros_like(energy))
        solution = solution + step * direction
        residual = residual - step * image
        correction = residual @ inverse
        previous, energy = energy, (residual * correction).sum(-1, keepdim=True)
        if (energy <= enough).all():
            return scale * (solution @ rows)
        ratio = torch.where(previous > 0, energy / previous, torch.zeros_like(energy))
        direction = correction + ratio * direction
    return None


def _solve_cholesky(
    rows: torch.Tensor,  # [*batch, m, k]
    scale: torch.Tensor,  # [*batch, units, k]
    eps: torch.Tensor,  # [*batch, units, k]
    with_squares: bool,
) -> Means:
    """
    Two passes of ``y += A^T (G + j I)^-1 A (eps - y)``. A direction with singular value
    ``sigma`` is missed by the factor ``(j / (sigma^2 + j))^2``; it has the weight
    ``sigma`` in a gradient, whose error is at most ``0.325 sqrt(j)``.
    """
    a = rows.unsqueeze(-3) * scale.unsqueeze(-2)  # [*batch, units, m, k]
    gram = a @ a.mT  # [*batch, units, m, m]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    shift = torch.where(mean > 0, mean, torch.ones_like(mean)) * jitter(rows.dtype)
    diagonal.add_(shift)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info.any():
        return _solve_qr(rows, scale, eps, with_squares)
    found = torch.zeros_like(eps)
    for _ in range(2):
        target = a @ (eps - found).unsqueeze(-1)
        found = found + (a.mT @ torch.cholesky_solve(target, factor)).squeeze(-1)
    if not with_squares:
        return found, None
    # Both passes are the matrix A^T W.
    w = torch.cholesky_solve(a, factor)
    w = w + shift.unsqueeze(-1) * torch.cholesky_solve(w, factor)
    diagonal.sub_(shift)
    return found, (w * (gram @ w)).sum(-2)


def _solve_qr(
    rows: torch.Tensor,  # [*batch, m, k]
    scale: torch.Tensor,  # [*batch, units, k]
    eps: torch.Tensor,  # [*batch, units, k]
    with_squares: bool,
) -> Means:
    """The projection to the span of an orthonormal basis that holds the row space."""
    a = rows.unsqueeze(-3) * scale.unsqueeze(-2)
    largest = a.abs().amax((-2, -1), keepdim=True)
    a = torch.where(largest > 0, a / largest, torch.zeros_like(a))
    q = torch.linalg.qr(a.mT).Q  # [*batch, units, k, min(m, k)]
    found = (q @ (q.mT @ eps.unsqueeze(-1))).squeeze(-1)
    return found, q.square().sum(-1) if with_squares else None
