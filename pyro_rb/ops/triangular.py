# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Linear systems with a matrix that is triangular in some order of its rows and columns."""

import math
from typing import Callable, Tuple

import torch

#: The largest matrix, by dims, that takes less time than iterations, for a single draw.
SMALL = 64


def substitute(
    rows: torch.Tensor, diagonal: torch.Tensor, b: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """
    Solves with the transpose of a matrix.

    :param rows: the matrix, ``[dim, dim]``, without its diagonal.
    :param diagonal: ``[dim]``.
    :param b: the right-hand side, ``[dim]``.
    :param order: of rows and columns, in which the matrix is lower triangular.

    >>> substitute(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.ones(2), torch.ones(2), torch.tensor([1, 0]))
    tensor([1., 0.])
    """
    rows = rows[order][:, order]
    rows.diagonal().copy_(diagonal[order])
    a = torch.empty_like(b)
    a[order] = torch.linalg.solve_triangular(rows.t(), b[order].unsqueeze(-1), upper=True).squeeze(-1)
    return a


def iterate(
    step: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, num_steps: int
) -> Tuple[torch.Tensor, str]:
    """
    The fixed point of an affine map whose linear part is nilpotent, for one vector or a batch, at rounding.

    :param step: the map.
    :param start: ``[*batch, dim]``.
    :param num_steps: after which the map is constant.
    :return: the fixed point, of the shape of ``start``, and how it was found.

    >>> iterate(lambda a: torch.stack([a[1], torch.tensor(3.0)]), torch.zeros(2), 2)
    (tensor([3., 3.]), '2 steps')
    """
    tolerance = 1e-6 if start.dtype == torch.float32 else 1e-13
    a, count = start, 0
    for count in range(1, num_steps + 1):
        last = a
        a = step(a)
        # Fewer steps are never enough. Each look at a number makes an accelerator wait.
        if count > 2 and (a.device.type == "cpu" or count % 8 == 0):
            change, size = [torch.linalg.vector_norm(v, math.inf, -1) for v in (a - last, a)]
            if (change <= tolerance * size).all():
                break
    return a, f"{count} step" + "s" * (count != 1)
