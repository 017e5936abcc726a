# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Are numbers finite? Asked at each step, so it has to be quick."""

import math
from typing import Any, Dict, Iterable, List

import torch
from torch import Tensor


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """
    Whether all elements are finite.

    >>> import torch
    >>> are_finite([torch.ones(2), torch.tensor([1.0, float("inf")])])
    False
    """
    tensors = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    sums: Dict[torch.device, Tensor] = {}
    for tensor in tensors:
        total = tensor.detach().sum()
        sums[tensor.device] = sums[tensor.device] + total if tensor.device in sums else total
    # A sum of finite numbers may overflow: then each is looked at.
    if all(math.isfinite(total.item()) for total in sums.values()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def grads_of(parameters: Iterable[Tensor]) -> List[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def is_finite_loss(loss: Any) -> bool:
    parts = loss if isinstance(loss, tuple) else (loss,)  # ReweightedWakeSleep has two
    return all(math.isfinite(p.detach() if isinstance(p, Tensor) else p) for p in parts)
