# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Look-ups in tables that are shared by many elements of a batch."""

import math

import torch
from torch import Tensor


def compact(table: Tensor, num_kept: int = 1) -> Tensor:
    """
    Undoes ``expand``: dims along which nothing changes shrink to size 1.

    :param table: ``[*batch, K]``.
    :param num_kept: number of dims on the right that are kept as they are.
    :return: ``[*table, K]``, a view that is broadcastable to ``table``.

    >>> compact(torch.eye(3).expand(5, 3, 3)).shape
    torch.Size([1, 3, 3])
    """
    for dim in range(table.dim() - num_kept):
        if table.stride(dim) == 0 and table.shape[dim] > 1:
            table = table.narrow(dim, 0, 1)
    return table


def gather_last(table: Tensor, index: Tensor) -> Tensor:
    """
    ``table[..., index]`` for each element of the broadcast batch. Unlike
    :func:`torch.gather` it never has, forwards or backwards, a table for each element.

    :param table: ``[*table, K]``.
    :param index: ``[*index]``, integers; ``table`` and ``index`` are broadcastable.
    :return: ``[*batch]``, broadcast from both.
    :raises RuntimeError: if an index is out of range, as :func:`torch.gather` does.

    >>> gather_last(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0], [1]]))
    tensor([[1., 3.],
            [2., 4.]])
    """
    index, _ = torch.broadcast_tensors(index, table[..., 0])
    table = compact(table)
    batch, num_categories = table.shape[:-1], table.shape[-1]
    rows = torch.arange(math.prod(batch), device=table.device).reshape(batch)
    # Beyond a row of the table there is another row, and beyond all of them an error.
    is_outside = (index < 0) | (index >= num_categories)
    index = (rows * num_categories + index).masked_fill(is_outside, table.numel())
    values = table.reshape(-1).gather(0, index.reshape(-1))
    return values.reshape(index.shape)
