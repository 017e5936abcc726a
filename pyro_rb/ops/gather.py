# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Look-ups in tables that are shared by many elements of a batch."""

import math

import torch
from torch import Tensor


def compact(table: Tensor) -> Tensor:
    """
    Undoes ``expand``: dims along which nothing changes shrink to size 1.

    :param table: ``[*batch, K]``.
    :return: ``[*table, K]``, a view that is broadcastable to ``table``.

    >>> compact(torch.eye(3).expand(5, 3, 3)).shape
    torch.Size([1, 3, 3])
    """
    for dim in range(table.dim() - 1):
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

    >>> gather_last(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0], [1]]))
    tensor([[1., 3.],
            [2., 4.]])
    """
    index, _ = torch.broadcast_tensors(index, table[..., 0])
    table = compact(table)
    batch, num_categories = table.shape[:-1], table.shape[-1]
    rows = torch.arange(math.prod(batch), device=table.device).reshape(batch)
    index = rows * num_categories + index
    values = table.reshape(-1).index_select(0, index.reshape(-1))
    return values.reshape(index.shape)
